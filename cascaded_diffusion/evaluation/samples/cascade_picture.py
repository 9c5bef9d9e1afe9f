"""Pictures of a cascade: its samples, and real or given images with their enlargements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config.schema import StageConfig
from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.real_images import shrunk
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.types import Params

# The largest number of images in a row and of classes in a picture; an image's size in pixels.
_COLUMNS, _CLASSES, _CELL = 10, 20, 96


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
    """A picture, uint8 [h, w, 3], of real images, their enlargements by every stage, and samples.

    Args:
      cascade: the stages.
      params: their parameters.
      aug_levels: one per enlargement.
      images: samples uint8 [n, H, W, C] per stage.
      labels: of the samples, [n].
      real: real images; samples of the same classes are shown.
      seed: of the enlargements of the real images.
      mesh: the device mesh.
    """
    order = np.argsort(real.labels, kind="stable")
    real = LabelledImages(real.images[order], real.labels[order])
    size = cascade.stages[-1].config.resolution
    rows = [(f"real, {size} px", shrunk(real, size).images)]
    for i, stage in enumerate(cascade.stages[1:], start=1):
        low = stage.config.low_res_resolution
        rows.append((f"real, {low} px", _shown(shrunk(real, low).images, size)))
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
            partial(sampler, aug_level=level if stage.config.has_aug_level else None),
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


def enlarged_picture(
    low_res: np.ndarray,
    images: Sequence[np.ndarray],
    stages: Sequence[StageConfig],
    aug_levels: Sequence[float],
) -> np.ndarray:
    """A picture, uint8 [h, w, 3], of the first given images with their enlargements below them.

    `low_res` is uint8 [n, h, w, C]; `images` uint8 [n, H, W, C], one array per stage.
    """
    size = stages[-1].resolution
    rows = [(f"given, {low_res.shape[1]} px", _shown(low_res[:_COLUMNS], size))]
    for stage, level, enlarged in zip(stages, aug_levels, images, strict=True):
        caption = f"enlarged by {stage.name}, {stage.resolution} px, aug_level {level:g}"
        rows.append((caption, _shown(enlarged[:_COLUMNS], size)))
    return pictures.labelled_rows(rows, scale=_scale(size))


def classes_picture(
    images: np.ndarray, labels: np.ndarray, class_names: Mapping[int, str]
) -> np.ndarray:
    """A picture, uint8 [h, w, 3], with a row of samples per class, of the first classes.

    `images` is uint8 [n, H, W, C], `labels` [n]; `class_names` has the names that are known.
    """
    rows = []
    for label in sorted(set(labels.tolist()))[:_CLASSES]:
        name = f" ({class_names[label]})" if label in class_names else ""
        rows.append((f"class {label}{name}", images[labels == label][:_COLUMNS]))
    return pictures.labelled_rows(rows, scale=_scale(images.shape[1]))


def _scale(size: int) -> int:
    """Small images are shown enlarged, pixel by pixel."""
    return max(1, _CELL // size)


def _shown(images: np.ndarray, size: int) -> np.ndarray:
    return pictures.enlarge_nearest(images, size)


def _rows_with_labels(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted label, the first unused row that has it, or else any row."""
    free = {label: list(np.flatnonzero(labels == label)[::-1]) for label in set(labels.tolist())}
    return np.asarray(
        [free[w].pop() if free.get(w) else i % len(labels) for i, w in enumerate(wanted.tolist())]
    )
