"""Feature extractors and their outputs, from which metrics are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Features:
    """Outputs of an extractor for n images.

    Attributes:
      pooled: [n, F] float32, for the Fréchet distance, KID, precision and recall.
      logits: [n, K] float32 over classes, for the inception score; None if it knows no classes.
      spatial: [n, S] float32, for sFID; None if the extractor has none.
    """

    pooled: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


def extract_in_batches(
    images: np.ndarray, size: int, extract: Callable[[np.ndarray], Iterable[np.ndarray]]
) -> Features:
    """The features of images [n, H, W, C], of which `extract` takes exactly `size` at a time.

    The last batch is filled up to one shape, and the surplus is dropped.
    """
    parts = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
        parts.append([x[: len(batch)] for x in extract(padded)])
    return Features(*(np.concatenate(outputs) for outputs in zip(*parts, strict=True)))


class FeatureExtractor(Protocol):
    """uint8 images [n, H, W, C] of any n -> `Features`.

    Attributes:
      name: "inception" or another network's name ("classifier"): part of metric names.
      identity: network, weights (digest) and way of resizing in one string. Two extractors with
        the same identity give the same features.
    """

    name: str
    identity: str

    def __call__(self, images: np.ndarray) -> Features: ...
