"""ADM-style `.npz` files as a data set, held in memory.

arr_0        uint8 [n, height, width, channels]
arr_1        integer labels [n], for a model with classes
class_names  text [K], if there are names
"""

from __future__ import annotations

import os

import numpy as np

from cascaded_diffusion.data.arrays import ArraySource
from cascaded_diffusion.data.records import DataMissing
from cascaded_diffusion.data.splits import WHOLE, parse_split, split_problem
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.npz_archive import layout_hint, read_arrays
from cascaded_diffusion.files.paths import is_litter


def load_npz(path: str, split: str, *, num_classes: int) -> ArraySource:
    """Reads a split, or a part of it, of a file (`all`) or of a folder with SPLIT.npz in it.

    All labels below `num_classes` must occur, and no others; 0 is for data without classes.

    Raises:
      DataMissing: there is no such file.
      UserError: it is damaged, or its arrays are not as above.
    """
    name, _ = parse_split(split)
    if os.path.isdir(path):
        file = os.path.join(path, f"{name}.npz")
        if not os.path.exists(file):
            found = sorted(
                entry.removesuffix(".npz")
                for entry in os.listdir(path)
                if entry.endswith(".npz") and not is_litter(entry)
            )
            problem = f"no {file}; splits there: {', '.join(found) or 'none'}"
            raise DataMissing(split_problem(split, problem))
    else:
        file = path
        if not os.path.exists(file):
            raise DataMissing(f"config.data.path = {path!r}: no such .npz file, or folder of them")
        if name != WHOLE:
            problem = f"{path} is one file, whose split is {WHOLE!r}, with parts like 'all[:90%]'"
            raise UserError(split_problem(split, problem))
    try:
        stored = read_arrays(file, ("arr_0", "arr_1", "class_names"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"{file}: cannot be read, expected an .npz with arr_0 (images) that is whole ({e})"
        ) from e
    if "arr_0" not in stored:
        raise UserError(f"{file}: no images (arr_0)")
    images = stored["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{file}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, height, width, 1"
            f" or 3){layout_hint(images.shape)}"
        )
    labels, names = np.zeros(len(images), np.int32), ()
    if num_classes:
        labels = _checked_labels(file, stored.get("arr_1"), len(images), num_classes)
        names = _class_names(file, stored.get("class_names"), num_classes)
    return ArraySource(images, labels, names, name="npz", split=split)


def _class_names(file: str, names: np.ndarray | None, num_classes: int) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(num_classes)))
    if names.dtype.kind not in "US" or names.shape != (num_classes,):
        raise UserError(
            f"{file}: class_names is {names.dtype} {names.shape}, expected {num_classes} texts, as"
            " config.stage.num_classes says"
        )
    try:
        listed = names.tolist()
    except ValueError as e:  # numbers that are no characters
        raise UserError(f"{file}: class_names holds no text ({e})") from e
    found = tuple(os.fsdecode(name) for name in listed)
    if len(set(found)) < num_classes:
        raise UserError(f"{file}: class_names has the same name twice, expected different ones")
    return found


def _checked_labels(
    file: str, labels: np.ndarray | None, count: int, num_classes: int
) -> np.ndarray:
    if labels is None:
        raise UserError(
            f"{file}: no labels (arr_1); for a model without classes set"
            " --config.stage.num_classes=0"
        )
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{file}: arr_1 is {labels.dtype} {labels.shape}, expected {count} integer labels"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{file}: labels from {labels.min()} to {labels.max()}, expected 0 to"
            f" {num_classes - 1} (config.stage.num_classes = {num_classes})"
        )
    labels = labels.astype(np.int32)
    for k in np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0):
        raise UserError(
            f"{file}: class {k} has no images, of config.stage.num_classes = {num_classes}"
        )
    return labels
