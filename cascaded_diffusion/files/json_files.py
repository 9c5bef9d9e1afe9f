"""JSON files, and files of one JSON object per line that a crash cannot spoil."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files import line_parts
from cascaded_diffusion.files.bucket import AnyPath, BucketPath, is_missing
from cascaded_diffusion.files.whole import naming_path, write_whole

# A JSON object. Who indexes into it knows what is there, or had its `Types` checked.
Record = dict[str, Any]
# What values of a record must be, by name, as `isinstance` takes it.
Types = Mapping[str, type | tuple[type, ...]]


def write_json(
    path: AnyPath, value: object, *, indent: int | None = 2, expected: bytes | None = None
) -> None:
    """Writes a JSON file whole; `expected` is as for `write_whole`."""
    write_whole(path, json.dumps(value, indent=indent).encode() + b"\n", expected=expected)


def read_json(path: AnyPath, *, remedy: str) -> object:
    """Reads a JSON file. Raises UserError, which ends with `remedy`, if it cannot be read.

    Raises OSError if the storage of a bucket fails.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        # That the storage fails for a while says nothing about the file.
        if isinstance(e, OSError) and isinstance(path, BucketPath) and not is_missing(e):
            raise
        strerror = e.strerror if isinstance(e, OSError) else None
        reason = strerror or " ".join(str(e).split())[:200]
        raise UserError(f"{path}: cannot be read as JSON ({reason}); {remedy}") from e


def read_record(
    path: AnyPath,
    types: Types,
    *,
    otherwise: str = "not what this program writes",
    remedy: str = "remove it",
) -> Record:
    """Reads a JSON file of one object that has values of the given types.

    Raises UserError, which ends with `remedy`, if it cannot be read or is `otherwise`.
    """
    record = read_json(path, remedy=remedy)
    if not _is_record(record, types):
        raise UserError(f"{path}: {otherwise}; {remedy}")
    return record


def readable_record(path: AnyPath, types: Types | None = None) -> Record | None:
    """The record of a file, or None where `read_record` raises."""
    try:
        return read_record(path, types or {})
    except UserError:
        return None


def append_line(path: AnyPath, record: Mapping[str, object]) -> None:
    """Appends one JSON line durably, in a single write; ends a line that a crash cut off first."""
    line = json.dumps(record).encode() + b"\n"
    if isinstance(path, BucketPath):
        line_parts.append(path, line)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    line_parts.join(path)
    with naming_path(path), path.open("a+b") as f:
        f.seek(0, os.SEEK_END)
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write(line)
        f.flush()
        os.fsync(f.fileno())


def write_lines(path: AnyPath, records: Iterable[Mapping[str, object]]) -> None:
    """Writes a file of one JSON object per line whole."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    if isinstance(path, BucketPath):
        line_parts.write(path, data)
        return
    line_parts.join(path)
    write_whole(path, data)


def read_lines(
    path: AnyPath, types: Types | None = None, *, say: Callable[[str], None] | None = None
) -> list[Record]:
    """The JSON objects of a file, one per line, that have values of the given types.

    Other lines, which a crash may have spoiled, are skipped, and `say` is told of them. Raises
    UserError if what is there is no file.
    """
    if isinstance(path, BucketPath) or line_parts.is_folder(path):
        data = line_parts.read(path)
    elif path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file; move away what is there")
    else:
        data = path.read_bytes() if path.exists() else b""
    lines = [line for line in data.split(b"\n") if line.strip()]
    kept = [value for value in map(_parsed, lines) if _is_record(value, types or {})]
    if say is not None and len(kept) < len(lines):
        others = len(lines) - len(kept)
        say(f"{path}: {others} line(s) that are no records of this program were skipped")
    return kept


def _is_record(value: object, types: Types) -> TypeGuard[Record]:
    # True is not a number.
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) and not isinstance(value.get(name), bool)
        for name, kind in types.items()
    )


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
