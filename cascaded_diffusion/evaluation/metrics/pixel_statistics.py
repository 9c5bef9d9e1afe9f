"""Mean and standard deviation of each colour channel, from sums that are streamed."""

import dataclasses
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class PixelStatistics:
    """Pixels per channel; sum and sum of squares of each channel [C], in grey levels 0 to 255."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> Self:
        """The sums of uint8 images [n, H, W, C]."""
        pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
        return cls(len(pixels), pixels.sum(0), np.square(pixels).sum(0))

    def __add__(self, other: Self) -> Self:
        return PixelStatistics(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    @property
    def mean(self) -> np.ndarray:
        """[C], grey levels."""
        return self.total / self.count

    @property
    def std(self) -> np.ndarray:
        """[C], grey levels."""
        return np.sqrt(np.maximum(self.squares / self.count - np.square(self.mean), 0.0))
