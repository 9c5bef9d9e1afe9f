"""Random-access data sources: one protocol, chosen by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Protocol, TypedDict

import numpy as np

from cascaded_diffusion.config import DataConfig, StageConfig
from cascaded_diffusion.data import builtin, shapes
from cascaded_diffusion.errors import UserError


class Record(TypedDict):
    """One example: `image` uint8 [H, W, C], `label` int32 scalar."""

    image: np.ndarray
    label: np.int32


class Source(Protocol):
    """What the loader needs of a data set. The index of a record is its identity."""

    num_classes: int
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A data set that fits in memory.

    Attributes:
      images: uint8 [n, H, W, C].
      labels: int32 [n].
      num_classes: labels are below it.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images[index], "label": self.labels[index]}

    def __repr__(self) -> str:
        # grain puts this into its error messages; the pixels do not belong there.
        return f"ArraySource({len(self)} images of {self.image_shape})"


def _mnist(split: str) -> Source:
    return ArraySource(*builtin.load_mnist(split), num_classes=10)


def _shapes(split: str) -> Source:
    return ArraySource(*shapes.load_shapes(split), num_classes=shapes.NUM_CLASSES)


SOURCES: dict[str, Callable[[str], Source]] = {"mnist": _mnist, "shapes": _shapes}


def load_source(config: DataConfig, split: str, stage: StageConfig) -> Source:
    """The data set `config.name`, checked to be what the stage expects.

    Raises:
      UserError: unknown name or split, or a data set of another size, number of
        channels or number of classes than configured.
    """
    if config.name not in SOURCES:
        close = difflib.get_close_matches(config.name, SOURCES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(
            f"config.data.name = {config.name!r}: expected one of"
            f" {', '.join(map(repr, SOURCES))}{hint}"
        )
    source = SOURCES[config.name](split)
    height, width, channels = source.image_shape
    for key, value, found in (
        ("data.resolution", config.resolution, height),
        ("data.resolution", config.resolution, width),
        ("stage.channels", stage.channels, channels),
    ):
        if value != found:
            raise UserError(f"config.{key} = {value}: expected {found}, as {config.name!r} has")
    if stage.num_classes and stage.num_classes != source.num_classes:
        raise UserError(
            f"config.stage.num_classes = {stage.num_classes}: expected {source.num_classes}, as"
            f" {config.name!r} has, or 0 for a model without classes"
        )
    return source


def examples(source: Source, indices: Iterable[int]) -> dict[str, np.ndarray]:
    """Chosen examples in memory: `image` uint8 [n, H, W, C], `label` int32 [n]."""
    records = [source[int(i)] for i in indices]
    return {
        "image": np.stack([record["image"] for record in records]),
        "label": np.asarray([record["label"] for record in records], np.int32),
    }


def spread_examples(source: Source, *, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Examples spread evenly over a data set, for a picture of `rows` x `columns`.

    In a set sorted by class, as many class folders are, each column holds one class
    or neighbouring ones.

    They come in the order of the picture, row by row.
    """
    spread = np.linspace(0, len(source) - 1, rows * columns).astype(int)
    return examples(source, spread.reshape(columns, rows).T.reshape(-1))
