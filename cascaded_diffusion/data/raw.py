"""What every data set gives before anything is done to it: an encoded image and its label."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import NamedTuple, Protocol

import numpy as np

from cascaded_diffusion.data.splits import parse_split, part_of


class RawExample(NamedTuple):
    """`image`: the bytes of an image file, or uint8 [H, W, C]. `label`: 0 without classes."""

    image: bytes | np.ndarray
    label: int


class RawSource(Protocol):
    """A data set with random access. The index of a record is its identity.

    Attributes:
      class_names: in order of label; empty for data without classes.
      fixed_shape: (H, W, C) where all images have it, else None.
      identity: what the set is, wherever it lies; other records, another identity.
    """

    class_names: tuple[str, ...]
    fixed_shape: tuple[int, int, int] | None
    identity: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawExample:
        """Raises CorruptRecord for what cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """A record's place, for people."""
        ...

    def known_labels(self) -> np.ndarray | None:
        """int32 [n], where that costs no reading of images; else None."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A data set that fits in memory.

    Attributes:
      images: uint8 [n, H, W, C].
      labels: int32 [n].
      class_names: in order of label.
      name: of the data set, for people.
      identity: see `RawSource`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    name: str = "array"
    identity: str = "array"

    @property
    def fixed_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> RawExample:
        return RawExample(self.images[index], int(self.labels[index]))

    def describe(self, index: int) -> str:
        return f"{self.name}, image {index}"

    def known_labels(self) -> np.ndarray:
        return self.labels

    def __repr__(self) -> str:
        # grain puts this into its error messages; the pixels do not belong there.
        return f"ArraySource({len(self)} images of {self.fixed_shape})"


def array_source(
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
) -> ArraySource:
    """The part of a split that its name asks for, as a source."""
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
