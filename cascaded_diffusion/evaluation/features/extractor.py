"""What metrics are computed from: the outputs of a feature extractor, and its identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Features:
    """Outputs of an extractor for n images.

    Attributes:
      pooled: [n, F] float32, what Fréchet distance, KID, precision and recall use.
      logits: [n, K] float32 of an image's class, what the inception score uses: its softmax;
        None where the extractor tells no classes.
      spatial: [n, S] float32, what sFID uses; None where the extractor has none.
    """

    pooled: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: slice | np.ndarray) -> Features:
        return Features(
            self.pooled[rows],
            *(None if x is None else x[rows] for x in (self.logits, self.spatial)),
        )


def concatenated(parts: Sequence[Features]) -> Features:
    """The features of several batches, in order."""
    found = ([getattr(p, field.name) for p in parts] for field in dataclasses.fields(Features))
    return Features(*(None if x[0] is None else np.concatenate(x) for x in found))


class FeatureExtractor(Protocol):
    """uint8 images [n, H, W, C] of any n -> `Features`.

    Attributes:
      name: "inception", or of another network ("classifier"): part of metric names.
      identity: network, weights (digest) and the way of resizing, in one string.
        Two extractors with the same identity give the same features.
    """

    name: str
    identity: str

    def __call__(self, images: np.ndarray) -> Features: ...
