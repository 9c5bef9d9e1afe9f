"""Files in a bucket that libraries read at random places, as copies on this machine's disk.

    CACHE/bucket/<SHA-256>.<suffix>    what a manifest gives the SHA-256 of
    CACHE/bucket/<digest>.<suffix>     of the address, size and time of another object

A copy appears whole, and stays for the next process; the folder may be removed at any time.
"""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.paths import check_local_path
from cascaded_diffusion.files.whole import write_whole

CACHE_VARIABLE = "CASCADED_DIFFUSION_CACHE"
_AT_ONCE = 8  # downloads


def cache_folder() -> pathlib.Path:
    """Where this program keeps what it can make or fetch again."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return check_local_path(given, CACHE_VARIABLE)
    return pathlib.Path.home() / ".cache" / "cascaded_diffusion"


def local_copy(path: AnyPath) -> pathlib.Path:
    """A file itself, or the copy of an object. Raises OSError if it cannot be read."""
    if not isinstance(path, BucketPath):
        return path
    about = path.stat()
    key = hashlib.sha256(f"{path} {about.st_size} {about.st_mtime}".encode()).hexdigest()
    copy = cache_folder() / "bucket" / f"{key}{path.suffix}"
    if not copy.exists():
        write_whole(copy, path.read_bytes())
    return copy


def local_copies(known: Mapping[AnyPath, tuple[int, str]], *, remedy: str) -> list[pathlib.Path]:
    """Files themselves, or copies of objects, of which number of bytes and SHA-256 are known.

    Raises UserError, which ends with `remedy`, if an object is missing or another one, and if the
    disk cannot hold the copies.
    """
    folder = cache_folder() / "bucket"
    copies = {
        path: folder / f"{digest}{path.suffix}" if isinstance(path, BucketPath) else path
        for path, (_, digest) in known.items()
    }
    missing = [path for path, copy in copies.items() if copy != path and not copy.exists()]
    if not missing:
        return list(copies.values())
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(known[path][0] for path in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{missing[0].parent}: its files are copied to {folder}, which needs {needed / 1e9:.1f}"
            f" GB and has {free / 1e9:.1f} GB left; name a folder on a larger disk by the variable"
            f" {CACHE_VARIABLE}"
        )
    print(f"{missing[0].parent}: copying {needed / 1e9:.2g} GB to {folder}", flush=True)

    def fetch(path: AnyPath) -> None:
        try:
            data = path.read_bytes()
        except FileNotFoundError as e:
            raise UserError(f"{path}: missing; {remedy}") from e
        size, digest = known[path]
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(
                f"{path}: its SHA-256 is not the manifest's ({len(data)} bytes, expected {size}):"
                f" it was cut, is damaged or another file; {remedy}"
            )
        write_whole(copies[path], data)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, missing))
    return list(copies.values())
