"""Folders of image files: a folder per class, classes in file names, or no classes.

    PATH/train/cat/1.jpg, PATH/train/dog/7.png     "folder": the class is the folder
    PATH/train/cat_1.jpg, PATH/train/dog_7.png     "adm_folder": it is what comes before the "_"
    PATH/train/1.jpg                               either, for a model without classes

A split is a folder in PATH; `all` is PATH itself. Classes are numbered in order of their
names. Links are followed, except back to a folder that they are in. The names of all files are
kept as one string, so that a million of them fit anywhere.
"""

import collections
import errno
import os
import stat

import numpy as np

from cascaded_diffusion.data import records
from cascaded_diffusion.data.decode import SUFFIXES
from cascaded_diffusion.data.records import CorruptRecord, DataMissing, RawExample
from cascaded_diffusion.data.splits import WHOLE, parse_split, part_of, split_problem
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import BucketPath, Stat, is_missing, path_of
from cascaded_diffusion.files.paths import describe_passed_over, is_litter, printable

_SUFFIXES = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
# Whatever its name says, a larger file is no image.
_MAX_FILE_BYTES = 2_000_000_000
# Errors that say something about a file. Others, as those of a network or a disk, may pass.
_OF_THE_FILE = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
)
_SLASH = os.fsencode(os.sep)
# The path of an image below a folder, its bytes, and its modification time in whole seconds.
_File = tuple[bytes, int, int]


class FolderSource(records.RawSource):
    """The image files below a folder, in order of their paths; `load_folder` makes it.

    `names` has the paths below the folder, one after the other, and `labels`, int32 [n], 0 for
    data without classes. `where` the folder is and what was `passed_over` are for people.
    """

    def __init__(
        self,
        root: bytes,
        split: str,
        files: list[_File],
        labels: np.ndarray,
        class_names: list[bytes],
        passed_over: str,
    ):
        names = [name for name, _, _ in files]
        self.where, self.passed_over, self._root = printable(root), passed_over, root
        # Where they lie in a bucket; None on a disk.
        there = path_of(os.fsdecode(root))
        self._bucket = there if isinstance(there, BucketPath) else None
        self.names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.labels, self.class_names = labels, tuple(map(os.fsdecode, class_names))
        self.class_counts = np.bincount(labels, minlength=len(class_names))
        digest = records.digest_of_files(names, (size for _, size, _ in files))
        self.identity = f"folder:{printable(split)}:{len(names)} images:{digest}"
        self.times = records.digest_of_files(names, (time for _, _, time in files))

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        return f"FolderSource({len(self)} files in {self.where})"

    def name(self, index: int) -> bytes:
        """The path of a file below the folder."""
        start = self._ends[index - 1] if index else 0
        return self.names[start : self._ends[index]]

    def read(self, index: int) -> RawExample:
        try:
            if self._bucket is not None:
                data = (self._bucket / os.fsdecode(self.name(index))).read_bytes()
                _check_size(len(data))
                return RawExample(data, int(self.labels[index]))
            with open(os.path.join(self._root, self.name(index)), "rb", buffering=0) as f:
                _check_size(os.fstat(f.fileno()).st_size)
                return RawExample(f.read(), int(self.labels[index]))
        except OSError as e:
            missing = is_missing(e) if self._bucket is not None else e.errno in _OF_THE_FILE
            if not missing:
                raise  # of the storage, which says nothing about the image
            raise CorruptRecord(f"cannot be read ({e.strerror or e})") from e

    def describe(self, index: int) -> str:
        return printable(os.path.join(self._root, self.name(index)))


