"""The real images of a table, samples, and rows that need no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from cascaded_diffusion.cascade.pixels import UPSAMPLERS, float_from_uint8, uint8_from_float
from cascaded_diffusion.commands.run_images import real_split
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.data.records import DataMissing
from cascaded_diffusion.data.sources import load_splits
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages
from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.runtime.mesh import host_array


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the images are, as the config's `data` says it; None is what the config says."""

    name: str | None = None
    path: str | None = None
    prepared_dir: str | None = None

    def applied(self, values: Record) -> Record:
        """The values of a config with this data. Raises UserError if a folder is not named."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if "path" in given and "prepared_dir" not in given:
            given["prepared_dir"] = None  # raw images are read as they are
        data = values["data"]
        data.update(given)
        if data["name"] == "folder" and data.get("path") is None:
            expected = "expected the folder with train/CLASS/*.jpg of the table's images"
            raise UserError(f"--data_path is not given: {expected}")
        return values


class Split:
    """A split in memory, read when it is first needed."""

    def __init__(self, split: RealSplit, identity: str):
        self.split, self.identity = split, identity

    @cached_property
    def whole(self) -> LabelledImages:
        """All images at the data set's resolution."""
        return self.split.raw(range(len(self.split)))

    def chosen(self, count: int) -> np.ndarray:
        """`count` rows chosen at random, the same every time; of too few, all in turn."""
        return np.resize(np.random.default_rng(0).permutation(len(self.split)), count)

    def some(self, count: int, resolution: int) -> LabelledImages:
        """The images of the rows `chosen`."""
        return self.split.rows(self.chosen(count), resolution)


def load_images(config: RunConfig, *, prepared_by: str | None) -> dict[str, Split]:
    """The real images by role, "train" and "val".

    Raises UserError if they are not there, which names the config they are `prepared_by`, if any.
    """
    splits = {"train": config.data.train_split, "val": config.data.eval_split}
    try:
        sources = load_splits(config.data, list(splits.values()), config.stage)
    except DataMissing as e:
        remedy = "name a folder of images by --data_name=folder --data_path=PATH"
        if prepared_by is not None:
            command = f"python -m cascaded_diffusion.prepare --config=configs/{prepared_by}.py"
            remedy = f"make it by `{command}`, or {remedy}"
        raise UserError(f"{e}; {remedy}") from e
    return {
        role: Split(real_split(config, name, sources[name]), sources[name].identity)
        for role, name in splits.items()
    }


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images to be scored, and what making one of them cost."""

    images: np.ndarray  # uint8 [n, H, W, C]
    labels: np.ndarray | None  # int [n]
    evaluations: int = 0  # of networks
    flops: float = 0.0
    made_of: np.ndarray | None = None  # rows of the held-out images that they are made of


def without_a_model(kind: str, images: Mapping[str, Split], count: int, seed: int) -> Samples:
    """Rows between which all others lie: real images, enlarged ones, noise."""
    split = images["train" if kind == "train" else "val"]
    size = split.whole.images.shape[1]
    real, rows = split.some(count, size), split.chosen(count)
    if kind == "train":
        return Samples(real.images, real.labels)
    if kind == "real":
        return Samples(real.images, real.labels, made_of=rows)
    if kind == "enlarged":
        low = split.some(count, size // 2)
        large = UPSAMPLERS["bilinear"](float_from_uint8(low.images), (size, size))
        return Samples(host_array(uint8_from_float(large)), low.labels, made_of=rows)
    noise = np.random.default_rng(seed).normal(
        real.images.mean(), real.images.std(), real.images.shape
    )
    return Samples(noise.round().clip(0, 255).astype(np.uint8), real.labels)
