"""Bits per dimension of a trained stage over real images."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config.schema import EvalConfig, SamplerConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import default_mesh
from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
from cascaded_diffusion.evaluation.samples.generate import put_batch
from cascaded_diffusion.evaluation.samples.real_images import RealSplit
from cascaded_diffusion.evaluation.settings import bound_chain
from cascaded_diffusion.evaluation.trained import TrainedStage, load_trained
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params


def mean_bits_per_dim(
    trained: TrainedStage,
    data: LabelledImages,
    settings: EvalConfig,
    chain: SamplerConfig,
    mesh: Mesh,
) -> tuple[float, float]:
    """The mean over images of the variational bound, and its standard error.

    The bound is that of a chain with one draw of noise per step and image. The images are at the
    stage's resolution or above. `settings` say the batch size, the seed of the noise, and the
    level of the low-res input.

    Raises:
      UserError: a single image, or a bound that is not finite.
    """
    total, size = len(data.labels), settings.batch_size
    if total < 2:
        raise UserError(f"bits/dim of {total} image: expected at least 2, for a standard error")
    stage, key = trained.stage, jax.random.key(settings.seed)

    @jax.jit
    def of_batch(
        params: Params, keys: jax.Array, image: jax.Array, label: jax.Array | None
    ) -> jax.Array:
        return stage.bits_per_dim(
            params,
            keys,
            float_from_uint8(image),
            label=label,
            aug_level=settings.aug_level,
            sampler=chain,
        )

    progress = Progress(total, unit="images", label=f"bits/dim of {trained.name}")
    values = []
    for start in range(0, total, size):
        indices = np.arange(start, start + size)
        rows = indices % total  # the last batch is filled up with images that are not counted
        batch = of_batch(
            trained.params,
            keys_for(key, put_batch(indices, mesh)),
            put_batch(data.images[rows], mesh),
            put_batch(data.labels[rows], mesh) if stage.config.num_classes else None,
        )
        values.append(np.asarray(batch)[: total - start])
        progress.update(min(total, start + size))
    progress.close()
    bits = np.concatenate(values).astype(np.float64)
    if not np.isfinite(bits).all():
        raise UserError(
            f"bits/dim of {trained.name}: not finite for {np.sum(~np.isfinite(bits))} of {total}"
            " images"
        )
    return float(bits.mean()), float(bits.std(ddof=1) / np.sqrt(total))


def bits_per_dim(
    folder: RunFolder,
    split: RealSplit,
    *,
    num_images: int | None = None,
    num_steps: int | None = None,
) -> dict[str, Any]:
    """The variational bound of the chosen checkpoint over real images, appended to the results.

    By default, it is over all images of the split, and the chain has all steps of the stage's
    process. Returns the record.
    """
    config = folder.read_config()
    stage, settings = config.stage, config.eval
    chain = bound_chain(stage, num_steps)
    count = min(len(split), num_images or len(split))
    # Spread over the split, which may be sorted by class.
    images = split.raw([i * len(split) // count for i in range(count)])
    mesh = default_mesh(config)
    trained = load_trained(folder, mesh)
    print(f"{trained.name}: the bound of {chain.num_steps} steps, variance {chain.variance}")
    mean, error = mean_bits_per_dim(trained, images, settings, chain, mesh)
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
