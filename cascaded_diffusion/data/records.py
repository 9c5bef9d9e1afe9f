"""The records of a data set on their way to the model, and the protocols of what gives them.

    RawSource --RawExample--> Reader --Sized--> Source --Record--> loader, evaluation

A raw source gives images as they are stored, a reader images of one size, and a source does
the same in spite of corrupt records. Records are known by their index in the data set.
"""

from __future__ import annotations

from typing import NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

from cascaded_diffusion.config.schema import DataConfig
from cascaded_diffusion.data.corruption import CorruptionGuard
from cascaded_diffusion.errors import UserError

# How messages name the command that prepares data, which this package does not know.
PREPARE = "`python -m cascaded_diffusion.prepare --config=...` of this config"


class DataMissing(UserError):
    """The images are not where the config says, or not prepared as it says."""


class RawExample(NamedTuple):
    """`image`: the bytes of an image file, or uint8 [H, W, C]. `label`: 0 without classes."""

    image: bytes | np.ndarray
    label: int


class Sized(TypedDict):
    """`image` uint8 [H, W, C], `label` int32 scalar, and `low_res` [h, w, C] where it is stored."""

    image: np.ndarray
    label: np.int32
    low_res: NotRequired[np.ndarray]


class Record(Sized):
    """An example with its `index`. `skipped` is the corrupt record that it replaces, or -1."""

    index: np.int64
    skipped: np.int64


class Identified(Protocol):
    """What raw sources and readers have in common.

    Attributes:
      class_names: in order of label; empty for data without classes.
      identity: what the data set is, independent of its path: a digest of names and sizes, or
        of the contents of data that is in memory anyway.
      times: a digest of the modification times of its files, in whole seconds; "" where
        `identity` covers the contents.
    """

    class_names: tuple[str, ...]
    identity: str
    times: str

    def __len__(self) -> int: ...

    def describe(self, index: int) -> str:
        """Where a record is, for people."""
        ...

    def class_counts(self) -> np.ndarray | None:
        """int [K]: the number of examples per class, if known without reading images."""
        ...

    def content_sample(self) -> str:
        """`digests.sample_digest`; "" where `identity` covers the contents."""
        ...


class RawSource(Identified, Protocol):
    """A data set as it is stored, with random access.

    Attributes:
      fixed_shape: (H, W, C) if all images have it, else None.
    """

    fixed_shape: tuple[int, int, int] | None

    def read(self, index: int) -> RawExample:
        """Raises CorruptRecord for what cannot be read."""
        ...


class Reader(Identified, Protocol):
    """Random access to images of one size.

    Attributes:
      image_shape: (H, W, C).
      low_res_shape: (h, w, C) where low-res images are stored, else None.
    """

    image_shape: tuple[int, int, int]
    low_res_shape: tuple[int, int, int] | None

    def read(self, index: int) -> Sized:
        """Raises CorruptRecord for what cannot be read."""
        ...


class Source:
    """What the loader and evaluation read: a reader whose corrupt records are dealt with."""

    def __init__(self, reader: Reader, config: DataConfig):
        self.reader, self.guard = reader, CorruptionGuard(config, len(reader))
        self.image_shape, self.low_res_shape = reader.image_shape, reader.low_res_shape
        self.class_names = reader.class_names
        self.identity, self.times = reader.identity, reader.times

    @property
    def num_classes(self) -> int:
        """0 for data without classes."""
        return len(self.class_names)

    def content_sample(self) -> str:
        """The reader's. Prepared data has the sample that was taken when it was prepared."""
        return self.reader.content_sample()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Record:
        """Raises UserError for a corrupt record, if the policy says so."""
        index = int(index)
        at, record = self.guard.first_good(index, self.reader.read, self.reader.describe)
        skipped = -1 if at == index else index
        return {**record, "index": np.int64(at), "skipped": np.int64(skipped)}

    def __repr__(self) -> str:
        # grain puts this into its error messages.
        return f"Source({self.identity})"
