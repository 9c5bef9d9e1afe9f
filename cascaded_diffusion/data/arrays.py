"""Data sets that fit in memory."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from cascaded_diffusion.data.records import RawExample
from cascaded_diffusion.data.splits import parse_split, part_of


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A raw source of arrays.

    Attributes:
      images: uint8 [n, H, W, C].
      labels: int32 [n].
      class_names: in order of label.
      name: the name of the data set, for people.
      identity: see `records.Identified`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    name: str = "array"
    identity: str = "array"

    times = ""

    @property
    def fixed_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> RawExample:
        return RawExample(self.images[index], int(self.labels[index]))

    def describe(self, index: int) -> str:
        return f"{self.name}, image {index}"

    def class_counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.class_names))

    def content_sample(self) -> str:
        return ""

    def __repr__(self) -> str:
        # grain puts this into its error messages, where the pixels do not belong.
        return f"ArraySource({len(self)} images of {self.fixed_shape})"


def array_source(
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
) -> ArraySource:
    """A split, or the part of it that its name asks for."""
    _, part = parse_split(split)
    chosen = part_of((b"%d" % i for i in range(len(images))), part, split)
    if chosen is not None:
        images, labels = images[chosen], labels[chosen]
    digest = hashlib.sha256(np.ascontiguousarray(labels))
    digest.update(np.ascontiguousarray(images))
    return ArraySource(
        images,
        labels,
        class_names,
        name=f"{name}:{split}",
        identity=f"{name}:{split}:{len(images)} images:{digest.hexdigest()[:12]}",
    )
