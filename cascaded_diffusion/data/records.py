"""The records of a data set on their way to the model, what gives them, and their digests.

    RawSource --RawExample--> Source --Record--> loader, evaluation

A raw source gives images as they are stored, a source at one size and in spite of corrupt
records. Records are known by their index in the data set.

Three digests tell which images a data set consists of, each more certain and more expensive
than the one before: its `identity`, the modification `times` of its files, and a digest of some
contents (`content_sample`) or of all of them (`read_into`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict

import numpy as np

from cascaded_diffusion.config.schema import MAX_CORRUPT_FRACTION, DataConfig
from cascaded_diffusion.errors import UserError

if TYPE_CHECKING:
    from cascaded_diffusion.data.record_files import Shards

# How messages name the command that prepares data, which this package does not know.
PREPARE = "`python -m cascaded_diffusion.prepare --config=...` of this config"
_SAMPLE = 256
# Threads share a guard. The lock is none of its attributes, since guards are pickled.
_LOCK = threading.Lock()


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


class CorruptRecord(Exception):
    """A record is damaged, or is none at all. The message says what is wrong with it."""


class CorruptionGuard:
    """Applies a config's policy about corrupt records to one data set, within one process."""

    def __init__(self, config: DataConfig, num_records: int):
        self._skips, self._cap = config.on_corrupt == "skip", config.max_corrupt_fraction
        if self._cap is None:
            self._cap = MAX_CORRUPT_FRACTION
        self._num_records = num_records
        self._found: set[int] = set()
        self._too_many: str | None = None

    @property
    def num_found(self) -> int:
        """How many corrupt records are known, each counted once."""
        return len(self._found)

    def note(self, index: int, where: str, problem: str, *, say: bool = True) -> None:
        """Counts a corrupt record, once, and prints `where` it is and its `problem` if `say`.

        Raises UserError if the policy is to fail, or too many records are corrupt.
        """
        if not self._skips:
            # What else to set if even one corrupt record would be too many.
            cap = ""
            if self._cap * self._num_records < 1:
                enough = max(0.01, math.ceil(100 / self._num_records) / 100)
                cap = (
                    f" --config.data.max_corrupt_fraction={enough:g} (at {self._cap:g}, one of"
                    f" {self._num_records} is too many)"
                )
            raise UserError(
                f"{where}: {problem}; replace it, or train without such records by"
                f" --config.data.on_corrupt=skip{cap}"
            )
        with _LOCK:
            if index in self._found:
                return
            self._found.add(index)
            found = len(self._found)
            # Reading threads may find more of them before the first error has arrived. They
            # all raise that error.
            if found > self._cap * self._num_records and self._too_many is None:
                self._too_many = (
                    f"{found} of {self._num_records} records are corrupt, the last"
                    f" {where} ({problem}): expected at most"
                    f" config.data.max_corrupt_fraction = {self._cap:g} of them"
                )
        if say:
            print(f"skipped: {where}: {problem}", file=sys.stderr, flush=True)
        if self._too_many is not None:
            raise UserError(self._too_many)


class DataSet:
    """What raw sources and sources have in common."""

    class_names: tuple[str, ...] = ()  # in order of label; empty for data without classes
    # What the data set is, independent of its path: a digest of names and sizes, or of the
    # contents of data that is in memory anyway.
    identity: str
    # A digest of its files' modification times, in whole seconds; "" where `identity` covers the
    # contents.
    times: str = ""
    class_counts: np.ndarray | None = None  # examples, int [K]; None if only reading tells
    origin: DataSet | Shards  # what is read from, which knows how many records there are and where

    def __len__(self) -> int:
        return len(self.origin)

    def __repr__(self) -> str:
        # grain puts this into its error messages, where the pixels do not belong.
        return f"{type(self).__name__}({self.identity})"

    def describe(self, index: int) -> str:
        """Where a record is, for people."""
        return self.origin.describe(index)

    def content_sample(self) -> str:
        """SHA-256 of at most 256 images, or "" where `identity` covers the contents."""
        return self.origin.content_sample()


class RawSource(DataSet):
    """A data set as it is stored, with random access.

    `fixed_shape` is (H, W, C) if all images have it, else None.
    """

    fixed_shape: tuple[int, int, int] | None = None

    def read(self, index: int) -> RawExample:
        """Raises CorruptRecord for what cannot be read."""
        raise NotImplementedError

    def content_sample(self) -> str:
        """A digest of images spread evenly over the data set.

        Labels are left out, since a model without classes does not see them.
        """
        if not self.times:
            return ""
        contents, count = hashlib.sha256(), min(_SAMPLE, len(self))
        for i in range(count):
            with contextlib.suppress(CorruptRecord):
                read_into(contents, self, i * len(self) // count, labels=False)
        return contents.hexdigest()


class Source(DataSet):
    """What the loader and evaluation read: images of one size, with corrupt ones dealt with.

    Images are (H, W, C) as `image_shape`, stored low-res ones as `low_res_shape`, which is None
    without. The `guard` applies the config's policy about corrupt records.
    """

    def __init__(
        self,
        config: DataConfig,
        num_records: int,
        image_shape: tuple[int, int, int],
        low_res_size: int | None,
    ):
        self.guard, self.image_shape = CorruptionGuard(config, num_records), image_shape
        self.low_res_shape = low_res_size and (low_res_size, low_res_size, image_shape[2])

    def read(self, index: int) -> Sized:
        """Raises CorruptRecord for what cannot be read."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """0 for data without classes."""
        return len(self.class_names)

    def __getitem__(self, index: int) -> Record:
        """A record or, if it is corrupt, the next good one.

        Which record replaces which is a function of the data alone, so that batches are the same
        for any number of processes and threads, and for a run that resumes. Raises UserError as
        `CorruptionGuard.note` does, or if all records are corrupt.
        """
        for at in ((index + offset) % len(self) for offset in range(len(self))):
            try:
                record = self.read(at)
            except CorruptRecord as e:
                self.guard.note(at, self.describe(at), str(e))
            else:
                skipped = -1 if at == index else index
                return {**record, "index": np.int64(at), "skipped": np.int64(skipped)}
        raise UserError(f"none of {len(self)} records can be read")


def read_into(
    digest: hashlib._Hash, raw: RawSource, index: int, *, labels: bool = True
) -> RawExample:
    """Reads a record and adds its image as it is stored, and its label if `labels`, to a SHA-256.

    A record that cannot be read is added as such, and raises CorruptRecord.
    """
    try:
        image, label = example = raw.read(index)
    except CorruptRecord:
        digest.update(b"unreadable\n")
        raise
    if isinstance(image, np.ndarray):
        digest.update(f"{image.shape}\n".encode())
        image = np.ascontiguousarray(image).tobytes()
    digest.update(f"{label if labels else ''} {len(image)}\n".encode())
    digest.update(image)
    return example


def digest_of_files(names: Iterable[bytes], numbers: Iterable[int]) -> str:
    """The first 12 digits of a SHA-256 over names and a number for each, such as its size."""
    digest = hashlib.sha256(b"\0".join(names))
    digest.update(b"\0\0")
    digest.update(np.fromiter(numbers, "<i8").tobytes())
    return digest.hexdigest()[:12]
