"""Host-side transforms of single images, in the order in which they are applied.

Crop, then resize of the crop to every size that is wanted, then flip: as the paper, which
cuts the largest centred square (BigGAN's crop) and takes area averages of it.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.resize_weights import area_weights, bilinear_weights

# Threads are the loader's to start.
cv2.setNumThreads(1)


def center_crop(image: np.ndarray) -> np.ndarray:
    """The largest centred square of [H, W, C]; the odd pixel is cut off at the end."""
    height, width = image.shape[:2]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _no_crop(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    if height != width:
        raise CorruptRecord(
            f"{width} x {height} pixels, expected a square: config.data.crop = 'center' makes one"
        )
    return image


CROPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"center": center_crop, "none": _no_crop}


def _by_weights(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    height, width, channels = image.shape
    tall = rows @ image.reshape(height, width * channels)
    wide = np.tensordot(columns, tall.reshape(len(rows), width, channels), axes=(1, 1))
    return wide.transpose(1, 0, 2)


def area_resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """Area averages (`resize_weights`, eq. 1): float32 [H, W, C] -> [resolution, resolution, C].

    Equal to TensorFlow's `area` for any sizes, enlarging included.
    """
    height, width = image.shape[:2]
    if min(height, width) >= resolution:
        # The same sums, by a quicker hand; it drops a last axis of one.
        small = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_AREA)
        return small.reshape(resolution, resolution, image.shape[2])
    return _by_weights(image, area_weights(height, resolution), area_weights(width, resolution))


def bilinear_resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """Antialiased bilinear (`resize_weights`, eq. 2): float32 [H, W, C] -> square."""
    height, width = image.shape[:2]
    return _by_weights(
        image, bilinear_weights(height, resolution), bilinear_weights(width, resolution)
    )


RESIZES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "area": area_resize,
    "bilinear": bilinear_resize,
}


def resized(image: np.ndarray, resolution: int, method: str) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [resolution, resolution, C]: computed in float, rounded once."""
    if image.shape[:2] == (resolution, resolution):
        return np.ascontiguousarray(image)
    exact = RESIZES[method](image.astype(np.float32), resolution)
    return np.rint(np.clip(exact, 0.0, 255.0)).astype(np.uint8)


def random_flip(record: dict, rng: np.random.Generator) -> dict:
    """Mirrors a record's images left to right, half of the time, all or none."""
    if rng.random() < 0.5:
        return {k: v[:, ::-1] if v.ndim == 3 else v for k, v in record.items()}
    return record
