"""Samples on disk while they are made, so that a job that is killed goes on where it was.

    FOLDER/identity.json      all that the samples are a function of
    FOLDER/000000.npz, ...    one file per batch, whole or not there

A batch is made in one piece and appears under its name by a rename. A job that comes
back makes the batches that are missing: each sample exists exactly once, and has the
value that an unbroken job gives it, since batches begin where they always begin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import write_npz_whole, write_whole

# The arrays of a batch: "images" uint8 [b, H, W, C], "labels" int64 [b] and, of an
# enlargement, "low_res" uint8 [b, h, w, C].
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """What a command with other settings left of its samples.

    Attributes:
      folder: the store.
      settings: what the store says of itself: its identity.
      num_samples: how many there are.
      num_bytes: on disk.
    """

    folder: pathlib.Path
    settings: Mapping[str, Any]
    num_samples: int
    num_bytes: int


class DamagedBatchError(Exception):
    """A batch was damaged on disk; it is removed, and the next `fill` makes it again."""


class SampleStore:
    """The batches of one set of samples.

    Args:
      parent: folder of stores; this one's is named by the identity's digest.
      identity: all that the samples are a function of, for JSON.
      num_samples: how many there are in all.
      batch_size: how many to a batch.

    Attributes:
      number: a hash of the identity.
    """

    def __init__(
        self,
        parent: pathlib.Path,
        identity: Mapping[str, Any],
        *,
        num_samples: int,
        batch_size: int,
    ):
        whole = {**identity, "num_samples": num_samples, "batch_size": batch_size}
        text = json.dumps(whole, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._folder, self.number = parent / name, int(name[:7], 16)
        self.num_samples, self.batch_size = num_samples, batch_size
        if not (self._folder / "identity.json").exists():
            write_whole(self._folder / "identity.json", text.encode() + b"\n")

    @property
    def num_batches(self) -> int:
        """How many batches make the whole."""
        return -(-self.num_samples // self.batch_size)

    def rows(self, batch: int) -> np.ndarray:
        """The indices of the samples of a batch: [b]."""
        start = batch * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.num_samples))

    def missing(self) -> list[int]:
        """The batches that are still to be made."""
        return [i for i in range(self.num_batches) if not self._path(i).exists()]

    def write(self, batch: int, arrays: Arrays) -> None:
        """Keeps a batch.

        Raises:
          ValueError: it has another number of samples than it should.
        """
        for name, array in arrays.items():
            if len(array) != len(self.rows(batch)):
                raise ValueError(
                    f"batch {batch}: {len(array)} {name}, expected {len(self.rows(batch))}"
                )
        write_npz_whole(self._path(batch), arrays)

    def read(self, batch: int) -> Arrays | None:
        """A batch; None where its file has been damaged, which then is removed."""
        try:
            # Checksums are compared: a bit that has flipped is noticed.
            return read_arrays(self._path(batch))
        except (OSError, ValueError):
            self._path(batch).unlink(missing_ok=True)
            return None

    def batches(self) -> Iterator[Arrays]:
        """All batches in order.

        Raises:
          DamagedBatchError: one is missing or damaged.
        """
        for i in range(self.num_batches):
            arrays = self.read(i)
            if arrays is None:
                raise DamagedBatchError(
                    f"{self._path(i)}: missing or damaged; run the same command again"
                )
            yield arrays

    def first(self, count: int) -> Arrays:
        """The first `count` samples, or as many as there are.

        Raises:
          DamagedBatchError: a batch is missing or damaged.
        """
        found: list[Arrays] = []
        for arrays in self.batches():
            found.append(arrays)
            if sum(len(a["labels"]) for a in found) >= count:
                break
        return {name: np.concatenate([a[name] for a in found])[:count] for name in found[0]}

    def others(self) -> list[Unfinished]:
        """The stores beside this one, of samples with another identity."""
        found = []
        for path in sorted(self._folder.parent.glob("*/identity.json")):
            try:
                settings = json.loads(path.read_text())
                files = [f for f in path.parent.iterdir() if f.suffix == ".npz"]
                made = min(len(files) * settings["batch_size"], settings["num_samples"])
                size = sum(f.stat().st_size for f in files)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                RecursionError,
            ):  # not ours, or just being removed
                continue
            if path.parent != self._folder and files:
                found.append(Unfinished(path.parent, settings, made, size))
        return found

    def note_failure(self) -> None:
        """Tells the other processes that this one gives up."""
        with contextlib.suppress(OSError):  # a full disk, say; they find out when it is gone
            (self._folder / "failed").touch()

    def has_failed(self) -> bool:
        """Whether a process gave up."""
        return (self._folder / "failed").exists()

    def clear_failure(self) -> None:
        """Forgets that one did, in an earlier job."""
        (self._folder / "failed").unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the store, when what was wanted of the samples is known."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, batch: int) -> pathlib.Path:
        return self._folder / f"{batch:06d}.npz"
