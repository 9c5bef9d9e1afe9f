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
    """Whether two splits have images in common, as far as their notation tells.

    Bounds in percent and in numbers of images are not compared with each other.
    """
    if first == second or WHOLE in (first, second):
        return True
    matches = [_PART.fullmatch(split) for split in (first, second)]
    if None in matches or matches[0]["name"] != matches[1]["name"]:
        return False
    (low, high), (other_low, other_high) = bounds = [_bounds(match) for match in matches]
    if (None, None) in bounds or None in (low or other_low, high or other_high):
        return True  # one is the whole split, or both hold its first or its last image
    given = [text for text in (low, high, other_low, other_high) if text]
    if all(text.endswith("%") for text in given):
        size, numbers = 100, [int(text[:-1]) for text in given]
    elif any("%" in text for text in given):
        return False
    else:
        size, numbers = 2 * 10**15, [int(text) for text in given]
    at = {text: n + size * (n < 0) for text, n in zip(given, numbers, strict=True)}
    if size != 100 and min(numbers) < 0 <= max(numbers):
        return False  # from the front and from the back, of how many is not known
    return max(at.get(low, 0), at.get(other_low, 0)) < min(
        at.get(high, size), at.get(other_high, size)
    )


def _bounds(match: re.Match[str]) -> tuple[str | None, str | None]:
    """The bounds of a part as they are written; None where it is open."""
    low, high = match["low"], match["high"]
    if low is not None and (low == "-100%" or not int(low.rstrip("%"))):
        low = None
    return low, None if high == "100%" else high


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
