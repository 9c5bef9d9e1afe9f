"""Paths: which ones the program can use and write to, and which files it passes over."""

import os
import pathlib
import re
import tempfile
from collections.abc import Mapping

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files import bucket
from cascaded_diffusion.files.bucket import AnyPath, BucketPath

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# Orbax and TFDS pass whole paths to glob, which then matches other names or none.
_GLOB = re.compile(r"[*?\[\]]")
# In lower case: leftovers of macOS archives, network storage, Windows and file systems.
_LITTER = {
    "__macosx", "@eadir", "#recycle", "#snapshot", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "$recycle.bin", "system volume information", "lost+found", "icon\r",
}  # fmt: skip
_MAX_KINDS = 6


def printable(name: str | bytes) -> str:
    """The name of a file as one line of valid text, with escapes for what cannot be printed."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in os.fsdecode(name)
    )


def check_path(text: str, name: str) -> AnyPath:
    """Checks and returns a path that a flag or a config key names, whether or not it exists.

    It may be a `gs://` address. Raises UserError, which begins with `name` ("--workdir",
    "config.data.path"), if the path is of another scheme, is empty or contains a NUL character, or
    its absolute form contains one of `*`, `?`, `[` and `]`.
    """
    if not text or "\0" in text:
        raise UserError(f"{name}={text!r}: expected the path of a file or folder")
    if _SCHEME.match(text):
        bucket.check_url(text, name)
    path = bucket.path_of(text)
    whole = str(path.absolute())
    if found := _GLOB.search(whole):
        raise UserError(
            f"{name}={text}: {whole!r} contains {found[0]!r}, which the checkpoint and data"
            " libraries take for a pattern; choose a path without * ? [ ]"
        )
    return path


def check_local_path(text: str, name: str) -> pathlib.Path:
    """As `check_path`, for what must be on this machine: raises UserError for `gs://`, too."""
    path = check_path(text, name)
    if isinstance(path, BucketPath):
        raise UserError(f"{name}={text}: expected a path on this machine, none in a bucket")
    return path


def check_writable(path: AnyPath, flag: str) -> None:
    """Raises UserError if the folder cannot be written; leaves no trace."""
    if isinstance(path, BucketPath):
        bucket.check_usable(path, f"--{flag}")
        return
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--{flag}={path}: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        problem = f"cannot write to {parent} ({e.strerror}); choose a folder that you may write to"
        raise UserError(f"--{flag}={path}: {problem}") from e


def is_litter(name: str | bytes) -> bool:
    """Whether one component of a path is hidden (".ipynb_checkpoints") or known litter.

    Apply it to every component below the folder that the user named, not to that folder.
    """
    text = os.fsdecode(name)
    return text.startswith(".") or text.lower() in _LITTER


def describe_passed_over(counts: Mapping[str, int]) -> str:
    """`3 other files passed over: 2 .txt, 1 hidden`, from counts by kind; "" for none."""
    total = sum(counts.values())
    if not total:
        return ""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{n:,} {kind}" for kind, n in ranked[:_MAX_KINDS]]
    more = ["and more"] if len(ranked) > _MAX_KINDS else []
    files = "other file" if total == 1 else "other files"
    return f"{total:,} {files} passed over: {', '.join(kinds + more)}"
