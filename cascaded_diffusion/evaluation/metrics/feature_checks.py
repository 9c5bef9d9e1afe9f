"""What every metric asks of the features that it is given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def checked_features(features: npt.ArrayLike, *, name: str, at_least: int = 0) -> np.ndarray:
    """`features` as an array [n, F], dtype unchanged.

    Args:
      features: finite numbers, one row per image.
      name: whose features they are, for the message.
      at_least: the fewest rows the metric is defined for.

    Raises:
      ValueError: another shape, too few rows, or a number that is not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(
            f"{name} have shape {list(features.shape)}, expected [n, F]: one row per image"
        )
    if len(features) < at_least:
        raise ValueError(f"at least {at_least} {name} are needed, got {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} are not finite: the images or the extractor are broken")
    return features


def checked_pair(
    real: npt.ArrayLike, generated: npt.ArrayLike, *, at_least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, F] of real and [m, F] of generated images, dtypes unchanged.

    Raises:
      ValueError: either is not what `checked_features` asks for, or their F differ.
    """
    real = checked_features(real, name="features of real images", at_least=at_least)
    generated = checked_features(generated, name="features of generated images", at_least=at_least)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of real images have size {real.shape[1]}, of generated images "
            f"{generated.shape[1]}: they come from different extractors"
        )
    return real, generated
