"""Data sets by name, checked to be what a stage expects."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np

from cascaded_diffusion.config.class_names import check_classes
from cascaded_diffusion.config.run_checks import BUILTIN_DATA, FILE_DATA
from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data import builtin, folder, npz, prepared, shapes
from cascaded_diffusion.data.arrays import ArraySource
from cascaded_diffusion.data.manifests import is_prepared, prepared_folder, stored_low_res
from cascaded_diffusion.data.processing import ProcessedSource
from cascaded_diffusion.data.records import RawSource, Source
from cascaded_diffusion.data.splits import parse_split
from cascaded_diffusion.errors import UserError


def of_tfds(config: DataConfig) -> bool:
    """Whether the data set is one of TFDS, as all are that have no name of ours."""
    return config.name not in (*BUILTIN_DATA, *FILE_DATA)


def tfds_sources() -> ModuleType:
    """`data.tfds`. It takes a second to import, which other data sets do without."""
    from cascaded_diffusion.data import tfds

    return tfds


def _stored(config: DataConfig, split: str, num_classes: int) -> RawSource:
    name, path = config.name, config.path
    if of_tfds(config):
        return tfds_sources().load_tfds(name, split, path)
    if name == "npz":
        return npz.load_npz(path, split, num_classes=num_classes)
    if name in FILE_DATA:
        classes = "folder" if name == "folder" else "file_name"
        return folder.load_folder(path, split, classes=classes if num_classes else None)
    whole, _ = parse_split(split)
    if name == "mnist":
        arrays, class_names = builtin.load_mnist(whole), tuple(map(str, range(10)))
    else:
        arrays, class_names = shapes.load_shapes(whole), shapes.CLASS_NAMES
    return ArraySource(*arrays, class_names, name=name, split=split)


def load_raw(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    """A split of the data set `config.name` as it is stored: nothing is decoded or resized yet.

    Files that are passed over are counted on stderr. `check_classes` checks the classes.

    Raises:
      UserError: the data set is missing or damaged, has no such split, or is not what the
        stage expects: it has another number of channels, or its images are too small.
    """
    raw = _stored(config, split, stage.num_classes)
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
    """Several splits of a data set, with the same classes; a repeated one is loaded once.

    Raises:
      UserError: see `load_raw` and `check_classes`; or `config.prepared_dir` does not hold a
        split as this config wants it.
    """
    sources = {split: _source(config, split, stage) for split in dict.fromkeys(splits)}
    check_classes(config, stage, {split: s.class_names for split, s in sources.items()})
    return sources


def load_source(config: DataConfig, split: str, stage: StageConfig) -> Source:
    """A single split; see `load_splits`."""
    return load_splits(config, [split], stage)[split]


def processed_source(
    config: DataConfig, split: str, stage: StageConfig, say: Callable[[str], None] | None = None
) -> ProcessedSource:
    """Reads a split at the stage's sizes, from the images themselves; see `load_raw`."""
    return ProcessedSource(
        load_raw(config, split, stage),
        config,
        channels=stage.channels,
        low_res_resolution=stored_low_res(config, stage),
        say=say,
    )


def _source(config: DataConfig, split: str, stage: StageConfig) -> Source:
    if config.prepared_dir is None:
        return processed_source(config, split, stage, _say)
    if of_tfds(config) and not is_prepared(prepared_folder(config, split, stage)):
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
