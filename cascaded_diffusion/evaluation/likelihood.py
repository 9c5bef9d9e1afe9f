"""Bits per dimension of a trained stage over real images."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config.schema import to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import default_mesh
from cascaded_diffusion.evaluation.samples.generate import put_batch
from cascaded_diffusion.evaluation.samples.real_images import RealSplit
from cascaded_diffusion.evaluation.settings import bound_chain
from cascaded_diffusion.evaluation.trained import load_trained
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params


def bits_per_dim(
    folder: RunFolder,
    split: RealSplit,
    *,
    num_images: int | None = None,
    num_steps: int | None = None,
) -> dict[str, Any]:
    """The variational bound of the chosen checkpoint, its mean over real images.

    There is one draw of noise per step and image. By default, all images of the split are taken,
    and all steps of the stage's process. Returns the record, which is appended to the results.

    Raises:
      UserError: a single image, or a bound that is not finite.
    """
    config = folder.read_config()
    settings, count = config.eval, min(len(split), num_images or len(split))
    if count < 2:
        raise UserError(f"bits/dim of {count} image: expected at least 2, for a standard error")
    chain = bound_chain(config.stage, num_steps)
    # Spread over the split, which may be sorted by class.
    images = split.raw([i * len(split) // count for i in range(count)])
    mesh = default_mesh(config)
    trained = load_trained(folder, mesh)
    stage, key = trained.stage, jax.random.key(settings.seed)
    print(f"{trained.name}: the bound of {chain.num_steps} steps, variance {chain.variance}")

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

    progress = Progress(count, unit="images", label=f"bits/dim of {trained.name}")
    values = []
    for start in range(0, count, settings.batch_size):
        indices = np.arange(start, start + settings.batch_size)
        rows = indices % count  # the last batch is filled up with images that are not counted
        batch = of_batch(
            trained.params,
            keys_for(key, put_batch(indices, mesh)),
            put_batch(images.images[rows], mesh),
            put_batch(images.labels[rows], mesh) if stage.config.num_classes else None,
        )
        values.append(np.asarray(batch)[: count - start])
        progress.update(min(count, start + settings.batch_size))
    progress.close()
    bits = np.concatenate(values).astype(np.float64)
    if not np.isfinite(bits).all():
        raise UserError(
            f"bits/dim of {trained.name}: not finite for {np.sum(~np.isfinite(bits))} of {count}"
            " images"
        )
    record = {
        **dataclasses.asdict(trained.chosen),
        "metric": "bits_per_dim",
        "value": float(bits.mean()),
        "standard_error": float(bits.std(ddof=1) / np.sqrt(count)),
        "num_images": count,
        "reference": f"{config.data.name}:{split.split}:{stage.config.resolution}px",
        "aug_level": settings.aug_level if stage.config.has_aug_level else None,
        "chain": to_dict(chain),
        "seed": settings.seed,
    }
    with folder.writer_lock("eval"):
        append_line(folder.results_path, record)
    return record
