"""Data sets by name, as a model sees them: random access to images of one size.

A `Source` is a reader (of the data set itself, or of what `prepare` made of it) and a guard
against records that cannot be read.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from cascaded_diffusion.config import MAX_PIXELS, DataConfig, StageConfig
from cascaded_diffusion.data import builtin, folder, npz, prepared, shapes, tfds_source
from cascaded_diffusion.data.corruption import CorruptionGuard
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.raw import ArraySource, RawSource, array_source
from cascaded_diffusion.data.splits import parse_split
from cascaded_diffusion.data.transforms import CROPS, resized
from cascaded_diffusion.errors import UserError


class Sized(TypedDict):
    """`image` uint8 [H, W, C], `label` int32 scalar, and `low_res` [h, w, C] where it is stored."""

    image: np.ndarray
    label: np.int32
    low_res: NotRequired[np.ndarray]


class Record(Sized):
    """One example: `index` is which, `skipped` the corrupt one that it stands in for, or -1."""

    index: np.int64
    skipped: np.int64


class Reader(Protocol):
    """Random access to images of one size.

    Attributes:
      image_shape: (H, W, C).
      low_res_shape: (h, w, C) where low-res images are stored, else None.
      class_names: in order of label; empty for data without classes.
      identity: what the data set is, wherever it lies.
    """

    image_shape: tuple[int, int, int]
    low_res_shape: tuple[int, int, int] | None
    class_names: tuple[str, ...]
    identity: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sized:
        """Raises CorruptRecord for what cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """A record's place, for people."""
        ...

    def known_labels(self) -> np.ndarray | None:
        """int32 [n] where they are known without reading every record."""
        ...


class ProcessingReader:
    """Decodes, crops and resizes the images of a data set as they are read.

    Args:
      raw: the data set.
      config: how.
      channels: of the images.
      low_res_resolution: where the low-res image is to be made from the crop too.
      say: told the first image of each kind that was converted to 8-bit RGB or grey.

    Attributes:
      converted: how many images were, by kind.
    """

    def __init__(
        self,
        raw: RawSource,
        config: DataConfig,
        *,
        channels: int,
        low_res_resolution: int | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.raw, self._config, self._channels, self._say = raw, config, channels, say
        sizes = [config.resolution] + ([low_res_resolution] if low_res_resolution else [])
        self.image_shape = (sizes[0], sizes[0], channels)
        self.low_res_shape = (sizes[1], sizes[1], channels) if low_res_resolution else None
        self.class_names, self.identity = raw.class_names, raw.identity
        self.converted: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.raw)

    def read(self, index: int) -> Sized:
        image, label = self.raw.read(index)
        if self.class_names and not 0 <= label < len(self.class_names):
            raise UserError(
                f"{self.describe(index)}: label {label} is out of range, expected 0 to"
                f" {len(self.class_names) - 1}; take another config.data.train_split or"
                " eval_split, or --config.stage.num_classes=0 for a model without classes"
            )
        return self.sized(self.decoded(image, index), label)

    def decoded(self, image: bytes | np.ndarray, index: int) -> np.ndarray:
        """The pixels of an image: uint8 [H, W, C] of any size."""
        if isinstance(image, np.ndarray):
            return image
        pixels, note = decode_image(
            image, channels=self._channels, max_pixels=self._config.max_pixels or MAX_PIXELS
        )
        if note is not None:
            self.converted[note] += 1
            if self.converted[note] == 1 and self._say is not None:
                self._say(
                    f"converted: {self.describe(index)} ({note}) to 8-bit"
                    f" {'grey' if self._channels == 1 else 'RGB'}; so are others like it"
                )
        return pixels

    def sized(self, pixels: np.ndarray, label: int) -> Sized:
        """Cropped, and at every size that is wanted: each from the same crop."""
        crop = CROPS[self._config.crop](pixels)
        method = self._config.resize
        record: Sized = {
            "image": resized(crop, self.image_shape[0], method),
            "label": np.int32(label),
        }
        if self.low_res_shape is not None:
            record["low_res"] = resized(crop, self.low_res_shape[0], method)
        return record

    def describe(self, index: int) -> str:
        return self.raw.describe(index)

    def known_labels(self) -> np.ndarray | None:
        return self.raw.known_labels()


