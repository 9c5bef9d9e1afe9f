"""The images of a run, checked to be those that it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from absl import flags

from cascaded_diffusion.config.class_names import check_same_classes
from cascaded_diffusion.config.run_checks import BUILTIN_DATA, FILE_DATA
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.data.records import DataMissing, Source
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.runtime.run_data import RunData, check_run_data, trained_classes
from cascaded_diffusion.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages
    from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit


def define_data_path(fv: flags.FlagValues) -> None:
    """Adds the flag that says where images that were moved, copied or touched are now."""
    text = (
        "where the run's images lie now, if they were moved, copied or touched: names, sizes and"
        " contents are compared with those it was trained on"
    )
    flags.DEFINE_string("data_path", None, text, flag_values=fv)


def with_absolute_paths(config: RunConfig, data_path: str | None = None) -> RunConfig:
    """A config with absolute paths, `data_path` in place of `config.data.path` if given.

    Raises UserError if there is a `data_path`, but the images come with the package.
    """
    data = config.data
    if data_path is not None and data.name in BUILTIN_DATA:
        raise UserError(
            f"--data_path={data_path}: the run's images, {data.name!r}, come with the package"
        )
    path = data.path if data_path is None else data_path
    paths = {"path": path, "prepared_dir": data.prepared_dir}
    absolute = {key: str(path_of(x).absolute()) for key, x in paths.items() if x is not None}
    return dataclasses.replace(config, data=dataclasses.replace(data, **absolute))


def open_splits(
    folder: RunFolder, config: RunConfig, splits: Iterable[str], *, data_path: str | None
) -> dict[str, Source]:
    """Opens splits of a run's data set by their names, which may repeat.

    `config` is the run's, or the one that it resumes with; `data_path` is where the images are
    now, from `--data_path`. Raises UserError if they cannot be read, the splits differ in
    classes, or they are not the images that the run was trained on.
    """
    from cascaded_diffusion.data.sources import load_splits

    whole = with_absolute_paths(config, data_path)
    try:
        sources = load_splits(whole.data, splits, whole.stage)
    except DataMissing as e:
        if whole.data.path is None or data_path is not None:
            raise
        raise DataMissing(f"{e}; if they were moved, say where they lie by --data_path") from e
    given_anew = data_path is not None
    check_run_data(folder, RunData(splits=sources, path=whole.data.path, given_anew=given_anew))
    return sources


def real_splits(
    folder: RunFolder, config: RunConfig, *, data_path: str | None
) -> dict[str, RealSplit]:
    """A run's real images by role, "train" and "val". Raises UserError like `open_splits`."""
    names = {"train": config.data.train_split, "val": config.data.eval_split}
    sources = open_splits(folder, config, names.values(), data_path=data_path)
    return {role: real_split(config, name, sources[name]) for role, name in names.items()}


def real_split(config: RunConfig, split: str, source: Source) -> RealSplit:
    """A split of a run's data set, for `evaluation`."""
    from cascaded_diffusion.data.sources import examples
    from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit

    data = config.data
    first = "" if data.resize == "area" else f"{data.resize} to {data.resolution} px, "
    if data.on_corrupt == "skip" and data.max_pixels is not None:
        first = f"none of more than {data.max_pixels} pixels, {first}"
    return RealSplit(
        # A name says which images they are; "folder" does not.
        source.identity if data.name in FILE_DATA else data.name,
        split,
        len(source),
        partial(examples, source),
        crop=data.crop,
        resize=f"{first}area",
    )


def check_same_run_classes(folders: Sequence[RunFolder]) -> None:
    """Raises UserError if the runs of a cascade were trained on different classes."""
    known = {f"run {folder.path.name!r}": trained_classes(folder) for folder in folders}
    # Runs without classes, and runs that do not say, cannot be compared.
    check_same_classes(
        {name: classes for name, classes in known.items() if classes},
        remedy="train both on the same classes; if they are the same under other names, remove"
        " the data.json of one run, which is then not compared",
    )


def shown_images(folder: RunFolder, *, data_path: str | None) -> LabelledImages:
    """Twenty held-out real images of a run, spread over the classes, for a cascade's picture."""
    from cascaded_diffusion.data.sources import spread_examples
    from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages

    config = folder.read_config()
    name = config.data.eval_split
    held_out = open_splits(folder, config, [name], data_path=data_path)[name]
    spread = spread_examples(held_out, rows=2, columns=10)
    return LabelledImages(spread["image"], spread["label"])
