"""Files that appear under their name whole or not at all, and digests of what is in them.

They lie on this machine or in a bucket, whose objects are whole by themselves.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np

from cascaded_diffusion.files.bucket import AnyPath, BucketPath

# Of an object that is being made; beyond it, a temporary file is used.
_MAX_MEMORY = 1 << 26


@contextlib.contextmanager
def naming_path(path: AnyPath) -> Iterator[None]:
    """Adds the path to errors of writing, which lack it: "No space left on device"."""
    try:
        yield
    except OSError as e:
        if e.errno is None:  # it names the path
            raise
        raise OSError(e.errno, f"cannot be written ({e.strerror or e})", str(path)) from e


@contextlib.contextmanager
def whole_file(path: AnyPath) -> Iterator[IO[bytes]]:
    """A file to write, of which readers see all or nothing: it appears at the end of the block."""
    if isinstance(path, BucketPath):
        with tempfile.SpooledTemporaryFile(_MAX_MEMORY) as f:
            yield f
            f.seek(0)
            path.write_bytes(f.read())
        return
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


def generation_of(path: AnyPath) -> bytes | None:
    """The generation of a file in a bucket, ABSENT if it is not there; None for one on a disk."""
    return path.read_versioned()[1] if isinstance(path, BucketPath) else None


def write_whole(path: AnyPath, data: bytes, *, expected: bytes | None = None) -> None:
    """Writes a file so that readers see all of it or nothing.

    Raises OverwrittenError if a file in a bucket is not of the generation `expected` any more.
    """
    if isinstance(path, BucketPath) and expected is not None:
        path.write_versioned(data, expected)
        return
    with whole_file(path) as f:
        f.write(data)


def remove_tree(folder: AnyPath) -> None:
    """Removes a folder with all that is in it, as far as possible; nothing if it is not there."""
    if isinstance(folder, BucketPath):
        with contextlib.suppress(OSError):
            folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move(source: AnyPath, target: AnyPath) -> None:
    """Moves a file or folder, in one instant on a file system, and object by object in a bucket."""
    if not isinstance(source, BucketPath):
        os.replace(source, target)
        return
    found = {target: source} if source.is_file() else {}
    found |= {target / name: path for name, path in files_below(source).items()}
    for new, old in found.items():
        new.write_bytes(old.read_bytes())
        old.unlink(missing_ok=True)


def files_below(folder: AnyPath) -> dict[str, AnyPath]:
    """All files below a folder by their path relative to it, in order."""
    if isinstance(folder, BucketPath):
        files = folder.files()
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files}


def write_npz_whole(path: AnyPath, arrays: Mapping[str, np.typing.ArrayLike]) -> None:
    """Writes arrays as an uncompressed `.npz`, as `write_whole` does."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_whole(path, data.getvalue())


def sha256_of(path: AnyPath) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the names and contents of arrays, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