class Source:
    """What the loader and evaluation read: `len`, and records by index.

    Args:
      reader: of the images.
      config: what to do about corrupt records.
    """

    def __init__(self, reader: Reader, config: DataConfig):
        self.reader, self.guard = reader, CorruptionGuard(config, len(reader))
        self.image_shape, self.low_res_shape = reader.image_shape, reader.low_res_shape
        self.class_names, self.identity = reader.class_names, reader.identity

    @property
    def num_classes(self) -> int:
        """0 for data without classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Record:
        """Raises UserError for a corrupt record, if the policy says so."""
        index = int(index)
        at, record = self.guard.first_good(index, self.reader.read, self.reader.describe)
        skipped = -1 if at == index else index
        return {**record, "index": np.int64(at), "skipped": np.int64(skipped)}

    def __repr__(self) -> str:
        # grain puts this into its error messages.
        return f"Source({self.identity})"


def _mnist(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    images, labels = builtin.load_mnist(parse_split(split)[0])
    return array_source("mnist", split, images, labels, tuple(map(str, range(10))))


def _shapes(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    images, labels = shapes.load_shapes(parse_split(split)[0])
    return array_source("shapes", split, images, labels, shapes.CLASS_NAMES)


def _folder(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    return folder.load_folder(config.path, split, classes="folder" if stage.num_classes else None)


def _adm_folder(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    return folder.load_folder(
        config.path, split, classes="file_name" if stage.num_classes else None
    )


def _npz(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    return npz.load_npz(config.path, split, num_classes=stage.num_classes)


# All that are not TFDS's.
SOURCES: dict[str, Callable[[DataConfig, str, StageConfig], RawSource]] = {
    "mnist": _mnist,
    "shapes": _shapes,
    "folder": _folder,
    "adm_folder": _adm_folder,
    "npz": _npz,
}


def load_raw(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    """The data set `config.name`, as it is: nothing is decoded or resized yet.

    Raises:
      UserError: it is not there, is damaged, has no such split, or is not what the
        stage expects: another number of classes or channels, or images too small.
    """
    if config.name in SOURCES:
        raw = SOURCES[config.name](config, split, stage)
    else:
        raw = tfds_source.load_tfds(config.name, split, config.path)
    if raw.fixed_shape is not None:
        height, width, channels = raw.fixed_shape
        if config.resolution > min(height, width):
            raise UserError(
                f"config.data.resolution = {config.resolution}: expected at most"
                f" {min(height, width)}, as {config.name!r} has"
            )
        if config.crop == "none" and height != width:
            raise UserError(
                f"config.data.crop = 'none': expected 'center', as the images of {config.name!r}"
                f" are {width} x {height}"
            )
        if isinstance(raw, ArraySource) and stage.channels != channels:
            raise UserError(
                f"config.stage.channels = {stage.channels}: expected {channels}, as"
                f" {config.name!r} has"
            )
    if stage.channels not in (1, 3):
        raise UserError(
            f"config.stage.channels = {stage.channels}: expected 1 or 3, as images have"
        )
    _check_classes(config, stage, len(raw.class_names))
    return raw


def _check_classes(config: DataConfig, stage: StageConfig, found: int) -> None:
    if stage.num_classes and stage.num_classes != found:
        expected = f"{found}, as {config.name!r} has, or 0 for a model" if found else "0, a model"
        raise UserError(
            f"config.stage.num_classes = {stage.num_classes}: expected {expected} without classes"
        )


def load_source(config: DataConfig, split: str, stage: StageConfig) -> Source:
    """A split of the data set `config.name`, checked to be what the stage expects.

    Raises:
      UserError: as `load_raw`; or `config.prepared_dir` does not hold the split as this
        config wants it.
    """
    low_res = stage.low_res_resolution if config.low_res == "stored" else None
    if config.prepared_dir is not None:
        if config.name not in SOURCES and not prepared.is_there(config, split, low_res):
            tfds_source.find_builder(config.name, config.path)  # says what name was meant
        reader: Reader = prepared.open_prepared(config, split, stage, low_res_resolution=low_res)
        _check_classes(config, stage, len(reader.class_names))
    else:
        reader = ProcessingReader(
            load_raw(config, split, stage),
            config,
            channels=stage.channels,
            low_res_resolution=low_res,
            say=_say,
        )
    return Source(reader, config)


_said = threading.Lock()


def _say(line: str) -> None:
    with _said:
        print(line, file=sys.stderr, flush=True)


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
