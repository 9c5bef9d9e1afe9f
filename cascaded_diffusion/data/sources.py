"""Data sets by name, checked to be what a stage expects."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np

from cascaded_diffusion.config.class_names import check_classes
from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data import builtin, folder, npz, prepared, shapes
from cascaded_diffusion.data.arrays import ArraySource, array_source
from cascaded_diffusion.data.manifests import is_prepared, prepared_folder, stored_low_res
from cascaded_diffusion.data.processing import ProcessingReader
from cascaded_diffusion.data.records import RawSource, Reader, Source
from cascaded_diffusion.data.splits import parse_split
from cascaded_diffusion.errors import UserError

# (config, split, number of classes) -> the split's raw source.
_Load = Callable[[DataConfig, str, int], RawSource]


def _in_package(
    name: str,
    load: Callable[[str], tuple[np.ndarray, np.ndarray]],
    class_names: tuple[str, ...],
) -> _Load:
    def loaded(config: DataConfig, split: str, num_classes: int) -> RawSource:
        return array_source(name, split, *load(parse_split(split)[0]), class_names)

    return loaded


def _in_folder(classes: str) -> _Load:
    def loaded(config: DataConfig, split: str, num_classes: int) -> RawSource:
        return folder.load_folder(config.path, split, classes=classes if num_classes else None)

    return loaded


def _npz(config: DataConfig, split: str, num_classes: int) -> RawSource:
    return npz.load_npz(config.path, split, num_classes=num_classes)


# All data sets but those of TFDS.
SOURCES: dict[str, _Load] = {
    "mnist": _in_package("mnist", builtin.load_mnist, tuple(map(str, range(10)))),
    "shapes": _in_package("shapes", shapes.load_shapes, shapes.CLASS_NAMES),
    "folder": _in_folder("folder"),
    "adm_folder": _in_folder("file_name"),
    "npz": _npz,
}


def tfds_sources() -> ModuleType:
    """`data.tfds`. It takes a second to import, which other data sets do without."""
    from cascaded_diffusion.data import tfds

    return tfds


def load_raw(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    """A split of the data set `config.name` as it is stored: nothing is decoded or resized yet.

    Files that are passed over are counted on stderr. `check_classes` checks the classes.

    Raises:
      UserError: the data set is missing or damaged, has no such split, or is not what the
        stage expects: it has another number of channels, or its images are too small.
    """
    if config.name in SOURCES:
        raw = SOURCES[config.name](config, split, stage.num_classes)
    else:
        raw = tfds_sources().load_tfds(config.name, split, config.path)
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
        _say_once(f"{raw.where}: {raw.passed_over}")
    return raw


def load_splits(config: DataConfig, splits: Iterable[str], stage: StageConfig) -> dict[str, Source]:
    """Several splits of a data set, with the same classes.

    Args:
      config: the data section.
      splits: their names; a repeated one is loaded once.
      stage: what they must fit.

    Raises:
      UserError: see `load_raw` and `check_classes`; or `config.prepared_dir` does not hold a
        split as this config wants it.
    """
    sources = {
        split: Source(_reader(config, split, stage), config) for split in dict.fromkeys(splits)
    }
    check_classes(config, stage, {split: s.class_names for split, s in sources.items()})
    return sources


def load_source(config: DataConfig, split: str, stage: StageConfig) -> Source:
    """A single split; see `load_splits`."""
    return load_splits(config, [split], stage)[split]


def processing_reader(
    config: DataConfig, split: str, stage: StageConfig, say: Callable[[str], None] | None = None
) -> ProcessingReader:
    """Reads a split at the stage's sizes, from the images themselves; see `load_raw`."""
    return ProcessingReader(
        load_raw(config, split, stage),
        config,
        channels=stage.channels,
        low_res_resolution=stored_low_res(config, stage),
        say=say,
    )


def _reader(config: DataConfig, split: str, stage: StageConfig) -> Reader:
    if config.prepared_dir is None:
        return processing_reader(config, split, stage, _say)
    if config.name not in SOURCES and not is_prepared(prepared_folder(config, split, stage)):
        tfds_sources().find_builder(config.name, config.path)  # names what may have been meant
    return prepared.open_prepared(config, split, stage, find=lambda: load_raw(config, split, stage))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_say_once = functools.cache(_say)


def examples(source: Source, indices: Iterable[int]) -> dict[str, np.ndarray]:
    """Chosen examples in memory: `image` uint8 [n, H, W, C], `label` int32 [n]."""
    records = [source[int(i)] for i in indices]
    return {
        "image": np.stack([record["image"] for record in records]),
        "label": np.asarray([record["label"] for record in records], np.int32),
    }


def spread_examples(source: Source, *, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Examples spread evenly over a data set, for a picture of `rows` x `columns`, row by row.

    In a set sorted by class, as many class folders are, each column holds one class or
    neighbouring ones.
    """
    spread = np.linspace(0, len(source) - 1, rows * columns).astype(int)
    return examples(source, spread.reshape(columns, rows).T.reshape(-1))
