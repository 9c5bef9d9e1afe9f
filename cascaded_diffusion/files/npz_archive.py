"""Arrays of `.npz` files, whose declared sizes are checked before anything is allocated.

A header of a few bytes can declare petabytes, and three compressed megabytes can inflate to
three gigabytes. The declared sizes are therefore compared with the bytes in the file, and all
arrays together must fit in memory.
"""

import contextlib
import io
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from typing import IO

import numpy as np

from cascaded_diffusion.files.bucket import is_url, path_of

# The size that a compressed array may have: so many bytes, or so many times its stored bytes.
_FREE_BYTES, _MAX_INFLATION = 256_000_000, 100
_MAX_HEADER_BYTES = 10_000
_ENCRYPTED = 0x1
# What zipfile raises for a damaged file besides ValueError and OSError.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, OverflowError,
    IndexError, KeyError, RuntimeError,
)  # fmt: skip


def read_arrays(
    path: str | os.PathLike[str],
    names: Collection[str] | None = None,
    *,
    max_bytes: int | None = None,
) -> dict[str, np.ndarray]:
    """Reads arrays of an `.npz` file into memory, by name without ".npy". Nothing is unpickled.

    `names` that the file lacks are left out; None stands for all it has. `max_bytes` limits all
    arrays together, by default to the memory of this machine.

    Raises ValueError in a few words, without the path, if the file is damaged or no `.npz`, an
    array holds Python objects, is empty or declares a wrong size, or the arrays are too large; and
    OSError if it cannot be opened.
    """
    limit = _memory() if max_bytes is None else max_bytes
    try:
        with _opened(path) as archive:
            members = _members(archive)
            if names is not None:
                members = {name: members[name] for name in names if name in members}
            _check_sizes(members, archive.fp.seek(0, os.SEEK_END), limit)
            return {name: _read(archive, name, info) for name, info in members.items()}
    except MemoryError as e:
        raise ValueError("its arrays are larger than the memory that is free") from e


def array_names(path: str | os.PathLike[str]) -> set[str]:
    """The names of a file's arrays, without ".npy". Raises like `read_arrays`, but reads none."""
    with _opened(path) as archive:
        return set(_members(archive))


def layout_hint(shape: tuple[int, ...]) -> str:
    """What to do about an array `arr_0` of images that is not (n, height, width, channels)."""
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        return (
            "; it looks like (n, channels, height, width): store arr_0.transpose(0, 2, 3, 1)"
            " instead"
        )
    return "; store grey images as arr_0[..., None]" if len(shape) == 3 else ""


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    if not is_url(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a file")
    try:
        with path_of(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except DAMAGED as e:
        raise ValueError(f"damaged, or no .npz: {' '.join(str(e).split())}") from e


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {
        info.filename.removesuffix(".npy"): info
        for info in archive.infolist()
        if info.filename.endswith(".npy")
    }


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_sizes(members: dict[str, zipfile.ZipInfo], size: int, limit: int) -> None:
    stored = sum(info.compress_size for info in members.values())
    if stored > size:
        raise ValueError(f"damaged: declares {stored:,} bytes of arrays, and is of {size:,}")
    for name, info in members.items():
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name} is encrypted")
        if info.compress_type == zipfile.ZIP_STORED:
            most = info.compress_size
        elif info.compress_type == zipfile.ZIP_DEFLATED:
            most = max(_FREE_BYTES, _MAX_INFLATION * info.compress_size)
        else:
            raise ValueError(f"{name} is compressed in a way that numpy does not write")
        if info.file_size > most:
            raise ValueError(
                f"{name} declares {info.file_size:,} bytes, which {info.compress_size:,} stored"
                f" bytes do not make: expected at most {most:,}"
            )
    total = sum(info.file_size for info in members.values())
    if total > limit:
        raise ValueError(f"holds {total:,} bytes of arrays, expected at most {limit:,}")


def _read(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as f:
        shape, fortran_order, dtype, header_bytes = _header(f, name)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, expected numbers or text")
        declared = f"{name} is declared as {dtype} of shape {shape}"
        # Headers may hold True for 1.
        if any(type(n) is not int or n < 1 for n in shape) or not dtype.itemsize:
            raise ValueError(f"{declared}, which is empty")
        # Python's integers do not overflow.
        expected, there = math.prod(shape) * dtype.itemsize, info.file_size - header_bytes
        if expected != there:
            raise ValueError(f"{declared}, {expected:,} bytes, and holds {there:,}")
        array = np.empty(shape, dtype, order="F" if fortran_order else "C")
        data = memoryview(array.reshape(-1, order="A").view(np.uint8))
        at = 0
        while at < expected:
            count = f.readinto(data[at : at + (1 << 20)])
            if not count:
                raise ValueError(f"{name} ends too early")
            at += count
        f.read(1)  # zipfile compares the checksum when it reaches the end
        return array


def _header(f: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """The shape, whether in Fortran's order, the dtype, and the bytes of the header."""
    start = f.read(8)
    if len(start) < 8 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise ValueError(f"{name} is no array as numpy writes it")
    length_bytes = f.read(2 if start[6] == 1 else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"{name} has a header of {length:,} bytes")
    header = io.BytesIO(length_bytes + f.read(length))
    formats = np.lib.format
    # Version 3 is 2 with field names in UTF-8, which numpy has no public function for.
    read = formats.read_array_header_1_0 if start[6] == 1 else formats.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(header)
    except Exception as e:  # whatever Python's tokenizer and parser, which numpy uses, raise
        raise ValueError(f"{name} has a header that cannot be read") from e
    return shape, fortran_order, dtype, len(start) + len(length_bytes) + length
