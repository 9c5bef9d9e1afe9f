"""Checks of the features that metrics are computed from."""

import numpy as np
import numpy.typing as npt


def checked_features(features: npt.ArrayLike, *, name: str, at_least: int = 0) -> np.ndarray:
    """`features` as an array [n, F], dtype unchanged; `name` is for messages.

    Raises ValueError if the shape is another, a number is not finite, or there are fewer than
    `at_least` rows, for which the metric is not defined.
    """
    features = np.asarray(features)
    shape = list(features.shape)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{name} have shape {shape}, expected [n, F]: one row per image")
    if len(features) < at_least:
        raise ValueError(f"at least {at_least} {name} are needed, got {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} are not finite: the images or the extractor are broken")
    return features


def checked_pair(
    real: npt.ArrayLike, generated: npt.ArrayLike, *, at_least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both as by `checked_features`. Raises ValueError if their sizes F differ."""
    real = checked_features(real, name="features of real images", at_least=at_least)
    generated = checked_features(generated, name="features of generated images", at_least=at_least)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of real images have size {real.shape[1]}, of generated images "
            f"{generated.shape[1]}: they come from different extractors"
        )
    return real, generated