def _check_size(size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise CorruptRecord(f"{size:,} bytes, expected at most {_MAX_FILE_BYTES:,}")


def _scan(
    folder: bytes,
    below: bytes,
    on_way: frozenset[tuple[int, int]],
    files: list[_File],
    others: collections.Counter[str],
) -> list[bytes]:
    """Adds what is in a folder to `files`, and to the counts by kind of `others`.

    `below` begins the paths in it: b"", or a path that ends with a slash. `on_way` has device
    and inode of the folders that it is in. Returns the folders directly in it, except hidden ones.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    folders: list[bytes] = []
    if here in on_way:
        others["links back"] += 1
        return folders
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if is_litter(name):
                others["hidden"] += 1
            elif is_folder:
                folders.append(name)
                _scan(entry.path, below + name + _SLASH, on_way | {here}, files, others)
            elif not is_file:
                others["broken links" if entry.is_symlink() else "pipes or devices"] += 1
            elif name.lower().endswith(_SUFFIXES):
                status = entry.stat()
                files.append((below + name, status.st_size, status[stat.ST_MTIME]))
            else:
                suffix = os.path.splitext(name)[1].lower()
                others[printable(suffix) or "without suffix"] += 1
    return folders


def _sort_objects(
    found: list[tuple[str, Stat]], files: list[_File], others: collections.Counter[str]
) -> list[bytes]:
    """As `_scan`, for what was listed in a bucket."""
    folders = set()
    for name, about in found:
        first, slash, _ = name.partition("/")
        if any(map(is_litter, name.split("/"))):
            others["hidden"] += 1
            continue
        if slash:
            folders.add(os.fsencode(first))
        if name.lower().endswith(SUFFIXES):
            files.append((os.fsencode(name), about.st_size, int(about.st_mtime)))
        else:
            others[printable(os.path.splitext(name)[1].lower()) or "without suffix"] += 1
    return sorted(folders)


def _list_bucket(
    path: BucketPath, name: str, files: list[_File], others: collections.Counter[str]
) -> tuple[bytes, list[bytes]]:
    """As `_list_folder`, in a bucket."""
    for root in (path / name, path) if name == WHOLE else (path / name,):
        if found := root.details():
            return os.fsencode(str(root)), _sort_objects(found, files, others)
    raise DataMissing(
        f"config.data.path = {str(path)!r}: no images in {root}; put them there, as"
        " SPLIT/CLASS/NAME.jpg, or give another"
    )


def _list_folder(
    path: str, name: str, split: str, files: list[_File], others: collections.Counter[str]
) -> tuple[bytes, list[bytes]]:
    """The folder of a split, and the folders in it; its images are added to `files`."""
    if not os.path.isdir(path):
        raise DataMissing(
            f"config.data.path = {path!r}: no such folder; put the images there, as"
            " SPLIT/CLASS/NAME.jpg, or give another"
        )
    root = os.fsencode(os.path.join(path, name))
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
    return root, _scan(root, b"", frozenset(), files, others)


def load_folder(path: str, split: str, *, classes: str | None) -> FolderSource:
    """Lists the images of a split (or a part of it) of the folder `path`.

    `classes` is "folder", "file_name", or None for a model without classes. Raises DataMissing if
    there is no such folder or split, UserError if it, or a class, has no images.
    """
    name = parse_split(split)["name"]
    files: list[_File] = []
    others = collections.Counter[str]()
    try:
        if isinstance(given := path_of(path), BucketPath):
            root, folders = _list_bucket(given, name, files, others)
        else:
            root, folders = _list_folder(path, name, split, files, others)
    except (OSError, RecursionError) as e:
        raise UserError(f"config.data.path = {path!r}: cannot be listed ({e})") from e
    files.sort()
    names = [name for name, _, _ in files]
    where, passed_over = printable(root), describe_passed_over(others)
    if not files:
        raise UserError(
            f"{where}: no images there, expected files that end with {', '.join(SUFFIXES)};"
            f" {passed_over or 'no other files either'}"
        )
    labels, class_names = np.zeros(len(files), np.int32), []
    if classes is not None:
        if classes == "folder":
            if in_root := [name for name in names if _SLASH not in name]:
                raise UserError(
                    f"{where}: {len(in_root)} images outside of any class folder, the first"
                    f" {printable(in_root[0])}, expected CLASS/NAME.jpg; for a model"
                    " without classes set --config.stage.num_classes=0"
                )
            of_name = [name.partition(_SLASH)[0] for name in names]
            class_names = sorted(folders)
        else:
            of_name = [os.path.basename(name).partition(b"_")[0] for name in names]
            class_names = sorted(set(of_name))
        if empty := sorted(set(class_names) - set(of_name)):
            bare = os.fsdecode(empty[0])
            raise UserError(f"{where}: class {bare!r} has no images; remove the folder, or fill it")
        number = {name: i for i, name in enumerate(class_names)}
        labels = np.fromiter((number[name] for name in of_name), np.int32, len(names))
    chosen = part_of(names, split)
    if chosen is not None:
        files, labels = [files[i] for i in chosen], labels[chosen]
    return FolderSource(root, split, files, labels, class_names, passed_over)
