r"""What tells whether a super-resolution stage does its work, besides distances of features.

(1)  PSNR = 10 log10(255^2 / MSE): of the output, shrunk by area averages, against the
     low-res input before its damage. An enlargement keeps what it was given; how much of
     it, falls with the strength of conditioning augmentation.
(2)  drift of a channel's mean and standard deviation, in grey levels, from real images:
     colour shift, the usual fault of eps-prediction at high resolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.cascade.resize import area_downsample
from cascaded_diffusion.evaluation.reference import PixelStatistics
from cascaded_diffusion.evaluation.samples.sample_sources import LevelSource
from cascaded_diffusion.types import Params

# Stored images are rounded: an error of less than rounding's own variance says nothing,
# and an image that is met exactly has a finite PSNR, of 58.9 dB.
_LEAST_MSE = 1 / 12


def psnr(mse: np.ndarray | float) -> np.ndarray:
    """Eq. (1), dB, of mean squared errors in grey levels squared."""
    return 10 * np.log10(255.0**2 / np.maximum(mse, _LEAST_MSE))


def low_res_errors(images: np.ndarray, low_res: np.ndarray) -> np.ndarray:
    """The mean squared error of each image, shrunk, against its low-res input.

    Args:
      images: uint8 [n, H, W, C].
      low_res: uint8 [n, h, w, C].

    Returns:
      [n] float64, grey levels squared.
    """
    shrunk = np.asarray(area_downsample(float_from_uint8(images), low_res.shape[1]), np.float64)
    difference = (shrunk + 1) * 127.5 - low_res.astype(np.float64)
    return np.square(difference).mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class LowResAgreement:
    """How well enlargements keep their low-res input.

    Attributes:
      psnr: of all images together, dB.
      worst_psnr: of the worst image, dB.
    """

    psnr: float
    worst_psnr: float

    @classmethod
    def of(cls, errors: np.ndarray) -> LowResAgreement:
        """From `low_res_errors` of all images."""
        return cls(float(psnr(errors.mean())), float(psnr(errors.max())))


def drift(samples: PixelStatistics, real: PixelStatistics) -> dict[str, list[float]]:
    """Eq. (2), samples minus real, per channel."""
    return {
        "channel_mean_drift": (samples.mean - real.mean).tolist(),
        "channel_std_drift": (samples.std - real.std).tolist(),
    }


def response(source: LevelSource, params: Params, aug_levels: Sequence[float]) -> dict[str, Any]:
    """How a stage responds to the level of its conditioning augmentation.

    A network that ignores its level keeps as much of the input at all of them.

    Args:
      source: of enlargements of the same images with the same noise.
      params: the stage's parameters.
      aug_levels: the levels to try, the lowest first.

    Returns:
      `aug_levels`; `psnr_low_res`, eq. (1) at each; `change`, the mean absolute
      difference from the first level's images in grey levels.
    """
    psnrs, changes, first = [], [], None
    for level in aug_levels:
        images = source.make(params, level)
        first = images if first is None else first
        psnrs.append(float(psnr(low_res_errors(images, source.low_res).mean())))
        changes.append(float(np.abs(images.astype(np.float64) - first).mean()))
    return {"aug_levels": list(aug_levels), "psnr_low_res": psnrs, "change": changes}
