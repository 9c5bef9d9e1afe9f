"""Records in several files, with random access: ArrayRecord and TFRecord, without TensorFlow.

ArrayRecord has checksums of its own, but a truncated file may claim to hold no records at all.
The number of records is therefore compared with the expected one when a file is opened.

A record of a TFRecord file is: its length (8 bytes), the masked CRC-32C of the length (4), the
data, its masked CRC-32C (4), all little-endian. Every checksum is verified.
"""

import contextlib
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

import google_crc32c
import numpy as np
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from cascaded_diffusion.data.records import CorruptRecord
from cascaded_diffusion.errors import UserError

_HEADER, _FOOTER = 12, 4


class ShardPart(NamedTuple):
    """Records `skip` to `skip + take` of a file that holds `examples_in_shard`."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Shards:
    """The records of several files, one after the other.

    Raises UserError, which says by `remedy` what to do, if a file is missing.
    """

    def __init__(self, parts: list[ShardPart], *, remedy: str):
        for part in parts:
            if not os.path.exists(part.filename):
                raise UserError(f"{part.filename}: missing; {remedy}")
        self._parts = parts
        self._ends = np.cumsum([part.take for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[ShardPart, int]:
        """Which file a record is in, and its position there."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[which]
        return part, part.skip + part.take + index - int(self._ends[which])

    def describe(self, index: int) -> str:
        """Where a record is, for people."""
        part, position = self.locate(index)
        return f"{part.filename}, record {position}"

    def read(self, index: int) -> bytes:
        """The data of a record. Raises CorruptRecord if its checksums are wrong."""
        raise NotImplementedError


class ArrayRecordShards(Shards):
    """ArrayRecord files. Raises UserError too if one holds another number of records."""

    def __init__(self, parts: list[ShardPart], *, remedy: str):
        super().__init__(parts, remedy=remedy)
        for part in parts:
            _check_count(part, remedy)
        self._source = ArrayRecordDataSource(parts)

    def read(self, index: int) -> bytes:
        try:
            return self._source[index]
        except Exception as e:  # whatever the C++ reader raises
            raise CorruptRecord(f"its shard is damaged there ({_first_line(e)})") from e


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def _check_count(part: ShardPart, remedy: str) -> None:
    try:
        with contextlib.closing(array_record_module.ArrayRecordReader(part.filename)) as reader:
            found = reader.num_records()
    except Exception as e:  # whatever the C++ reader raises
        raise UserError(f"{part.filename}: cannot be read ({_first_line(e)}); {remedy}") from e
    if found != part.examples_in_shard:
        raise UserError(
            f"{part.filename}: {found} records in it, expected {part.examples_in_shard}: it was cut"
            f" or is another file; {remedy}"
        )


def write_array_record(path: str, records: Iterable[bytes]) -> None:
    """Writes records to an ArrayRecord file, each on its own, for random access.

    Raises UserError if the file cannot be written whole.
    """
    count, remedy = 0, "free some space, and run the command again"
    try:
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        with contextlib.closing(writer):
            for record in records:
                writer.write(record)
                count += 1
    except RuntimeError as e:  # of the C++ writer
        problem = f"cannot be written ({_first_line(e)})"
        raise UserError(f"{path}: {problem}; {remedy} to resume") from e
    # A truncated file may merely claim to be empty.
    _check_count(ShardPart(path, 0, count, count), remedy)


class TfRecordShards(Shards):
    """TFRecord files, each checked and indexed when the first of its records is read."""

    def __init__(self, parts: list[ShardPart], *, remedy: str):
        super().__init__(parts, remedy=remedy)
        # Two threads may both index a file, with the same result.
        self._offsets: dict[ShardPart, np.ndarray] = {}

    def read(self, index: int) -> bytes:
        """Raises UserError too if the file has another number of records."""
        part, position = self.locate(index)
        if part not in self._offsets:
            self._offsets[part] = _record_offsets(part)
        start, end = self._offsets[part][position : position + 2]
        try:
            with open(part.filename, "rb") as f:
                f.seek(start + _HEADER)
                data = f.read(end - start - _HEADER - _FOOTER)
                footer = f.read(_FOOTER)
        except OSError as e:
            raise CorruptRecord(f"cannot be read ({e.strerror or e})") from e
        # A file that was truncated after it was indexed has no footer there.
        if struct.pack("<I", _masked_crc(data)) != footer:
            raise CorruptRecord("its checksum is wrong")
        return data


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _record_offsets(part: ShardPart) -> np.ndarray:
    """int64 [n + 1]: where each of the n records starts, and where the last ends."""
    offsets, at = [0], 0
    path, size = part.filename, os.path.getsize(part.filename)
    with open(path, "rb", buffering=0) as f:
        while at < size:
            f.seek(at)
            header = f.read(_HEADER)
            if len(header) < _HEADER:
                break
            length, crc = struct.unpack("<QI", header)
            if _masked_crc(header[:8]) != crc:
                raise UserError(
                    f"{path}: the length of record {len(offsets) - 1} is damaged; what follows"
                    " cannot be found; copy or prepare the file anew"
                )
            at += _HEADER + length + _FOOTER
            offsets.append(at)
    found = len(offsets) - 1 - (at > size)
    if found != part.examples_in_shard or at != size:
        raise UserError(
            f"{path}: {found} whole records in it, expected {part.examples_in_shard}: it was cut or"
            " is another file; copy or prepare it anew"
        )
    return np.asarray(offsets, np.int64)
