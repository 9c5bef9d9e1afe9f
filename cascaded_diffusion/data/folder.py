"""Folders of image files: a folder per class, classes in file names, or no classes.

    PATH/train/cat/1.jpg, PATH/train/dog/7.png     "folder": the class is the folder
    PATH/train/cat_1.jpg, PATH/train/dog_7.png     "adm_folder": it is what comes before the "_"
    PATH/train/1.jpg                               either, for a model without classes

A split is a folder in PATH; `all` is PATH itself. Classes are numbered in order of their
names. Links are followed, except back to a folder that they are in. The names of all files are
kept as one string, so that a million of them fit anywhere.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable

import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.decode import SUFFIXES
from cascaded_diffusion.data.digests import digest_of_files, sample_digest
from cascaded_diffusion.data.records import DataMissing, RawExample
from cascaded_diffusion.data.splits import Part, parse_split, part_of, split_problem
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.litter import describe_passed_over, is_litter
from cascaded_diffusion.files.paths import printable

_SUFFIXES = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
# Whatever its name says, a larger file is no image.
_MAX_FILE_BYTES = 2_000_000_000
WHOLE = "all"
_SLASH = os.fsencode(os.sep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource:
    """The image files below a folder, in order of their paths.

    Attributes:
      root: the folder.
      names: the paths of the files below it, one after the other.
      ends: int64 [n], where each path ends in `names`.
      labels: int32 [n]; 0 without classes.
      class_names: in order of label; empty without classes.
      identity: a digest of the files' names and sizes.
      times: a digest of their modification times.
      passed_over: how many files of which kinds are no images, for people; "" for none.
    """

    root: bytes
    names: bytes
    ends: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    identity: str
    times: str
    passed_over: str

    fixed_shape = None

    def __len__(self) -> int:
        return len(self.ends)

    def __repr__(self) -> str:
        return f"FolderSource({len(self)} files in {os.fsdecode(self.root)})"

    @property
    def where(self) -> str:
        """The folder, for people."""
        return printable(self.root)

    def name(self, index: int) -> bytes:
        """The path of a file below `root`."""
        start = self.ends[index - 1] if index else 0
        return self.names[start : self.ends[index]]

    def read(self, index: int) -> RawExample:
        try:
            with open(os.path.join(self.root, self.name(index)), "rb", buffering=0) as f:
                size = os.fstat(f.fileno()).st_size
                if size > _MAX_FILE_BYTES:
                    raise CorruptRecord(f"{size:,} bytes, expected at most {_MAX_FILE_BYTES:,}")
                return RawExample(f.read(), int(self.labels[index]))
        except OSError as e:
            raise CorruptRecord(f"cannot be read ({e.strerror or e})") from e

    def describe(self, index: int) -> str:
        return printable(os.path.join(self.root, self.name(index)))

    def class_counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.class_names))

    def content_sample(self) -> str:
        return sample_digest(self)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


@dataclasses.dataclass(frozen=True)
class _Found:
    """What is in a folder.

    Attributes:
      folders: the folders directly in it, except hidden ones.
      images: (path below the folder, bytes, modification time in seconds) of each.
      others: the number of other files by kind.
    """

    folders: list[bytes] = dataclasses.field(default_factory=list)
    images: list[tuple[bytes, int, int]] = dataclasses.field(default_factory=list)
    others: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def scan(self, folder: bytes, below: bytes, on_way: frozenset[tuple[int, int]]) -> None:
        """Adds what is in a folder.

        `below` begins the paths in it: b"", or a path that ends with a slash. `on_way` has
        device and inode of the folders that it is in.
        """
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in on_way:
            self.others["links back"] += 1
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if is_litter(name):
                    self.others["hidden"] += 1
                elif _is(entry.is_dir):
                    if not below:
                        self.folders.append(name)
                    self.scan(entry.path, below + name + _SLASH, on_way | {here})
                elif not _is(entry.is_file):
                    self.others["broken links" if entry.is_symlink() else "pipes or devices"] += 1
                elif name.lower().endswith(_SUFFIXES):
                    status = entry.stat()
                    # Item 8 of a status is the modification time in whole seconds.
                    self.images.append((below + name, status.st_size, status[8]))
                else:
                    suffix = os.path.splitext(name)[1].lower()
                    self.others[printable(suffix) or "without suffix"] += 1


def load_folder(path: str, split: str, *, classes: str | None) -> FolderSource:
    """Lists the images of a split of a folder.

    Args:
      path: the folder, `config.data.path`.
      split: a folder in it, or `all`; or a part of either.
      classes: "folder", "file_name", or None for a model without classes.

    Raises:
      DataMissing: there is no such folder or split.
      UserError: it holds no images, or a class has none.
    """
    name, part = parse_split(split)
    if not os.path.isdir(path):
        raise DataMissing(
            f"config.data.path = {path!r}: no such folder; put the images there, as"
            " SPLIT/CLASS/NAME.jpg, or give another"
        )
    root = os.fsencode(os.path.join(path, name))
    try:
        if not os.path.isdir(root):
            if name != WHOLE:
                with os.scandir(path) as entries:
                    there = sorted(e.name for e in entries if e.is_dir() and not is_litter(e.name))
                problem = (
                    f"no such folder in {path}; there are:"
                    f" {', '.join(map(printable, there)) or 'none'}; {WHOLE!r} is all of it, and"
                    " 'all[:90%]' a part"
                )
                raise DataMissing(split_problem(split, problem))
            root = os.fsencode(path)
        return _listed(root, split, part, classes)
    except (OSError, RecursionError) as e:
        raise UserError(f"config.data.path = {path!r}: cannot be listed ({e})") from e


def _listed(root: bytes, split: str, part: Part, classes: str | None) -> FolderSource:
    found = _Found()
    found.scan(root, b"", frozenset())
    images, passed_over = sorted(found.images), describe_passed_over(found.others)
    names = [name for name, _, _ in images]
    where = printable(root)
    if not names:
        raise UserError(
            f"{where}: no images there, expected files that end with {', '.join(SUFFIXES)};"
            f" {passed_over or 'no other files either'}"
        )
    if classes == "folder":
        in_root = [name for name in names if _SLASH not in name]
        if in_root:
            raise UserError(
                f"{where}: {len(in_root)} images outside of any class folder, the first"
                f" {printable(in_root[0])}, expected CLASS/NAME.jpg; for a model"
                " without classes set --config.stage.num_classes=0"
            )
        class_names = sorted(found.folders)
        of_name = [name.partition(_SLASH)[0] for name in names]
    elif classes == "file_name":
        of_name = [os.path.basename(name).partition(b"_")[0] for name in names]
        class_names = sorted(set(of_name))
    else:
        class_names, of_name = [], []
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.zeros(len(names), np.int32)
    if class_names:
        labels = np.fromiter((number[c] for c in of_name), np.int32, len(names))
    for i in np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0):
        raise UserError(
            f"{where}: class {os.fsdecode(class_names[i])!r} has no images; remove the folder, or"
            " fill it"
        )
    chosen = part_of(names, part, split)
    if chosen is not None:
        images, labels = [images[i] for i in chosen], labels[chosen]
        names = [name for name, _, _ in images]
    digest = digest_of_files(names, (size for _, size, _ in images))
    return FolderSource(
        root=root,
        names=b"".join(names),
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        labels=labels,
        class_names=tuple(map(os.fsdecode, class_names)),
        identity=f"folder:{printable(split)}:{len(names)} images:{digest}",
        times=digest_of_files(names, (time for _, _, time in images)),
        passed_over=passed_over,
    )
