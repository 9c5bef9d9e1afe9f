"""Bits per dimension of a trained stage over real images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config.schema import SamplerConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
from cascaded_diffusion.evaluation.samples.generate import make_placer
from cascaded_diffusion.evaluation.trained import TrainedStage
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.types import Params


def bits_per_dim(
    trained: TrainedStage,
    data: LabelledImages,
    *,
    batch_size: int,
    seed: int,
    aug_level: float,
    sampler: SamplerConfig,
    mesh: Mesh,
) -> Mapping[str, float]:
    """The variational bound of every image, with one draw of noise per step and image.

    Args:
      trained: the stage.
      data: images at its resolution or above.
      batch_size: the last batch is filled up with images that are not counted.
      seed: of the noise.
      aug_level: of the low-res input, where the stage has one.
      sampler: the chain whose bound is computed: ancestral, with a variance.
      mesh: the device mesh.

    Returns:
      `bits_per_dim`, the mean, and `bits_per_dim_error`, its standard error over images.

    Raises:
      UserError: a single image, or a bound that is not finite.
    """
    if len(data.labels) < 2:
        raise UserError(
            f"bits/dim of {len(data.labels)} image: expected at least 2, for a standard error"
        )
    stage, key = trained.stage, jax.random.key(seed)
    place = make_placer(mesh)

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
        label = data.labels[rows % total] if stage.config.num_classes else None
        batch = of_batch(
            trained.params,
            keys_for(key, place(rows)),
            place(data.images[rows % total]),
            place(label),
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
    return {
        "bits_per_dim": float(bits.mean()),
        "bits_per_dim_error": float(bits.std(ddof=1) / np.sqrt(len(bits))),
    }
