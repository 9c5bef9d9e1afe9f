"""TFRecord files, with random access and every checksum verified.

A record is: its length (8 bytes), the masked CRC-32C of the length (4), the data, its
masked CRC-32C (4), all little-endian. TensorFlow's own format, read without TensorFlow.
"""

from __future__ import annotations

import os
import struct

import google_crc32c
import numpy as np

from cascaded_diffusion.data.array_record_files import ShardPart, Shards
from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.errors import UserError

_HEADER, _FOOTER = 12, 4


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class TfRecordShards(Shards):
    """TFRecord files, each checked and indexed when the first of its records is read."""

    def __init__(self, parts: list[ShardPart], *, remedy: str):
        super().__init__(parts, remedy=remedy)
        # Two threads may both index a file, with the same result.
        self._offsets: dict[int, np.ndarray] = {}

    def read(self, index: int) -> bytes:
        """Raises UserError too if the file has another number of records."""
        which, position = self.locate(index)
        part = self._parts[which]
        if which not in self._offsets:
            self._offsets[which] = _record_offsets(part.filename, part.examples_in_shard)
        start, end = self._offsets[which][position : position + 2]
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


def _record_offsets(path: str, num_records: int) -> np.ndarray:
    """int64 [num_records + 1]: where each record starts, and where the last ends."""
    offsets, at = [0], 0
    size = os.path.getsize(path)
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
    if found != num_records or at != size:
        raise UserError(
            f"{path}: {found} whole records in it, expected {num_records}: it was cut or is another"
            " file; copy or prepare it anew"
        )
    return np.asarray(offsets, np.int64)
