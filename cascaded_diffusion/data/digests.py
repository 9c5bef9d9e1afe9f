"""Digests by which images are recognized as those that a run or prepared data began with.

Three digests tell which images a data set consists of, each more certain and more expensive
than the one before: its `identity` (names and sizes, or the contents of arrays in memory), the
modification `times` of its files, and a digest of some contents (`sample_digest`) or of all of
them (`ContentDigest`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.records import RawExample, RawSource

_SAMPLE = 256


class ContentDigest:
    """SHA-256 over images as they are stored, and over their labels if `labels`, while reading."""

    def __init__(self, *, labels: bool):
        self._digest, self._labels = hashlib.sha256(), labels

    def read(self, raw: RawSource, index: int) -> RawExample:
        """Reads a record and adds it. A record that cannot be read is added as such."""
        try:
            image, label = example = raw.read(index)
        except CorruptRecord:
            self._digest.update(b"unreadable\n")
            raise
        if isinstance(image, np.ndarray):
            self._digest.update(f"{image.shape}\n".encode())
            image = np.ascontiguousarray(image).tobytes()
        self._digest.update(f"{label if self._labels else ''} {len(image)}\n".encode())
        self._digest.update(image)
        return example

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def sample_digest(raw: RawSource) -> str:
    """SHA-256 of at most 256 images spread evenly over a data set.

    Labels are left out, since a model without classes does not see them.
    """
    contents, count = ContentDigest(labels=False), min(_SAMPLE, len(raw))
    for i in range(count):
        with contextlib.suppress(CorruptRecord):
            contents.read(raw, i * len(raw) // count)
    return contents.hexdigest()


def digest_of_files(names: Iterable[bytes], numbers: Iterable[int]) -> str:
    """The first 12 digits of a SHA-256 over names and a number for each, such as its size."""
    digest = hashlib.sha256(b"\0".join(names))
    digest.update(b"\0\0")
    digest.update(np.fromiter(numbers, "<i8").tobytes())
    return digest.hexdigest()[:12]


def digest_of_json(value: Any) -> str:
    """SHA-256 of a JSON value, with its keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
