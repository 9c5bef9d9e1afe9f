"""Object storage: `gs://bucket/name` as a path, and writes that fail where another one was first.

An object appears whole or not at all, to all readers at once, and nothing is ever renamed. What
belongs together is therefore complete where its manifest is, which is written last. Folders do not
exist; a path is a folder where names begin with it.

Each object has a generation, which changes when it is written. A write may expect one: it then
fails if the object is another by now. So a lock has one holder, and nothing is overwritten unseen.

TensorStore, which Orbax also reads and writes checkpoints by, speaks to the storage. It tries again
by itself for minutes what fails for a moment.
"""

from __future__ import annotations

import contextlib
import email.utils
import fnmatch
import functools
import http.client
import importlib.util
import io
import logging
import os
import pathlib
import posixpath
import re
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from cascaded_diffusion.errors import UserError

if TYPE_CHECKING:
    import tensorstore
    from etils import epath

# Drivers of TensorStore.
_DRIVERS = {"gs": "gcs"}
# By which `gcsfs` and others are told of a server other than Google's, as the one of the tests.
_EMULATOR = "STORAGE_EMULATOR_HOST"
_URL = re.compile(r"([a-z][a-z0-9]*)://(.*)", re.DOTALL)
_PART = r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?"
_BUCKET = re.compile(rf"(?=.{{3,222}}\Z){_PART}(\.{_PART})*")
# How TensorStore and gcsfs say that a request failed on its way.
_ON_THE_WAY = re.compile(r"http_response_code|CURL error|retry attempts|UNAVAILABLE|DEADLINE")
_FEW_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}
_HASTE_SECS, PATIENCE_SECS = 20.0, 900.0
_MAX_CLOCK_SECS, _CLOCK_TIMEOUT_SECS = 60.0, 5.0
# TensorStore's generation of an object that is not there. An empty one is any.
ABSENT = b"\x02"


class OverwrittenError(OSError):
    """An object is another than expected: someone else has written or removed it in between."""


def is_missing(error: OSError) -> bool:
    """Whether an error says that there is no such object."""
    return isinstance(error, FileNotFoundError) and error.errno is not None


def is_of_storage(error: BaseException) -> bool:
    """Whether an error is of a request that failed, and not of what was read."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return type(error).__name__ == "HttpError" or _ON_THE_WAY.search(str(error)) is not None


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names object storage."""
    return _URL.match(os.fspath(path)) is not None


def check_url(text: str, name: str) -> None:
    """Raises UserError, which begins with `name`, unless a URL may name something in a bucket."""
    found = _URL.match(text)
    if found is None or found[1] not in _DRIVERS:
        schemes = ", ".join(f"{scheme}://" for scheme in _DRIVERS)
        raise UserError(
            f"{name}={text}: expected a path on this machine or one that begins with {schemes}"
        )
    bucket, _, key = found[2].partition("/")
    parts = key.rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{name}={text}: expected {found[1]}://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:  # by which Orbax lists its checkpoints
        raise UserError(
            f"{name}={text}: object storage needs the package gcsfs; run `pip install gcsfs`"
        )


class Stat(NamedTuple):
    """An object's bytes, and when it was written, in seconds."""

    st_size: int
    st_mtime: float


