"""What a stage sees of a training batch, as a picture: images, and low-res inputs with damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from cascaded_diffusion.cascade.augment import (
    Damage,
    GaussianAugment,
    NoAugment,
    condition,
    gaussian_weights,
)
from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.config.schema import AugmentConfig, StageConfig
from cascaded_diffusion.files.paths import printable
from cascaded_diffusion.runtime.pictures import enlarge_nearest, labelled_rows, with_names

# Fractions of the largest level in training.
_LEVELS = (0.1, 0.25, 0.5, 1.0)


def batch_picture(
    config: StageConfig, batch: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> np.ndarray:
    """Draws what a stage gets of a batch, one row per kind of image, with a caption.

    Args:
      config: the stage.
      batch: `image` uint8 [b, H, W, C], `label` int [b], and `low_res` if it is stored.
      class_names: in order of label; empty for data without classes.

    Returns:
      uint8 [height, width, 3].
    """
    stage = build_stage(config)
    images = float_from_uint8(batch["image"])
    target = np.asarray(uint8_from_float(stage.target_from(images)))
    resolution = target.shape[1]
    rows = [(f"image, {resolution} px", target)]
    if stage.augment is not None:
        low_res = (
            float_from_uint8(batch["low_res"]) if "low_res" in batch else stage.low_res_from(images)
        )
        size = low_res.shape[1]
        rows.append((f"low-res input, {size} px", np.asarray(uint8_from_float(low_res))))
        for caption, damage in _damages(config.augment, stage.augment, low_res.shape):
            shown = condition(low_res, damage, label=None).low_res
            rows.append((caption, np.asarray(uint8_from_float(shown))))
    rows = [(caption, enlarge_nearest(row, resolution)) for caption, row in rows]
    picture = labelled_rows(rows, scale=max(1, 96 // resolution))
    if class_names and config.num_classes:
        picture = with_names(picture, [printable(class_names[k]) for k in batch["label"]])
    return picture


def _damages(
    config: AugmentConfig, augment: NoAugment | GaussianAugment, shape: tuple[int, ...]
) -> list[tuple[str, Damage]]:
    """Captions and damages at several strengths, as training may draw them."""
    if config.name == "gaussian":
        keys = jax.random.split(jax.random.key(0), shape[0])
        levels = [config.max_level * part for part in _LEVELS]
        return [
            (f"damaged, aug_level {level:.2g}", augment.for_sampling(keys, shape, level))
            for level in levels
        ]
    damages = []
    if config.name == "blur":
        low, high = config.blur_sigmas
        for sigma in np.linspace(low, high, 2 if high > low else 1):
            weights = gaussian_weights(np.full(shape[:1], sigma), config.blur_kernel_size)
            damages.append((f"blurred, sigma {sigma:.2g} px", Damage(blur_weights=weights)))
    return damages
