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
      logits: [n, K] float32, what the inception score uses: its softmax.
      spatial: [n, S] float32, what sFID uses; None where the extractor has none.
    """

    pooled: np.ndarray
    logits: np.ndarray
    spatial: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: slice | np.ndarray) -> Features:
        spatial = None if self.spatial is None else self.spatial[rows]
        return Features(self.pooled[rows], self.logits[rows], spatial)


def concatenated(parts: Sequence[Features]) -> Features:
    """The features of several batches, in order."""
    spatial = [p.spatial for p in parts if p.spatial is not None]
    return Features(
        pooled=np.concatenate([p.pooled for p in parts]),
        logits=np.concatenate([p.logits for p in parts]),
        spatial=np.concatenate(spatial) if spatial else None,
    )


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
