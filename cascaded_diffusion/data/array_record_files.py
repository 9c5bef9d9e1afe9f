"""Data sets in several files, and ArrayRecord, one of their formats. Only home of array_record.

ArrayRecord has checksums of its own, but a truncated file may claim to hold no records at all.
The number of records is therefore compared with the expected one when a file is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable

import numpy as np
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class ShardPart:
    """Records `skip` to `skip + take` of a file that holds `examples_in_shard`."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Shards:
    """The records of several files, one after the other.

    Error messages say by `remedy` what to do about a damaged file. Raises UserError if a file is
    missing.
    """

    def __init__(self, parts: list[ShardPart], *, remedy: str):
        for part in parts:
            if not os.path.exists(part.filename):
                raise UserError(f"{part.filename}: missing; {remedy}")
        self._parts = parts
        self._ends = np.cumsum([part.take for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Which file a record is in, and its position there."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return which, self._parts[which].skip + index - before

    def describe(self, index: int) -> str:
        """Where a record is, for people."""
        which, position = self.locate(index)
        return f"{self._parts[which].filename}, record {position}"

    def read(self, index: int) -> bytes:
        """The data of a record. Raises CorruptRecord if its checksums are wrong."""
        raise NotImplementedError


class ArrayRecordShards(Shards):
    """ArrayRecord files. Raises UserError too if one holds another number of records."""

    def __init__(self, parts: list[ShardPart], *, remedy: str):
        super().__init__(parts, remedy=remedy)
        for part in parts:
            _check_shard(part, remedy)
        self._source = ArrayRecordDataSource(parts)

    def read(self, index: int) -> bytes:
        try:
            return self._source[index]
        except Exception as e:  # whatever the C++ reader raises
            raise CorruptRecord(f"its shard is damaged there ({_first_line(e)})") from e


def _first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return lines[0] if lines else type(e).__name__


def _check_shard(part: ShardPart, remedy: str) -> None:
    try:
        reader = array_record_module.ArrayRecordReader(part.filename)
        found = reader.num_records()
        reader.close()
    except Exception as e:  # whatever the C++ reader raises
        raise UserError(f"{part.filename}: cannot be read ({_first_line(e)}); {remedy}") from e
    if found != part.examples_in_shard:
        raise UserError(
            f"{part.filename}: {found} records in it, expected {part.examples_in_shard}: it was cut"
            f" or is another file; {remedy}"
        )


def write_array_record(path: str, records: Iterable[bytes]) -> None:
    """Writes records to a file, each on its own, for random access.

    Raises:
      UserError: the file cannot be written whole.
    """
    count = 0
    try:
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        with contextlib.closing(writer):
            for count, record in enumerate(records, start=1):  # noqa: B007
                writer.write(record)
    except RuntimeError as e:  # of the C++ writer
        raise UserError(
            f"{path}: cannot be written ({_first_line(e)}); free some space, and run the command"
            " again to resume"
        ) from e
    # A truncated file may merely claim to be empty.
    _check_shard(ShardPart(path, 0, count, count), "free some space, and run the command again")
