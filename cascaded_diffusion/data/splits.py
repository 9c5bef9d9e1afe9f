"""Names of splits, and parts of splits: `train`, `train[:90%]`, `train[1000:]`.

TFDS reads its own. Here is the same notation for everything else. As files are often
sorted by class, a part is not a run of neighbours: records are ranked by a hash of what
they are called, and the part is of that ranking. It then holds a share of every class, and
is the same on every machine; what is in `train[:90%]` is never in `train[90%:]`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from cascaded_diffusion.errors import UserError

_BOUND = "-?[0-9]{1,15}%?"
_PART = re.compile(rf"(?P<name>[^\[\]]+)(\[(?P<low>{_BOUND})?:(?P<high>{_BOUND})?\])?")


def parse_split(split: str) -> tuple[str, tuple[str | None, str | None] | None]:
    """A split's name, and the bounds of the part that is wanted, if it is a part.

    Raises:
      UserError: it is not written as above.
    """
    match = _PART.fullmatch(split)
    if match is None:
        raise UserError(
            f"config.data.train_split or eval_split = {split!r}: expected a split's name, or a"
            " part of it like 'train[:90%]' or 'train[1000:]'"
        )
    part = (match["low"], match["high"]) if "[" in split else None
    return match["name"], part


def part_of(
    keys: Iterable[bytes], part: tuple[str | None, str | None] | None, split: str
) -> np.ndarray | None:
    """Which records are in a part: their indices in ascending order; None for all of them.

    Raises:
      UserError: none is.
    """
    if part is None:
        return None
    hashes = [hashlib.sha256(key).digest()[:8] for key in keys]
    ranked = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    low, high = (_bound(text, len(ranked)) for text in part)
    chosen = np.sort(ranked[slice(low, high)])
    if not len(chosen):
        raise UserError(
            f"config.data.train_split or eval_split = {split!r}: holds none of {len(ranked)} images"
        )
    return chosen


def _bound(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    if text.endswith("%"):
        return round(count * int(text[:-1]) / 100)
    return int(text)
