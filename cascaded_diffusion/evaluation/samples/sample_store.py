"""Samples on disk while they are made, so that a killed job can resume.

    FOLDER/identity.json      everything that the samples depend on
    FOLDER/000000.npz, ...    one file per batch, whole or missing

A batch is made in one piece and appears under its name by a rename. A resumed job makes the
missing batches. Since batches always have the same bounds, every sample exists exactly once and
has the value that an uninterrupted job gives it.
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

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import write_npz_whole, write_whole

# The arrays of a batch: "images" uint8 [b, H, W, C], "labels" int64 [b] and, for enlargements,
# "low_res" uint8 [b, h, w, C].
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """The unfinished store of a command with other settings.

    Attributes:
      folder: the store.
      settings: the store's identity.
      num_samples: the number of samples in it.
      num_bytes: its size on disk.
    """

    folder: pathlib.Path
    settings: Mapping[str, Any]
    num_samples: int
    num_bytes: int


class DamagedBatchError(Exception):
    """A batch was damaged on disk. It is removed, and the next `fill` makes it again."""


class SampleStore:
    """The batches of one set of samples.

    Args:
      parent: folder of stores; this one's folder is named by the digest of its identity.
      identity: everything that the samples depend on, for JSON.
      num_samples: number of samples in all.
      batch_size: number of samples in a batch.

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
        """Number of batches in all."""
        return -(-self.num_samples // self.batch_size)

    def rows(self, batch: int) -> np.ndarray:
        """[b]: the sample indices of a batch."""
        start = batch * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.num_samples))

    def missing(self) -> list[int]:
        """The numbers of the batches that do not exist yet."""
        return [i for i in range(self.num_batches) if not self._path(i).exists()]

    def write(self, batch: int, arrays: Arrays) -> None:
        """Stores a batch.

        Raises:
          ValueError: the number of samples is wrong.
          UserError: the folder was moved or removed meanwhile. It is not made again.
        """
        if not self._folder.is_dir():
            raise UserError(
                f"{self._folder}: was moved or removed while samples were written to it; bring it"
                " back and run the same command again"
            )
        for name, array in arrays.items():
            if len(array) != len(self.rows(batch)):
                raise ValueError(
                    f"batch {batch}: {len(array)} {name}, expected {len(self.rows(batch))}"
                )
        write_npz_whole(self._path(batch), arrays)

    def read(self, batch: int) -> Arrays | None:
        """A batch; None if its file is damaged, which is then removed."""
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

    def note_failure(self) -> None:
        """Tells the other processes that this one gives up."""
        with contextlib.suppress(OSError):  # on a full disk, for one; they notice its absence
            (self._folder / "failed").touch()

    def has_failed(self) -> bool:
        """Whether a process gave up."""
        return (self._folder / "failed").exists()

    def clear_failure(self) -> None:
        """Forgets the failure of an earlier job."""
        (self._folder / "failed").unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the store."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, batch: int) -> pathlib.Path:
        return self._folder / f"{batch:06d}.npz"
