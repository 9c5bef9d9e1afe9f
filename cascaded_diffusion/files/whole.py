"""Files that appear under their name whole or not at all, and digests of what is in them."""

import contextlib
import hashlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np


@contextlib.contextmanager
def naming_path(path: pathlib.Path) -> Iterator[None]:
    """Adds the path to errors of writing, which lack it: "No space left on device"."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, f"cannot be written ({e.strerror or e})", str(path)) from e


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write, of which readers see all or nothing: it appears at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming_path(path),
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f,
    ):
        try:
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that readers see all of it or nothing."""
    with whole_file(path) as f:
        f.write(data)


def write_npz_whole(path: pathlib.Path, arrays: Mapping[str, np.typing.ArrayLike]) -> None:
    """Writes arrays as an uncompressed `.npz`, as `write_whole` does."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_whole(path, data.getvalue())


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the names and contents of arrays, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
