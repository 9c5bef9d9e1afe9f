"""Folders of image files: a folder per class, classes in file names, or no classes.

    PATH/train/cat/1.jpg, PATH/train/dog/7.png     "folder": the class is the folder
    PATH/train/cat_1.jpg, PATH/train/dog_7.png     "adm_folder": it is what comes before the "_"
    PATH/train/1.jpg                               either, for a model without classes

A split is a folder in PATH; `all` is PATH itself. Classes are numbered in order of their
names. Files are held as one string of names, so that a million of them fit anywhere.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterator

import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.decode import SUFFIXES
from cascaded_diffusion.data.raw import RawExample
from cascaded_diffusion.data.splits import parse_split, part_of
from cascaded_diffusion.errors import UserError

_SUFFIXES = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
WHOLE = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource:
    """The image files below a folder, in order of their paths.

    Attributes:
      root: the folder.
      names: their paths below it, one after the other.
      ends: int64 [n], where each ends in `names`.
      labels: int32 [n]; 0 where there are no classes.
      class_names: in order of label; empty where there are no classes.
      identity: what the set is, wherever it lies: a digest of its file names.
    """

    root: bytes
    names: bytes
    ends: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    identity: str

    fixed_shape = None

    def __len__(self) -> int:
        return len(self.ends)

    def __repr__(self) -> str:
        return f"FolderSource({len(self)} files in {os.fsdecode(self.root)})"

    def name(self, index: int) -> bytes:
        """The path of a file below `root`."""
        start = self.ends[index - 1] if index else 0
        return self.names[start : self.ends[index]]

    def read(self, index: int) -> RawExample:
        """Reads one file. Raises CorruptRecord if that cannot be done."""
        try:
            with open(os.path.join(self.root, self.name(index)), "rb", buffering=0) as f:
                return RawExample(f.read(), int(self.labels[index]))
        except OSError as e:
            raise CorruptRecord(f"cannot be read ({e.strerror or e})") from e

    def describe(self, index: int) -> str:
        """A record's place, for people."""
        return os.fsdecode(os.path.join(self.root, self.name(index)))

    def known_labels(self) -> np.ndarray:
        """All labels: they are known without reading."""
        return self.labels


def _scan(folder: bytes, below: bytes, others: collections.Counter[str]) -> Iterator[bytes]:
    """Image files under a folder, as paths that begin with `below`; counts the other files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            path = os.path.join(below, entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from _scan(entry.path, path, others)
            elif entry.name.lower().endswith(_SUFFIXES):
                yield path
            else:
                others[os.fsdecode(os.path.splitext(entry.name)[1]) or "no suffix"] += 1


def _subfolders(folder: bytes) -> list[bytes]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(b"."))


def load_folder(path: str, split: str, *, classes: str | None) -> FolderSource:
    """Lists the images of a split of a folder.

    Args:
      path: the folder, `config.data.path`.
      split: a folder in it, or `all`; or a part of one.
      classes: "folder", "file_name", or None for a model without classes.

    Raises:
      UserError: there is no such folder or split, or it holds no images, or a class has none.
    """
    name, part = parse_split(split)
    if not os.path.isdir(path):
        raise UserError(
            f"config.data.path = {path!r}: no such folder; put the images there, as"
            " SPLIT/CLASS/NAME.jpg, or give another"
        )
    root = os.fsencode(os.path.join(path, name))
    if not os.path.isdir(root):
        if name != WHOLE:
            found = ", ".join(map(os.fsdecode, _subfolders(os.fsencode(path)))) or "none"
            raise UserError(
                f"config.data.train_split or eval_split = {split!r}: no such folder in {path};"
                f" there are: {found}; {WHOLE!r} is all of it, and 'all[:90%]' a part"
            )
        root = os.fsencode(path)
    try:
        return _listed(root, split, part, classes)
    except OSError as e:
        raise UserError(f"config.data.path = {path!r}: cannot be listed ({e})") from e


def _listed(
    root: bytes, split: str, part: tuple[str | None, str | None] | None, classes: str | None
) -> FolderSource:
    others: collections.Counter[str] = collections.Counter()
    folders = _subfolders(root)
    names = [name for below in folders for name in _scan(os.path.join(root, below), below, others)]
    in_root = list(_scan_flat(root, others))
    names = sorted(names + in_root)
    where = os.fsdecode(root)
    if not names:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(3)) or "none at all"
        raise UserError(
            f"{where}: no images there, expected files that end with {', '.join(SUFFIXES)};"
            f" other files: {kinds}"
        )
    if classes == "folder":
        if in_root:
            raise UserError(
                f"{where}: {len(in_root)} images outside of any class folder, the first"
                f" {os.fsdecode(in_root[0])}, expected CLASS/NAME.jpg; for a model without classes"
                " set --config.stage.num_classes=0"
            )
        class_names, of_name = folders, [name.partition(os.sep.encode())[0] for name in names]
    elif classes == "file_name":
        of_name = [os.path.basename(name).partition(b"_")[0] for name in names]
        class_names = sorted(set(of_name))
    else:
        class_names, of_name = [], []
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.fromiter((number[c] for c in of_name), np.int32, len(of_name))
    if not class_names:
        labels = np.zeros(len(names), np.int32)
    for i in np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0):
        raise UserError(
            f"{where}: class {os.fsdecode(class_names[i])!r} has no images; remove the folder, or"
            " fill it"
        )
    chosen = part_of(names, part, split)
    if chosen is not None:
        names, labels = [names[i] for i in chosen], labels[chosen]
    blob = b"".join(names)
    digest = hashlib.sha256(b"\0".join(names)).hexdigest()[:12]
    return FolderSource(
        root=root,
        names=blob,
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        labels=labels,
        class_names=tuple(map(os.fsdecode, class_names)),
        identity=f"folder:{split}:{len(names)} images:{digest}",
    )


def _scan_flat(root: bytes, others: collections.Counter[str]) -> Iterator[bytes]:
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(b".") or entry.is_dir():
                continue
            if entry.name.lower().endswith(_SUFFIXES):
                yield entry.name
            else:
                others[os.fsdecode(os.path.splitext(entry.name)[1]) or "no suffix"] += 1
