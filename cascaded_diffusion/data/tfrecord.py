"""TFRecord files, with random access and every checksum verified.

A record is: its length (8 bytes), the masked CRC-32C of the length (4), the data, its
masked CRC-32C (4), all little-endian. TensorFlow's own format, read without TensorFlow.
"""

from __future__ import annotations

import os
import struct

import google_crc32c
import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.errors import UserError

_HEADER, _FOOTER = 12, 4


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class TfRecordFile:
    """One file, indexed when its first record is read.

    Args:
      path: the file.
      num_records: the number of records that it must have.
    """

    def __init__(self, path: str, num_records: int):
        self._path, self._num_records = path, num_records
        self._offsets: np.ndarray | None = None

    def read(self, position: int) -> bytes:
        """The data of a record.

        Raises:
          CorruptRecord: its checksum is wrong, or it cannot be read.
          UserError: the file has another number of records.
        """
        if self._offsets is None:  # two threads may both index the file, with the same result
            self._offsets = self._index()
        start, end = self._offsets[position], self._offsets[position + 1]
        try:
            with open(self._path, "rb") as f:
                f.seek(start + _HEADER)
                data = f.read(end - start - _HEADER - _FOOTER)
                footer = f.read(_FOOTER)
        except OSError as e:
            raise CorruptRecord(f"cannot be read ({e.strerror or e})") from e
        # A file that was truncated after it was indexed has no footer there.
        if struct.pack("<I", _masked_crc(data)) != footer:
            raise CorruptRecord("its checksum is wrong")
        return data

    def _index(self) -> np.ndarray:
        """Where each record starts, and where the last ends."""
        offsets, at = [0], 0
        size = os.path.getsize(self._path)
        with open(self._path, "rb", buffering=0) as f:
            while at < size:
                f.seek(at)
                header = f.read(_HEADER)
                if len(header) < _HEADER:
                    break
                length, crc = struct.unpack("<QI", header)
                if _masked_crc(header[:8]) != crc:
                    raise UserError(
                        f"{self._path}: the length of record {len(offsets) - 1} is damaged; what"
                        " follows cannot be found; copy or prepare the file anew"
                    )
                at += _HEADER + length + _FOOTER
                offsets.append(at)
        found = len(offsets) - 1 - (at > size)
        if found != self._num_records or at != size:
            raise UserError(
                f"{self._path}: {found} whole records in it, expected {self._num_records}: it was"
                " cut or is another file; copy or prepare it anew"
            )
        return np.asarray(offsets, np.int64)
