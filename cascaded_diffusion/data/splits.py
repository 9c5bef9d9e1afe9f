"""Names of splits, and of parts of splits: `train`, `train[:90%]`, `train[1000:]`.

TFDS reads its own; this is the same notation for all other data. Files are often sorted by
class, so a part is no run of neighbours: records are ranked by a hash of their names, and the
part is taken from that ranking. It then has a share of every class, is the same on every
machine, and `train[:90%]` and `train[90%:]` have nothing in common.
"""

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from cascaded_diffusion.errors import UserError

# The split that is all images of a folder or file.
WHOLE = "all"
_BOUND = "-?[0-9]{1,15}%?"
_PART = re.compile(rf"(?P<name>[^\[\]]+)(\[(?P<low>{_BOUND})?:(?P<high>{_BOUND})?\])?")


def split_problem(split: str, problem: str) -> str:
    """The line about a split that cannot be used."""
    return f"config.data.train_split or eval_split = {split!r}: {problem}"


def parse_split(split: str) -> re.Match[str]:
    """The `name` of a split, and the bounds of the part of it, `low` and `high`, if there are any.

    Raises UserError if it is not written as above.
    """
    match = _PART.fullmatch(split)
    if match is None:
        expected = "a split's name, or a part of it like 'train[:90%]' or 'train[1000:]'"
        raise UserError(split_problem(split, f"expected {expected}"))
    return match


def overlap(first: str, second: str) -> bool:
    """Whether two splits have images in common, as far as bounds in percent tell."""
    if first == second:
        return True
    matches = [_PART.fullmatch(split) for split in (first, second)]
    if None in matches or matches[0]["name"] != matches[1]["name"]:
        return False
    percents = [_percents(match) for match in matches]
    if (0, 100) in percents:
        return True
    if None in percents:
        return False
    (low, high), (other_low, other_high) = percents
    return max(low, other_low) < min(high, other_high)


def _percents(match: re.Match[str]) -> tuple[int, int] | None:
    """The bounds of a part in percent, or None if they are numbers of images."""
    texts = (match["low"] or "0%", match["high"] or "100%")
    if not all(text.endswith("%") for text in texts):
        return None
    low, high = (int(text[:-1]) for text in texts)
    return low + 100 * (low < 0), high + 100 * (high < 0)


def check_train_or_test(split: str, data: str) -> None:
    """Raises UserError for a split that data with the splits "train" and "test" does not have."""
    if split not in ("train", "test"):
        expected = f"expected 'train' or 'test', the splits of {data!r}"
        raise UserError(split_problem(split, expected))


def part_of(keys: Iterable[bytes], split: str) -> np.ndarray | None:
    """The record indices of the part that `split` names, in ascending order; None for all records.

    `keys` are the names of all records. Raises UserError if the part is empty.
    """
    bounds = parse_split(split).group("low", "high")
    if "[" not in split:
        return None
    hashes = [hashlib.sha256(key).digest()[:8] for key in keys]
    ranked = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    low, high = (_bound(text, len(ranked)) for text in bounds)
    chosen = np.sort(ranked[slice(low, high)])
    if not len(chosen):
        raise UserError(split_problem(split, f"holds none of {len(ranked)} images"))
    return chosen


def _bound(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    if text.endswith("%"):
        percent = int(text[:-1])
        # From the end: of few images, -1 % may be none, and a slice from -0 would be all.
        return round(count * percent / 100) + (count if percent < 0 else 0)
    return int(text)
