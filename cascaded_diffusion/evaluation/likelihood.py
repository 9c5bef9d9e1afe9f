"""Bits per dimension of a trained stage over real images."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config.schema import SamplerConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
from cascaded_diffusion.evaluation.inputs import bound_chain
from cascaded_diffusion.evaluation.samples.generate import put_batch
from cascaded_diffusion.evaluation.samples.real_images import RealSplit
from cascaded_diffusion.evaluation.setup import default_mesh
from cascaded_diffusion.evaluation.trained import TrainedStage, load_trained
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params


def mean_bits_per_dim(
    trained: TrainedStage,
    data: LabelledImages,
    *,
    batch_size: int,
    seed: int,
    aug_level: float,
    sampler: SamplerConfig,
    mesh: Mesh,
) -> tuple[float, float]:
    """The variational bound of every image, with one draw of noise per step and image.

    Args:
      trained: the stage.
      data: images at its resolution or above.
      batch_size: the last batch is filled up with images that are not counted.
      seed: of the noise.
      aug_level: of the low-res input, if the stage has one.
      sampler: the chain whose bound is computed: ancestral, with a variance.
      mesh: the device mesh.

    Returns:
      The mean over images, and its standard error.

    Raises:
      UserError: a single image, or a bound that is not finite.
    """
    if len(data.labels) < 2:
        raise UserError(
            f"bits/dim of {len(data.labels)} image: expected at least 2, for a standard error"
        )
    stage, key = trained.stage, jax.random.key(seed)

    @jax.jit
    def of_batch(params: Params, keys: jax.Array, image: jax.Array, label: Any) -> jax.Array:
        return stage.bits_per_dim(
            params,
            keys,
            float_from_uint8(image),
            label=label,
            aug_level=aug_level,
            sampler=sampler,
        )

    total = len(data.labels)
    progress = Progress(total, unit="images", label=f"bits/dim of {trained.name}")
    values = []
    for start in range(0, total, batch_size):
        rows = np.arange(start, start + batch_size)
        label = None
        if stage.config.num_classes:
            label = put_batch(data.labels[rows % total], mesh)
        batch = of_batch(
            trained.params,
            keys_for(key, put_batch(rows, mesh)),
            put_batch(data.images[rows % total], mesh),
            label,
        )
        values.append(np.asarray(batch)[: total - start])
        progress.update(min(total, start + batch_size))
    progress.close()
    bits = np.concatenate(values).astype(np.float64)
    if not np.isfinite(bits).all():
        raise UserError(
            f"bits/dim of {trained.name}: not finite for {np.sum(~np.isfinite(bits))} of {total}"
            " images"
        )
    return float(bits.mean()), float(bits.std(ddof=1) / np.sqrt(len(bits)))


def bits_per_dim(
    folder: RunFolder,
    split: RealSplit,
    *,
    num_images: int | None = None,
    num_steps: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The variational bound of the chosen checkpoint over real images, appended to the results.

    Args:
      folder: the run.
      split: the real images.
      num_images: how many of them, spread over the split; by default all.
      num_steps: of the chain; by default all steps of the stage's process.
      mesh: the device mesh; by default all devices.

    Returns:
      The record.
    """
    config = folder.read_config()
    stage, settings = config.stage, config.eval
    chain = bound_chain(stage, num_steps)
    count = min(len(split), num_images or len(split))
    # Spread over the split, which may be sorted by class.
    images = split.raw([i * len(split) // count for i in range(count)])
    mesh = mesh or default_mesh(config)
    trained = load_trained(folder, mesh)
    print(f"{trained.name}: the bound of {chain.num_steps} steps, variance {chain.variance}")
    mean, error = mean_bits_per_dim(
        trained,
        images,
        batch_size=settings.batch_size,
        seed=settings.seed,
        aug_level=settings.aug_level,
        sampler=chain,
        mesh=mesh,
    )
    record = {
        **dataclasses.asdict(trained.chosen),
        "metric": "bits_per_dim",
        "value": mean,
        "standard_error": error,
        "num_images": count,
        "reference": f"{config.data.name}:{split.split}:{stage.resolution}px",
        "aug_level": settings.aug_level if stage.has_aug_level else None,
        "chain": to_dict(chain),
        "seed": settings.seed,
    }
    with folder.writer_lock("eval"):
        append_line(folder.results_path, record)
    return record
