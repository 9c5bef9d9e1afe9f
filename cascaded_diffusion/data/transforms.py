"""Host-side transforms of single images, in the order in which they are applied.

An image is cropped, the crop is resized to every size that is wanted, and the results are
flipped. The paper takes the largest centred square (BigGAN's crop) and area averages of it.

`adm_resize` is what guided-diffusion does instead, so that its numbers can be reproduced: it halves
the whole image while its shorter side is at least twice the size, then resizes it bicubically, and
cuts the centre out at last.
"""

from collections.abc import Callable
from functools import cache, partial

import cv2
import numpy as np
import scipy.sparse
from PIL import Image

from cascaded_diffusion.data.records import CorruptRecord
from cascaded_diffusion.resize_weights import area_weights, bilinear_weights

# The loader starts the threads.
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


def _by_weights(
    image: np.ndarray, resolution: int, weights: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    height, width, channels = image.shape
    tall = weights(height, resolution) @ image.reshape(height, width * channels)
    tall = tall.reshape(resolution, width, channels)
    return np.tensordot(weights(width, resolution), tall, axes=(1, 1)).transpose(1, 0, 2)


@cache
def _sparse_area_weights(size_in: int, size_out: int) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array(area_weights(size_in, size_out))


def area_resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """Area averages (`resize_weights`, eq. 1): float32 [H, W, C] -> [resolution, resolution, C].

    Equal to TensorFlow's `area` for any sizes, enlarging included.
    """
    height, width = image.shape[:2]
    if min(height, width) >= resolution:
        # The same sums in half the time: a sparse product over rows, which adds whole rows of
        # pixels at once; then, on few rows, cv2 over columns, which drops a last axis of one.
        rows = _sparse_area_weights(height, resolution) @ image.reshape(height, -1)
        rows = rows.reshape(resolution, width, image.shape[2])
        small = cv2.resize(rows, (resolution, resolution), interpolation=cv2.INTER_AREA)
        return small.reshape(resolution, resolution, image.shape[2])
    return _by_weights(image, resolution, area_weights)


RESIZES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "area": area_resize,
    "bilinear": partial(_by_weights, weights=bilinear_weights),  # `resize_weights`, eq. 2
}


def adm_resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [resolution, resolution, C], as guided-diffusion has it.

    Dhariwal & Nichol 2021, `center_crop_arr` of their code; every step is rounded.
    """
    picture = Image.fromarray(image if image.shape[2] > 1 else image[..., 0])
    while min(picture.size) >= 2 * resolution:
        half = (picture.size[0] // 2, picture.size[1] // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    size = (round(picture.size[0] * scale), round(picture.size[1] * scale))
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    pixels = pixels.reshape(*pixels.shape[:2], image.shape[2])
    top, left = ((n - resolution) // 2 for n in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + resolution, left : left + resolution])


def cropped_and_resized(image: np.ndarray, resolution: int, crop: str, method: str) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [resolution, resolution, C] by names of crop and resizing."""
    if method == "adm":
        CROPS[crop](image)  # refuses what is no square where none is to be made
        return adm_resize(image, resolution)
    return resize_uint8(CROPS[crop](image), resolution, method)


def resize_uint8(image: np.ndarray, resolution: int, method: str) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [resolution, resolution, C]: computed in float, rounded once."""
    if image.shape[:2] == (resolution, resolution):
        return np.ascontiguousarray(image)
    # Weights are not negative and add up to one, so averages stay within 0 and 255.
    return np.rint(RESIZES[method](image.astype(np.float32), resolution)).astype(np.uint8)


def coins(seed: int, positions: np.ndarray) -> np.ndarray:
    """A fair coin for each position in the stream: bool [n], a function of (seed, position).

    Applies the finalizer of SplitMix64 (Steele, Lea, Flood, 2014) to both in turn.
    """
    with np.errstate(over="ignore"):
        mixed = _mixed(np.asarray([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        return (_mixed(mixed ^ positions.astype(np.uint64)) >> np.uint64(63)).astype(bool)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def flip(batch: dict[str, np.ndarray], chosen: np.ndarray) -> None:
    """Mirrors the `chosen` examples, bool [b], in all images [b, H, W, C] of a batch, in place."""
    for images in batch.values():
        if images.ndim == 4:
            images[chosen] = images[chosen][:, :, ::-1]
