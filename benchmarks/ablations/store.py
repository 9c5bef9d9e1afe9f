"""The results of a table: a JSON file of rows of one program on one device."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping, Sequence

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record, read_record, write_json

# What rows of one file have in common, and how a person calls it.
SAME = {
    "table": "another table",
    "settings": "other settings",
    "code": "another program",
    "device": "another device",
    "versions": "other versions",
    "data": "other images",
    "features": "another network for the features",
}


def digest_of_code(root: pathlib.Path) -> str:
    """12 digits of all Python files that decide what a row says."""
    digest = hashlib.sha256()
    for folder in ("cascaded_diffusion", "configs", "benchmarks/ablations"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_same(path: pathlib.Path, about: Mapping[str, object]) -> None:
    """Raises UserError if the file, if it is there, was begun with something else than `about`.

    What `about` does not say is not compared.
    """
    if not path.exists():
        return
    begun = read_record(path, {"rows": list})
    for key in SAME.keys() & about.keys():
        if (stored := begun.get(key)) != about[key]:
            was, now = _short(stored, about[key]), _short(about[key], stored)
            raise UserError(
                f"{path}: was begun with {SAME[key]} ({was}, now {now}); rows of the two are not"
                " mixed: remove the file, or take another by --results"
            )


class Results:
    """The rows of one table that were measured so far.

    `about` says where rows come from. Of a file that is there it is kept, but for the command,
    which is that of the last row: seeds may have been added. Raises UserError if the file was begun
    with something else.
    """

    def __init__(self, path: pathlib.Path, about: Mapping[str, object]):
        self.path = path
        self.about: Record = {**about}
        self._command = about["command"]
        self.rows: list[Record] = []
        if not path.exists():
            return
        check_same(path, about)
        self.about = read_record(path, {"rows": list})
        self.rows = self.about.pop("rows")

    def has(self, label: Mapping[str, object], seed: int) -> bool:
        """Whether a row was measured."""
        return any(row["label"] == label and row["seed"] == seed for row in self.rows)

    def add(self, row: Record) -> None:
        """Stores a row at once."""
        self.rows.append(row)
        self.about["command"] = self._command
        write_json(self.path, {**self.about, "rows": self.rows}, indent=1)


def _short(value: object, other: object) -> str:
    """What differs between two values, or the first one."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        keys = [k for k in {**value, **other} if value.get(k) != other.get(k)]
        return ", ".join(f"{k} = {value.get(k)}" for k in keys)
    return str(value)


def by_label(rows: Sequence[Record]) -> list[list[Record]]:
    """Rows that differ in their seed only, together, in the order in which they first occur."""
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(str(row["label"]), []).append(row)
    return list(groups.values())
