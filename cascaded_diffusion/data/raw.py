"""What every data set gives before anything is done to it: an encoded image and its label.

Which images a set is of is told by three things, each surer and dearer than the one before:
its `identity` (names and sizes, or the contents of what is in memory anyway), the `times` at
which its files were written, and a digest of some contents (`content_sample`) or of all
(`ContentDigest`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.splits import parse_split, part_of
from cascaded_diffusion.errors import UserError

_SAMPLE = 256
# How messages call the command that prepares data, where they do not know it.
PREPARE = "`python -m cascaded_diffusion.prepare --config=...` of this config"


class DataMissing(UserError):
    """The images are not where the config says, or not prepared as it says."""


def printable(text: str) -> str:
    """Names of files as one line of valid text: what cannot be printed is escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


class RawExample(NamedTuple):
    """`image`: the bytes of an image file, or uint8 [H, W, C]. `label`: 0 without classes."""

    image: bytes | np.ndarray
    label: int


class RawSource(Protocol):
    """A data set with random access. The index of a record is its identity.

    Attributes:
      class_names: in order of label; empty for data without classes.
      fixed_shape: (H, W, C) where all images have it, else None.
      identity: what the set is, wherever it lies: of names and sizes, or of the contents.
      times: a digest of when its files were written, in whole seconds; "" where the
        contents are in the identity.
    """

    class_names: tuple[str, ...]
    fixed_shape: tuple[int, int, int] | None
    identity: str
    times: str

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

    def content_sample(self) -> str:
        """`sample_digest`; "" where the contents are in the identity."""
        ...


class ContentDigest:
    """SHA-256 over images as they are stored, and their labels if asked, while they are read."""

    def __init__(self, *, labels: bool):
        self._digest, self._labels = hashlib.sha256(), labels

    def read(self, raw: RawSource, index: int) -> RawExample:
        """Reads a record and adds it. Of one that cannot be read, that is what is added."""
        try:
            image, label = example = raw.read(index)
        except CorruptRecord:
            self._digest.update(b"unreadable\n")
            raise
        if isinstance(image, np.ndarray):
            self._digest.update(f"{image.shape}\n".encode())
            image = np.ascontiguousarray(image).tobytes()
        self._digest.update(f"{label if self._labels else ''} {len(image)}\n".encode())
        self._digest.update(image)
        return example

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def sample_digest(raw: RawSource) -> str:
    """A digest of at most 256 images, spread evenly over a set.

    Without their labels, which a model without classes does not see.
    """
    contents, count = ContentDigest(labels=False), min(_SAMPLE, len(raw))
    for i in range(count):
        with contextlib.suppress(CorruptRecord):
            contents.read(raw, i * len(raw) // count)
    return contents.hexdigest()


def digest_of_files(names: Iterable[bytes], numbers: Iterable[int]) -> str:
    """The first 12 digits of a SHA-256 over names and a number for each, its size for example."""
    digest = hashlib.sha256(b"\0".join(names))
    digest.update(b"\0\0")
    digest.update(np.fromiter(numbers, "<i8").tobytes())
    return digest.hexdigest()[:12]


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

    def known_labels(self) -> np.ndarray:
        return self.labels

    def content_sample(self) -> str:
        return ""

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
