"""Data sets by name, checked to be what a stage expects."""

import functools
import sys
from collections.abc import Callable, Iterable

import numpy as np

from cascaded_diffusion.config.class_names import check_classes
from cascaded_diffusion.config.convert import fail_at
from cascaded_diffusion.config.run_checks import BUILTIN_DATA, FILE_DATA
from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data import manifests, shapes
from cascaded_diffusion.data.arrays import ArraySource, load_mnist, load_npz
from cascaded_diffusion.data.folder import FolderSource, load_folder
from cascaded_diffusion.data.records import PREPARE, DataMissing, RawSource, Source
from cascaded_diffusion.data.sized import PreparedSource, ProcessedSource
from cascaded_diffusion.data.splits import parse_split
from cascaded_diffusion.errors import UserError


def of_tfds(config: DataConfig) -> bool:
    """Whether the data set is one of TFDS, as all are that have no name of ours."""
    return config.name not in (*BUILTIN_DATA, *FILE_DATA)


def _stored(config: DataConfig, split: str, num_classes: int) -> RawSource:
    name, path = config.name, config.path
    if of_tfds(config):
        # It takes a second to import, which other data sets do without.
        from cascaded_diffusion.data.tfds import load_tfds

        return load_tfds(name, split, path)
    if name == "npz":
        return load_npz(path, split, num_classes=num_classes)
    if name in FILE_DATA:
        classes = "folder" if name == "folder" else "file_name"
        return load_folder(path, split, classes=classes if num_classes else None)
    whole = parse_split(split)["name"]
    if name == "mnist":
        arrays, class_names = load_mnist(whole), tuple(map(str, range(10)))
    else:
        arrays, class_names = shapes.load_shapes(whole), shapes.CLASS_NAMES
    return ArraySource(*arrays, class_names, name=name, split=split)


def load_raw(config: DataConfig, split: str, stage: StageConfig) -> RawSource:
    """A split of the data set `config.name` as it is stored: nothing is decoded or resized yet.

    Files that are passed over are counted on stderr. Raises UserError if the data set is missing
    or damaged, has no such split, or is not what the stage expects: its number of channels or the
    size of its images. `check_classes` checks the classes.
    """
    raw = _stored(config, split, stage.num_classes)
    if raw.fixed_shape is not None:
        height, width, channels = raw.fixed_shape
        if config.resolution > min(height, width):
            expected = f"at most {min(height, width)}, as {config.name!r} has"
            fail_at(config, "data.resolution", expected)
        if config.crop == "none" and height != width:
            expected = f"'center', as the images of {config.name!r} are {width} x {height}"
            fail_at(config, "data.crop", expected)
        if isinstance(raw, ArraySource) and stage.channels != channels:
            fail_at(stage, "stage.channels", f"{channels}, as {config.name!r} has")
    if stage.channels not in (1, 3):
        fail_at(stage, "stage.channels", "1 or 3, as images have")
    if isinstance(raw, FolderSource) and raw.passed_over:
        _say_once(f"{raw.where}: {raw.passed_over}")
    return raw


def load_splits(config: DataConfig, splits: Iterable[str], stage: StageConfig) -> dict[str, Source]:
    """Several splits of a data set, with the same classes; a repeated one is loaded once.

    Raises UserError like `load_raw` and `check_classes`, or if `config.prepared_dir` does not
    hold a split as this config wants it.
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
        low_res_resolution=manifests.stored_low_res(config, stage),
        say=say,
    )


def _source(config: DataConfig, split: str, stage: StageConfig) -> Source:
    if config.prepared_dir is None:
        return processed_source(config, split, stage, _say)
    folder = manifests.prepared_folder(config, split, stage)
    if not manifests.is_prepared(folder):
        if of_tfds(config):
            from cascaded_diffusion.data.tfds import find_builder

            find_builder(config.name, config.path)  # names what may have been meant
        others = sorted(p.parent.name for p in folder.parent.glob(f"*/{manifests.MANIFEST}"))
        there = f" (there: {', '.join(others)})" if others else ""
        begun = ", which has begun there and is not done" if folder.exists() else ""
        raise DataMissing(
            f"config.data.name = {config.name!r}: split {split!r} is not prepared in"
            f" {folder}{there}: run {PREPARE}{begun}, or set"
            " --config.data.prepared_dir=None to decode each image when it is read"
        )
    manifest = manifests.read_manifest(folder)
    wanted = manifests.settings_of(config, split, stage)
    manifests.check_settings(manifest, wanted, folder)
    manifests.check_skipped(manifest, config.pixel_limit, folder)
    if manifest["path"] != wanted["path"]:
        try:
            manifests.check_source(manifest, load_raw(config, split, stage), folder)
        except DataMissing as e:
            raise UserError(
                f"config.data.path = {config.path!r}: the images are not there to be compared, and"
                f" the data in {folder} was prepared from {manifest['path']}; give that path, or"
                " where they are now"
            ) from e
    return PreparedSource(folder, manifest, config)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_say_once = functools.cache(_say)


def examples(source: Source, indices: Iterable[int]) -> dict[str, np.ndarray]:
    """Chosen examples in memory: `image` uint8 [n, H, W, C], `label` int32 [n].

    Where low-res images are stored, `low_res` uint8 [n, h, w, C], too.
    """
    records = [source[int(i)] for i in indices]
    names = ("image",) if source.low_res_shape is None else ("image", "low_res")
    arrays = {name: np.stack([record[name] for record in records]) for name in names}
    return {**arrays, "label": np.asarray([record["label"] for record in records], np.int32)}


def spread_examples(source: Source, *, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Examples spread evenly over a data set, for a picture of `rows` x `columns`, row by row.

    In a set sorted by class, as many class folders are, each column holds one class or
    neighbouring ones.
    """
    spread = np.linspace(0, len(source) - 1, rows * columns).astype(int)
    return examples(source, spread.reshape(columns, rows).T.reshape(-1))
