"""ADM-style `.npz` files as a data set: `arr_0` uint8 NHWC, `arr_1` labels. Held in memory."""

from __future__ import annotations

import os
import zipfile
import zlib

import numpy as np

from cascaded_diffusion.data.raw import ArraySource, array_source
from cascaded_diffusion.data.splits import parse_split
from cascaded_diffusion.errors import UserError

# What numpy and zipfile raise on a file that is damaged or something else.
_DAMAGED = (
    OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
WHOLE = "all"


def load_npz(path: str, split: str, *, num_classes: int) -> ArraySource:
    """Reads a file.

    Args:
      path: of the file, whose one split is `all`; or of a folder with SPLIT.npz in it.
      split: which, or a part of it.
      num_classes: labels must be below it, and each there; 0 for data without classes.

    Raises:
      UserError: there is no such file, it is damaged, or its arrays are not as above.
    """
    name, _ = parse_split(split)
    if os.path.isdir(path):
        file = os.path.join(path, f"{name}.npz")
        if not os.path.exists(file):
            found = sorted(f.removesuffix(".npz") for f in os.listdir(path) if f.endswith(".npz"))
            raise UserError(
                f"config.data.train_split or eval_split = {split!r}: no {file}; splits there:"
                f" {', '.join(found) or 'none'}"
            )
    else:
        file = path
        if not os.path.exists(file):
            raise UserError(f"config.data.path = {path!r}: no such .npz file, or folder of them")
        if name != WHOLE:
            raise UserError(
                f"config.data.train_split or eval_split = {split!r}: {path} is one file, whose"
                f" split is {WHOLE!r}, with parts like 'all[:90%]'"
            )
    try:
        with np.load(file, allow_pickle=False) as stored:
            images = stored["arr_0"]
            labels = stored["arr_1"] if "arr_1" in stored.files else None
    except _DAMAGED as e:
        raise UserError(
            f"{file}: cannot be read, expected an .npz with arr_0 (images) that is whole ({e})"
        ) from e
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise UserError(
            f"{file}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, height, width,"
            " channels)"
        )
    if num_classes == 0:
        labels = np.zeros(len(images), np.int32)
    else:
        _check_labels(file, labels, len(images), num_classes)
    names = tuple(map(str, range(num_classes)))
    return array_source("npz", split, images, labels.astype(np.int32), names)


def _check_labels(file: str, labels: np.ndarray | None, count: int, num_classes: int) -> None:
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
    for k in np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0):
        raise UserError(
            f"{file}: class {k} has no images, of config.stage.num_classes = {num_classes}"
        )
