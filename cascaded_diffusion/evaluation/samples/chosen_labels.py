"""Lists of labels, as people give them: numbers, names of classes, or a file of either."""

from __future__ import annotations

import pathlib
import tokenize

import numpy as np

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import check_labels
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.paths import check_local_path
from cascaded_diffusion.runtime.run_data import trained_classes
from cascaded_diffusion.runtime.run_folder import RunFolder

_NESTED = (SyntaxError, tokenize.TokenError, MemoryError, RecursionError)
_ARRAYS = (".npz", ".npy")


def read_labels(
    text: str, folder: RunFolder, num_classes: int
) -> tuple[np.ndarray, dict[int, str]]:
    """The labels that `--labels` lists.

    Args:
      text: numbers or names between commas, or the path of a .txt, .npz or .npy file.
      folder: the run, which knows the names of its classes.
      num_classes: of the run.

    Returns:
      int32 [m], and the names of those that were given by name.

    Raises:
      UserError: the text or file is not understood, or an item is no class.
    """
    is_array = text.lower().endswith(_ARRAYS)
    items = _array(text) if is_array else _items(text)
    names = {name: i for i, name in enumerate(trained_classes(folder) or ())}
    if not names and any(isinstance(item, str) for item in items):
        raise UserError(
            f"--labels={text}: the run in {folder.path} does not say what its classes are called;"
            " give numbers"
        )
    for item in () if is_array else items:
        if isinstance(item, int) and names.get(str(item), item) != item:
            raise UserError(
                f"--labels={text}: {item} may mean the class called {str(item)!r}, which is number"
                f" {names[str(item)]}, or class number {item}; give the numbers as a .npy file"
            )
    labels, named = [], {}
    for item in items:
        if isinstance(item, str):
            if item not in names:
                known = ", ".join(list(names)[:10]) + ", ..." * (len(names) > 10)
                raise UserError(f"--labels={text}: no class is called {item!r}; there are: {known}")
            named[names[item]] = item
        labels.append(names[item] if isinstance(item, str) else item)
    check_labels(np.asarray(labels), num_classes, f"--labels={text}")
    return np.asarray(labels, np.int32), named


def _items(text: str) -> list[int | str]:
    if not text.lower().endswith(".txt"):
        items = text.split(",")
    else:
        try:
            items = _existing(text).read_text().splitlines()
        except (OSError, ValueError) as e:
            raise UserError(f"--labels={text}: cannot be read as text ({e})") from e
        while items and not items[-1].strip():
            items.pop()
    items = [item.strip() for item in items]
    if not items or "" in items:
        raise UserError(f"--labels={text}: expected classes, by numbers or names")
    return [_number_or_name(item) for item in items]


def _number_or_name(item: str) -> int | str:
    digits = item.removeprefix("-")
    # `int` would refuse thousands of digits; no class has that many.
    return int(item) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else item


def _existing(text: str) -> pathlib.Path:
    path = check_local_path(text, "--labels")
    if not path.is_file():
        raise UserError(f"--labels={text}: no such file")
    return path


def _array(text: str) -> list[int | str]:
    path = _existing(text)
    try:
        if path.suffix.lower() == ".npz":
            arrays = read_arrays(path, ("arr_0", "arr_1"))
            labels = arrays["arr_1" if "arr_1" in arrays else "arr_0"]
        else:
            # Mapped, an array that the file is too short for is an error, and takes no memory.
            labels = np.load(path, mmap_mode="r", allow_pickle=False)
    # A damaged header raises some of these, one with thousands of brackets the last ones.
    except (OSError, ValueError, EOFError, OverflowError, KeyError, TypeError, *_NESTED) as e:
        raise UserError(
            f"--labels={path}: cannot be read, expected an array of labels, in an .npz as arr_1 (or"
            f" arr_0) ({e})"
        ) from e
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        raise UserError(
            f"--labels={path}: {labels.dtype} {labels.shape}, expected a list of integers"
        )
    return labels.tolist()
