"""Data sets that fit in memory."""

from __future__ import annotations

import hashlib

import numpy as np

from cascaded_diffusion.data.records import RawExample, RawSource
from cascaded_diffusion.data.splits import parse_split, part_of


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
        chosen = part_of((b"%d" % i for i in range(len(images))), parse_split(split)[1], split)
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
