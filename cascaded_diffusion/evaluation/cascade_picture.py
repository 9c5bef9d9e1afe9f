"""The picture of a cascade: real images and their way through it, and its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.evaluation import generate
from cascaded_diffusion.evaluation.classifier import LabelledImages
from cascaded_diffusion.evaluation.real_images import resized
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.types import Params


def cascade_picture(
    cascade: Cascade,
    params: Sequence[Params],
    aug_levels: Sequence[float],
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    real: LabelledImages,
    *,
    seed: int,
    mesh: Mesh,
) -> np.ndarray:
    """A picture of a cascade: real images and their way through it, then samples.

    Args:
      cascade: the stages.
      params: their parameters.
      aug_levels: one per enlargement.
      images: samples uint8 [n, H, W, C] per stage.
      labels: of the samples, [n].
      real: real images; samples of the same classes are shown.
      seed: of the enlargements of the real images.
      mesh: the device mesh.

    Returns:
      uint8 [h, w, 3].
    """
    order = np.argsort(real.labels, kind="stable")
    real = LabelledImages(real.images[order], real.labels[order])
    size = cascade.stages[-1].config.resolution
    rows = [(f"real, {size} px", resized(real, size).images)]
    for i, stage in enumerate(cascade.stages[1:], start=1):
        low = stage.config.low_res_resolution
        rows.append((f"real, {low} px", _shown(resized(real, low).images, size)))
        low_res = np.asarray(stage.low_res_from(float_from_uint8(real.images)))
        level = aug_levels[i - 1]
        sampler = generate.make_enlarging_sampler(
            stage,
            low_res,
            real.labels,
            sampler=cascade.samplers[i],
            seed=seed,
            mesh=mesh,
        )
        enlarged = generate.generate(
            partial(sampler, aug_level=level if stage.config.has_level else None),
            [params[i]],
            num_samples=len(real.images),
            batch_size=-(-len(real.images) // mesh.size) * mesh.size,
            label=f"enlarging real {low} px images",
        )[-1]
        caption = f"real {low} px images enlarged by {stage.config.name}, aug_level {level:g}"
        rows.append((caption, _shown(enlarged, size)))
    chosen = _rows_with_labels(labels, real.labels)
    mode = "truncated" if cascade.truncated else "non-truncated"
    for i, (stage, stage_images) in enumerate(zip(cascade.stages, images, strict=True)):
        caption = f"sampled by {stage.config.name}, {stage.config.resolution} px"
        if i > 0:
            caption += f" (from the row above, aug_level {aug_levels[i - 1]:g}, {mode})"
        rows.append((caption, _shown(stage_images[chosen], size)))
    return pictures.labelled_rows(rows)


def _shown(images: np.ndarray, size: int) -> np.ndarray:
    return pictures.enlarge_nearest(images, size)


def _rows_with_labels(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted label the first unused row that has it, or any row at all."""
    free = {label: list(np.flatnonzero(labels == label)[::-1]) for label in set(labels.tolist())}
    return np.asarray(
        [free[w].pop() if free.get(w) else i % len(labels) for i, w in enumerate(wanted.tolist())]
    )