class BucketPath(os.PathLike[str]):
    """A name in a bucket, with the part of pathlib's interface that is used here."""

    def __init__(self, url: str):
        found = _URL.match(url)
        if found is None:
            raise ValueError(f"{url!r} is no URL")
        self._scheme = found[1]
        self._bucket, _, key = found[2].partition("/")
        self._key = key.strip("/")

    def __fspath__(self) -> str:
        return f"{self._scheme}://{self._bucket}" + (f"/{self._key}" if self._key else "")

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __lt__(self, other: BucketPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str | os.PathLike[str]) -> BucketPath:
        return BucketPath(f"{self}/{os.fspath(name)}")

    @property
    def bucket(self) -> str:
        """The URL of the bucket."""
        return f"{self._scheme}://{self._bucket}"

    @property
    def name(self) -> str:
        return posixpath.basename(self._key)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> BucketPath:
        return BucketPath(f"{self.bucket}/{posixpath.dirname(self._key)}")

    def with_name(self, name: str) -> BucketPath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> BucketPath:
        return self.parent / f"{self.stem}{suffix}"

    def absolute(self) -> BucketPath:
        return self

    def resolve(self) -> BucketPath:
        return self

    def is_relative_to(self, folder: AnyPath) -> bool:
        return str(self) == str(folder) or str(self).startswith(f"{folder}/")

    def relative_to(self, folder: BucketPath) -> pathlib.PurePosixPath:
        return pathlib.PurePosixPath(self._key).relative_to(folder._key)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self._key) and self._key in self._names(self._key, f"{self._key}\0")

    def is_dir(self) -> bool:
        return bool(self._below())

    def iterdir(self) -> Iterator[BucketPath]:
        """What is in a folder, in order; nothing for one that is not there."""
        start = len(self._prefix)
        for name in sorted({key[start:].partition("/")[0] for key in self._files()}):
            yield self / name

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """The names below a folder that match, part by part, in order."""
        parts, start = pattern.split("/"), len(self._prefix)
        found = {tuple(key[start:].split("/")[: len(parts)]) for key in self._files()}
        for names in sorted(found):
            if len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts)):
                yield self / "/".join(names)

    def files(self) -> list[BucketPath]:
        """All objects below a folder, in order."""
        return [BucketPath(f"{self.bucket}/{key}") for key in self._files()]

    def stat(self) -> Stat:
        """Raises FileNotFoundError if there is no such object."""
        with _of_gcsfs(self, "looked up"):
            about = for_orbax(self).stat()
            return Stat(about.length, about.mtime)

    def details(self) -> list[tuple[str, Stat]]:
        """All objects below a folder by their path relative to it, in order."""
        set_up_gcsfs()
        import gcsfs

        start = len(f"{self._bucket}/{self._prefix}")
        with _of_gcsfs(self, "listed"):
            found = gcsfs.GCSFileSystem().find(str(self), detail=True)
        return sorted(
            (name[start:], Stat(about["size"], about["mtime"].timestamp()))
            for name, about in found.items()
            if len(name) > start and not name.endswith("/")
        )

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: folders need not be made."""

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError if there is no such object, OSError if it cannot be read."""
        data, _ = self.read_versioned()
        if data is None:
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return data

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def open(self, mode: str = "rb") -> BinaryIO:
        """An object's contents, read at once."""
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: an object is written by `write_bytes`")
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        self._result("written", lambda store: store.write(self._key, data))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(self))
        self._result("removed", lambda store: store.write(self._key, None))

    def remove_tree(self) -> None:
        """Removes all objects below a folder."""
        keys = self._below()
        self._results("removed", lambda store: [store.write(key, None) for key in keys])

    def read_versioned(self) -> tuple[bytes | None, bytes]:
        """An object's contents and generation; None and ABSENT if there is no such object."""
        found = self._result("read", lambda store: store.read(self._key))
        return (found.value, found.stamp.generation) if found.state == "value" else (None, ABSENT)

    def write_versioned(
        self, data: bytes | None, expected: bytes, *, secs: float | None = None
    ) -> bytes:
        """Writes an object, or removes it for None, if it is of the generation `expected`.

        Returns the new generation. Raises OverwrittenError if it is of another, and OSError if it
        takes longer than `secs`; it may then be written later.
        """
        (stamp,) = self._results(
            "written", lambda store: [store.write(self._key, data, if_equal=expected)], secs=secs
        )
        if stamp.generation:
            return stamp.generation if data is not None else ABSENT
        # Perhaps it was written, but the answer was lost and it was tried again.
        found, generation = self.read_versioned()
        if found != data:
            raise OverwrittenError(f"{self}: was written or removed by another process in between")
        return generation

    @property
    def _prefix(self) -> str:
        return f"{self._key}/" if self._key else ""

    def _below(self) -> list[str]:
        # "0" is the character after "/".
        return self._names(self._prefix, f"{self._key}0" if self._key else "")

    def _files(self) -> list[str]:
        # Consoles and mounts put empty objects in the place of folders.
        return [key for key in self._below() if not key.endswith("/")]

    def _names(self, start: str, end: str) -> list[str]:
        def listed(store: tensorstore.KvStore) -> Any:
            return store.list(type(store).KeyRange(start, end))

        return sorted(key.decode() for key in self._result("listed", listed))

    def _result(self, verb: str, request: Callable[[tensorstore.KvStore], Any]) -> Any:
        return self._results(verb, lambda store: [request(store)])[0]

    def _results(
        self,
        verb: str,
        requests: Callable[[tensorstore.KvStore], list[Any]],
        *,
        patient: bool = True,
        secs: float | None = None,
    ) -> list[Any]:
        if patient:
            _reach(self)
        secs = secs or (PATIENCE_SECS if patient else _HASTE_SECS)
        try:
            futures = requests(_store(self._scheme, self._bucket, patient))
            return [future.result(secs) for future in futures]
        except TimeoutError as e:
            raise OSError(f"{self}: cannot be {verb}: the storage does not answer") from e
        except ValueError as e:  # whatever TensorStore met with
            raise _refused(self, verb, str(e)) from e


# Where runs, data and samples may lie.
AnyPath = pathlib.Path | BucketPath


def path_of(path: str | os.PathLike[str]) -> AnyPath:
    """A path on this machine, or in a bucket for a `gs://` address."""
    text = os.fspath(path)
    return BucketPath(text) if is_url(text) else pathlib.Path(text)


