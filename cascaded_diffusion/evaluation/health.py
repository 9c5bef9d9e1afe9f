r"""Measures of a super-resolution stage's health besides distances between features.

(1)  PSNR = 10 log10(255^2 / MSE) of the output, shrunk by area averages, against the low-res
     input before its damage. An enlargement should keep its input, the less so the stronger the
     conditioning augmentation is.
(2)  The drift of a channel's mean and standard deviation from real images, in grey levels. A
     colour shift is the usual fault of eps-prediction at high resolution.
"""

from collections.abc import Sequence

import numpy as np

from cascaded_diffusion.cascade.pixels import area_downsample, float_from_uint8
from cascaded_diffusion.evaluation.metrics.pixel_statistics import PixelStatistics
from cascaded_diffusion.evaluation.samples.sample_sources import LevelSource
from cascaded_diffusion.types import Params


def psnr(mse: float) -> float:
    """Eq. (1) in dB of a mean squared error in squared grey levels."""
    # Stored images are rounded, so an error below the variance of rounding means nothing. An image
    # that is met exactly therefore has a finite PSNR of 58.9 dB.
    return float(10 * np.log10(255.0**2 / max(mse, 1 / 12)))


def low_res_errors(images: np.ndarray, low_res: np.ndarray) -> np.ndarray:
    """[n] float64: the mean squared error, in squared grey levels, of each image after shrinking.

    Images are uint8 [n, H, W, C], low-res inputs uint8 [n, h, w, C].
    """
    shrunk = np.asarray(area_downsample(float_from_uint8(images), low_res.shape[1]), np.float64)
    difference = (shrunk + 1) * 127.5 - low_res.astype(np.float64)
    return np.square(difference).mean((1, 2, 3))


def drift(samples: PixelStatistics, real: PixelStatistics) -> dict[str, list[float]]:
    """Eq. (2), samples minus real, per channel."""
    return {
        "channel_mean_drift": (samples.mean - real.mean).tolist(),
        "channel_std_drift": (samples.std - real.std).tolist(),
    }


def response(
    source: LevelSource, params: Params, aug_levels: Sequence[float]
) -> tuple[dict[str, list[float]], list[np.ndarray]]:
    """How a stage responds to the level of its conditioning augmentation, the lowest level first.

    A network that ignores its level keeps equally much of the input at all of them: `psnr_low_res`
    is eq. (1) at each, `change` the mean absolute difference from the first level's images in grey
    levels. Returns these numbers, and the images uint8 [n, H, W, C] of each level.
    """
    images = [source.make(params, level) for level in aug_levels]
    numbers = {
        "aug_levels": list(aug_levels),
        "psnr_low_res": [psnr(low_res_errors(x, source.low_res).mean()) for x in images],
        "change": [float(np.abs(x.astype(np.float64) - images[0]).mean()) for x in images],
    }
    return numbers, images
