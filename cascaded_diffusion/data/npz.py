"""ADM-style `.npz` files as a data set, held in memory.

arr_0        uint8 [n, height, width, channels]
arr_1        integer labels [n], for a model with classes
class_names  text [K], if there are names
"""

from __future__ import annotations

import os

import numpy as np

from cascaded_diffusion.data.raw import ArraySource, DataMissing, array_source
from cascaded_diffusion.data.splits import parse_split
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.litter import is_litter
from cascaded_diffusion.files.npz_archive import read_arrays

WHOLE = "all"


def load_npz(path: str, split: str, *, num_classes: int) -> ArraySource:
    """Reads a file.

    Args:
      path: of the file, whose one split is `all`; or of a folder with SPLIT.npz in it.
      split: which, or a part of it.
      num_classes: labels must be below it, and each there; 0 for data without classes.

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
            raise DataMissing(
                f"config.data.train_split or eval_split = {split!r}: no {file}; splits there:"
                f" {', '.join(found) or 'none'}"
            )
    else:
        file = path
        if not os.path.exists(file):
            raise DataMissing(f"config.data.path = {path!r}: no such .npz file, or folder of them")
        if name != WHOLE:
            raise UserError(
                f"config.data.train_split or eval_split = {split!r}: {path} is one file, whose"
                f" split is {WHOLE!r}, with parts like 'all[:90%]'"
            )
    try:
        stored = read_arrays(file, ("arr_0", "arr_1", "class_names"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"{file}: cannot be read, expected an .npz with arr_0 (images) that is whole ({e})"
        ) from e
    if "arr_0" not in stored:
        raise UserError(f"{file}: no images (arr_0)")
    images = stored["arr_0"]
    _check_images(file, images)
    labels, names = np.zeros(len(images), np.int32), ()
    if num_classes:
        labels = _checked_labels(file, stored.get("arr_1"), len(images), num_classes)
        names = _class_names(file, stored.get("class_names"), num_classes)
    return array_source("npz", split, images, labels, names)


def _check_images(file: str, images: np.ndarray) -> None:
    shape = images.shape
    if images.dtype == np.uint8 and images.ndim == 4 and shape[3] in (1, 3):
        return
    remedy = ""
    if images.ndim == 4 and shape[1] in (1, 3):
        remedy = (
            ": it looks like (n, channels, height, width); store arr_0.transpose(0, 2, 3, 1)"
            " instead"
        )
    elif images.ndim == 3:
        remedy = ": of grey images, store arr_0[..., None] instead"
    raise UserError(
        f"{file}: arr_0 is {images.dtype} {shape}, expected uint8 (n, height, width, 1 or 3)"
        f"{remedy}"
    )


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