def check_usable(path: BucketPath, name: str) -> None:
    """Raises UserError, which begins with `name`, unless a folder can be listed and written.

    It leaves no trace. A clock that differs from the storage's is warned of.
    """
    probe = path / f".probe-{uuid.uuid4().hex}"
    try:
        generation = probe.write_versioned(b"1", ABSENT)
        try:
            generation = probe.write_versioned(b"2", generation)
            probe.is_file()
        finally:
            with contextlib.suppress(OverwrittenError):
                probe.write_versioned(None, generation)
        above = path
        while above._key:
            if above.is_file():
                raise UserError(f"{name}={path}: {above} is no folder")
            above = above.parent
    except OverwrittenError as e:  # a name that nobody else knows
        problem = "what is written there is not what is read, as if the name were another's"
        raise UserError(f"{name}={path}: {problem}; choose a plain one") from e
    except OSError as e:
        raise UserError(f"{name}={path}: {str(e).removeprefix(f'{probe}: ')}") from e
    if (ahead := _clock_error()) is not None and abs(ahead) > _MAX_CLOCK_SECS:
        print(
            f"warning: {name}={path}: the clock of this machine is {abs(ahead):.0f} s"
            f" {'ahead of' if ahead > 0 else 'behind'} that of the storage, which refuses access"
            " beyond some minutes; set it, as by `timedatectl set-ntp true`",
            file=sys.stderr,
            flush=True,
        )


def _clock_error() -> float | None:
    """By how many seconds this machine's clock is ahead of the storage's, if that is known."""
    url = os.environ.get(_EMULATOR, "https://storage.googleapis.com")
    try:
        with urllib.request.urlopen(url, timeout=_CLOCK_TIMEOUT_SECS) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as e:  # an answer all the same
        with e:
            date = e.headers["Date"]
    except (OSError, ValueError, http.client.HTTPException):
        return None
    with contextlib.suppress(TypeError, ValueError):
        return time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    return None


@contextlib.contextmanager
def _of_gcsfs(path: BucketPath, verb: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise FileNotFoundError(2, "No such file or directory", str(path)) from e
    except Exception as e:  # whatever gcsfs and those that it signs in by raise
        raise OSError(f"{path}: cannot be {verb} ({' '.join(str(e).split())[:200]})") from e


_REACHED: set[str] = set()


def _reach(path: BucketPath) -> None:
    """The first request to a bucket is one that is not tried again for minutes."""
    if path.bucket not in _REACHED:
        # There is no such object.
        path._results("read", lambda store: [store.read(".cascaded_diffusion")], patient=False)
        _REACHED.add(path.bucket)


def for_orbax(path: AnyPath) -> pathlib.Path | epath.Path:
    """A path that Orbax takes: absolute, or `etils`' own over gcsfs for one in a bucket."""
    if not isinstance(path, BucketPath):
        return path.absolute()
    _tell_tensorstore()
    set_up_gcsfs()
    from etils import epath

    return epath.Path(str(path))


def set_up_gcsfs() -> None:
    """To be called before Orbax, TFDS or this module read a bucket by gcsfs."""
    # Before gcsfs is imported: it need not ask what kind of bucket it is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # What another process writes must be seen at once.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # It logs errors with their traces before it raises them.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def _tell_tensorstore() -> None:
    if (url := os.environ.get(_EMULATOR)) is not None:
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = url


@functools.cache
def _store(scheme: str, bucket: str, patient: bool) -> tensorstore.KvStore:
    import tensorstore  # takes a while

    _tell_tensorstore()
    context = tensorstore.Context({} if patient else {"gcs_request_retries": _FEW_RETRIES})
    spec = {"driver": _DRIVERS[scheme], "bucket": bucket}
    return tensorstore.KvStore.open(spec, context=context).result()


def _refused(path: BucketPath, verb: str, reason: str) -> OSError:
    """An error of one line for what TensorStore says of a request."""
    what = f"{path}: cannot be {verb}"
    code = reason.partition(":")[0]
    remedy = f"see whether the bucket is there by `gcloud storage ls {path.bucket}`"
    if verb == "listed" and code == "INTERNAL":  # TensorStore does not say what was answered
        what = f"{what}: there is no such bucket ({remedy}), or"
        return PermissionError(f"{what} access was denied; {ROLE_REMEDY.format(path.bucket)}")
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return PermissionError(f"{what}: access was denied; {ROLE_REMEDY.format(path.bucket)}")
    if code == "NOT_FOUND":
        return FileNotFoundError(f"{what}: there is no such bucket; {remedy}")
    if "CURL error" in reason:
        remedy = "see whether the storage can be reached from this machine"
    return OSError(f"{what} ({' '.join(reason.split())[:200]}); {remedy}")


ROLE_REMEDY = (
    "expected an account with the role roles/storage.objectUser on {}: log in by `gcloud auth"
    " application-default login`, or give the machine's service account that role"
)
