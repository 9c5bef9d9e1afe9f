"""Which paths the program can work with: local ones, without the characters of a glob pattern."""

from __future__ import annotations

import pathlib
import re

from cascaded_diffusion.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# Orbax and TFDS pass whole paths to glob, which then matches other names or none.
_GLOB = "*?["


def check_local_path(text: str, name: str) -> pathlib.Path:
    """Checks a path that a flag or a config key names. Nothing need be there.

    Args:
      text: the path as given.
      name: of the flag or key, for example "--workdir" or "config.data.path".

    Returns:
      The path as given.

    Raises:
      UserError: it names object storage (`gs://`), is empty or holds a NUL character, or its
        absolute form, including the folders above it, holds one of `*`, `?`, `[` and `]`.
    """
    if not text or "\0" in text:
        raise UserError(f"{name}={text!r}: expected the path of a file or folder")
    if _SCHEME.match(text):
        raise UserError(
            f"{name}={text}: expected a path on this machine or a mounted file system; object"
            " storage is not supported yet (mount the bucket, for example with gcsfuse)"
        )
    path = pathlib.Path(text)
    found = [c for c in (*_GLOB, "]") if c in str(path.absolute())]
    if found:
        raise UserError(
            f"{name}={text}: {str(path.absolute())!r} contains {found[0]!r}, which the checkpoint"
            " and data libraries take for a pattern; choose a path without * ? [ ]"
        )
    return path
