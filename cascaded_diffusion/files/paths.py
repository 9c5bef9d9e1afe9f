"""Paths: which ones the program can work with, and how it prints them."""

from __future__ import annotations

import os
import pathlib
import re

from cascaded_diffusion.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# Orbax and TFDS pass whole paths to glob, which then matches other names or none.
_GLOB = re.compile(r"[*?\[\]]")


def printable(name: str | bytes) -> str:
    """The name of a file as one line of valid text, with escapes for what cannot be printed."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in os.fsdecode(name)
    )


def check_local_path(text: str, name: str) -> pathlib.Path:
    """Checks and returns a path that a flag or a config key names, whether or not it exists.

    Raises UserError, which begins with `name` ("--workdir", "config.data.path"), if the path names
    object storage (`gs://`), is empty or contains a NUL character, or its absolute form contains
    one of `*`, `?`, `[` and `]`.
    """
    if not text or "\0" in text:
        raise UserError(f"{name}={text!r}: expected the path of a file or folder")
    if _SCHEME.match(text):
        raise UserError(
            f"{name}={text}: expected a path on this machine or a mounted file system; object"
            " storage is not supported yet (mount the bucket, for example with gcsfuse)"
        )
    path = pathlib.Path(text)
    whole = str(path.absolute())
    if found := _GLOB.search(whole):
        raise UserError(
            f"{name}={text}: {whole!r} contains {found[0]!r}, which the checkpoint and data"
            " libraries take for a pattern; choose a path without * ? [ ]"
        )
    return path
