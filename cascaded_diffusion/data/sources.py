"""Data sets by name, as a model sees them: random access to images of one size.

A `Source` is a reader (of the data set itself, or of what `prepare` made of it) and a guard
against records that cannot be read.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from cascaded_diffusion.config.schema import MAX_PIXELS, DataConfig, StageConfig
from cascaded_diffusion.data import builtin, folder, npz, prepared, shapes
from cascaded_diffusion.data import tfds as tfds_source
from cascaded_diffusion.data.corruption import CorruptionGuard
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.raw import ArraySource, RawExample, RawSource, array_source
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
      identity: what the data set is, wherever it lies: of names and sizes, or of contents.
      times: a digest of when its files were written; "" where the contents are in the identity.
    """

    image_shape: tuple[int, int, int]
    low_res_shape: tuple[int, int, int] | None
    class_names: tuple[str, ...]
    identity: str
    times: str

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

    def content_sample(self) -> str:
        """SHA-256 of at most 256 records as they are stored; "" where `identity` has them all."""
        ...


class ProcessingReader:
    """Decodes, crops and resizes the images of a data set as they are read.

    Args:
      raw: the data set.
      config: how.
      channels: of the images.
      low_res_resolution: where the low-res image is to be made from the crop too.
      say: told the first image of each kind that was converted to 8-bit RGB or grey, and the
        first that was enlarged.

    Attributes:
      converted: how many images were, by kind; "enlarged" is one.
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
        self.class_names, self.identity, self.times = raw.class_names, raw.identity, raw.times
        self.converted: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.raw)

    def read(self, index: int) -> Sized:
        return self.processed(self.raw.read(index), index)

    def processed(self, example: RawExample, index: int) -> Sized:
        """What `read` returns, of a record that has been read already."""
        image, label = example
        self.check_label(label, index)
        pixels = self.decoded(image, index)
        height, width = pixels.shape[:2]
        if min(height, width) < self.image_shape[0]:
            self._note(
                "enlarged",
                f"enlarged: {self.describe(index)} ({width} x {height} pixels) to"
                f" {self.image_shape[0]} px; so are others that are smaller",
            )
        return self.sized(pixels, label)

    def check_label(self, label: int, index: int) -> None:
        """Raises UserError for a label that is none of the classes."""
        if self.class_names and not 0 <= label < len(self.class_names):
            raise UserError(
                f"{self.describe(index)}: label {label} is out of range, expected 0 to"
                f" {len(self.class_names) - 1}; take another config.data.train_split or"
                " eval_split, or --config.stage.num_classes=0 for a model without classes"
            )

    def _note(self, kind: str, line: str) -> None:
        self.converted[kind] += 1
        if self.converted[kind] == 1 and self._say is not None:
            self._say(line)

    def decoded(self, image: bytes | np.ndarray, index: int) -> np.ndarray:
        """The pixels of an image: uint8 [H, W, C] of any size."""
        if isinstance(image, np.ndarray):
            return image
        pixels, note = decode_image(
            image, channels=self._channels, max_pixels=self._config.max_pixels or MAX_PIXELS
        )
        if note is not None:
            self._note(
                note,
                f"converted: {self.describe(index)} ({note}) to 8-bit"
                f" {'grey' if self._channels == 1 else 'RGB'}; so are others like it",
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

    def content_sample(self) -> str:
        return self.raw.content_sample()


class Source:
    """What the loader and evaluation read: `len`, and records by index.

    Args:
      reader: of the images.
      config: what to do about corrupt records.

    Attributes:
      image_shape, low_res_shape, class_names, identity, times: the reader's.
    """

    def __init__(self, reader: Reader, config: DataConfig):
        self.reader, self.guard = reader, CorruptionGuard(config, len(reader))
        self.image_shape, self.low_res_shape = reader.image_shape, reader.low_res_shape
        self.class_names = reader.class_names
        self.identity, self.times = reader.identity, reader.times

    @property
    def num_classes(self) -> int:
        """0 for data without classes."""
        return len(self.class_names)

    def content_sample(self) -> str:
        """SHA-256 of at most 256 records as they are stored; "" where `identity` has them all.

        Prepared data gives what its source gave when it was prepared.
        """
        return self.reader.content_sample()

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

    Files that are passed over are said on stderr. The classes are for `check_classes` to check.

    Raises:
      UserError: it is not there, is damaged, has no such split, or is not what the
        stage expects: another number of channels, or images too small.
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
    if isinstance(raw, folder.FolderSource) and raw.passed_over:
        _say(f"{raw.where}: {raw.passed_over}", once=True)
    return raw


def check_same_classes(class_names: Mapping[str, tuple[str, ...]]) -> None:
    """Checks that labels mean the same in several splits, or to several models.

    Args:
      class_names: in order of label, by what people call the side, for example
        "train_split 'train'". Sides without classes are passed over.

    Raises:
      UserError: they differ; names the first classes that do.
    """
    sides = [(side, names) for side, names in class_names.items() if names]
    for side, names in sides[1:]:
        first, expected = sides[0]
        if names != expected:
            raise UserError(
                f"{_difference(first, expected, side, names)}; labels are numbers of classes, which"
                " must be the same everywhere: give all splits the same class folders (or"
                " class_names), or take parts of one split, as"
                " --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'"
            )


def _difference(first: str, expected: tuple[str, ...], second: str, found: tuple[str, ...]) -> str:
    parts = []
    for side, names, others in ((second, found, expected), (first, expected, found)):
        lacking = dict.fromkeys(others)  # in order
        for name in names:
            lacking.pop(name, None)
        if lacking:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            parts.append(f"{side} has no {next(iter(lacking))!r}{more}")
    if parts:
        return " and ".join(parts)
    for at, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return f"class {at} of {first} is {a!r}, and of {second} {b!r}"
    return f"{first} has {len(expected)} classes, and {second} {len(found)}"


def check_classes(
    config: DataConfig, stage: StageConfig, class_names: Mapping[str, tuple[str, ...]]
) -> None:
    """Checks the classes of splits against each other and against a stage's.

    Args:
      config: the data section.
      stage: a stage without classes accepts any.
      class_names: by split.

    Raises:
      UserError: they differ, or are not as many as the stage has.
    """
    if not stage.num_classes:
        return
    check_same_classes({_side(config, split): names for split, names in class_names.items()})
    for split, names in class_names.items():
        if len(names) != stage.num_classes:
            expected = (
                f"{len(names)}, as {config.name!r} has in {split!r}, or 0 for a model"
                if names
                else "0, a model"
            )
            raise UserError(
                f"config.stage.num_classes = {stage.num_classes}: expected {expected} without"
                " classes"
            )


def _side(config: DataConfig, split: str) -> str:
    for key in ("train_split", "eval_split"):
        if split == getattr(config, key):
            return f"{key} {split!r}"
    return f"split {split!r}"


def load_splits(config: DataConfig, splits: Iterable[str], stage: StageConfig) -> dict[str, Source]:
    """Several splits of a data set, with the same classes.

    Args:
      config: the data section.
      splits: their names; one that comes twice is loaded once.
      stage: what must fit.

    Raises:
      UserError: as `load_source` and `check_classes`.
    """
    sources = {
        split: Source(_reader(config, split, stage), config) for split in dict.fromkeys(splits)
    }
    check_classes(config, stage, {split: s.class_names for split, s in sources.items()})
    return sources


def load_source(config: DataConfig, split: str, stage: StageConfig) -> Source:
    """A split of the data set `config.name`, checked to be what the stage expects.

    Args:
      config: the data section.
      split: which.
      stage: what must fit.

    Raises:
      UserError: as `load_raw`; or another number of classes; or `config.prepared_dir` does
        not hold the split as this config wants it.
    """
    return load_splits(config, [split], stage)[split]


def _reader(config: DataConfig, split: str, stage: StageConfig) -> Reader:
    low_res = stage.low_res_resolution if config.low_res == "stored" else None
    if config.prepared_dir is not None:
        if config.name not in SOURCES and not prepared.is_there(config, split, low_res):
            tfds_source.find_builder(config.name, config.path)  # says what name was meant
        return prepared.open_prepared(
            config,
            split,
            stage,
            low_res_resolution=low_res,
            find=lambda: load_raw(config, split, stage),
        )
    return ProcessingReader(
        load_raw(config, split, stage),
        config,
        channels=stage.channels,
        low_res_resolution=low_res,
        say=_say,
    )


_saying = threading.Lock()
_said: set[str] = set()


def _say(line: str, *, once: bool = False) -> None:
    with _saying:
        if once and line in _said:
            return
        _said.add(line)
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
