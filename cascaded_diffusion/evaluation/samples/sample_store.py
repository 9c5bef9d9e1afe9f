"""Samples on disk while they are made, so that a killed job can resume.

    FOLDER/identity.json      everything that the samples depend on
    FOLDER/000000.npz, ...    one file per batch, whole or missing

A batch appears under its name by a rename, and a resumed job makes the missing ones. Since batches
always have the same bounds, every sample exists once, with the value of an uninterrupted job.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import remove_tree, write_npz_whole, write_whole

# The arrays of a batch: "images" uint8 [b, H, W, C], "labels" int64 [b] and, for enlargements,
# "low_res" uint8 [b, h, w, C].
Arrays = dict[str, np.ndarray]


class Unfinished(NamedTuple):
    """The unfinished store of a command with other settings: its identity and what it holds."""

    folder: AnyPath
    settings: Record
    num_samples: int
    num_bytes: int


class DamagedBatchError(Exception):
    """A batch was damaged on disk. It is removed, and the next `fill` makes it again."""


class SampleStore:
    """The batches of one set of samples.

    Its folder in `parent` is named by the digest of its identity, which is everything that the
    samples depend on, for JSON; `number` is a hash of it, too. By the file `failed` a process tells
    the others that it gives up.
    """

    def __init__(self, parent: AnyPath, identity: Record, *, num_samples: int, batch_size: int):
        text = _text(identity, num_samples, batch_size)
        self._folder = parent / _name(text)
        self.number = int(self._folder.name[:7], 16)
        self.num_samples, self.batch_size = num_samples, batch_size
        self.num_batches = -(-num_samples // batch_size)
        self.failed, about = self._folder / "failed", self._folder / "identity.json"
        if not about.exists():
            write_whole(about, text + b"\n")

    @staticmethod
    def discard(parent: AnyPath, identity: Record, *, num_samples: int, batch_size: int) -> None:
        """Deletes what a store has left that nobody needs, if there is such a store."""
        name = _name(_text(identity, num_samples, batch_size))
        remove_tree(parent / name)

    def rows(self, batch: int) -> np.ndarray:
        """[b]: the sample indices of a batch."""
        start = batch * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.num_samples))

    def missing(self) -> list[int]:
        """The numbers of the batches that do not exist yet."""
        there = {path.name for path in self._folder.iterdir()} if self._folder.is_dir() else set()
        return [i for i in range(self.num_batches) if self._path(i).name not in there]

    def write(self, batch: int, arrays: Arrays) -> None:
        """Stores a batch. Raises ValueError for a wrong number of samples.

        If the folder was moved or removed meanwhile, it is not made again: raises OSError.
        """
        if not self._folder.is_dir():
            raise OSError(
                f"{self._folder}: was moved or removed while samples were written to it; bring it"
                " back and run the same command again"
            )
        expected = len(self.rows(batch))
        for name, array in arrays.items():
            if len(array) != expected:
                raise ValueError(f"batch {batch}: {len(array)} {name}, expected {expected}")
        write_npz_whole(self._path(batch), arrays)

    def batches(self) -> Iterator[Arrays]:
        """All batches in order. Raises DamagedBatchError if one is missing or damaged."""
        for path in map(self._path, range(self.num_batches)):
            try:
                # Checksums are compared: a bit that has flipped is noticed.
                arrays = read_arrays(path)
            except (OSError, ValueError) as e:
                path.unlink(missing_ok=True)
                raise DamagedBatchError(
                    f"{path}: missing or damaged; run the same command again"
                ) from e
            yield arrays

    def first(self, count: int) -> Arrays:
        """The first `count` samples, or as many as there are. Raises like `batches`."""
        found = list(itertools.islice(self.batches(), -(-count // self.batch_size)))
        return {name: np.concatenate([a[name] for a in found])[:count] for name in found[0]}

    def others(self) -> list[Unfinished]:
        """The stores beside this one that hold samples with another identity."""
        found = []
        for path in sorted(self._folder.parent.glob("*/identity.json")):
            try:
                settings = json.loads(path.read_text())
                files = [f for f in path.parent.iterdir() if f.suffix == ".npz"]
                made = min(len(files) * settings["batch_size"], settings["num_samples"])
                size = sum(f.stat().st_size for f in files)
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue  # it is not ours, or is just being removed
            if path.parent != self._folder and files:
                found.append(Unfinished(path.parent, settings, made, size))
        return found

    def remove(self) -> None:
        """Deletes the store."""
        remove_tree(self._folder)

    def _path(self, batch: int) -> AnyPath:
        return self._folder / f"{batch:06d}.npz"


def _text(identity: Record, num_samples: int, batch_size: int) -> bytes:
    whole = {**identity, "num_samples": num_samples, "batch_size": batch_size}
    return json.dumps(whole, sort_keys=True).encode()


def _name(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
