"""Configs and data small enough to train in a test."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.commands.config_flags import load_config_file
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import MeshConfig, RunConfig, to_dict
from cascaded_diffusion.data.arrays import ArraySource
from cascaded_diffusion.data.sized import ProcessedSource
from cascaded_diffusion.runtime.mesh import build_mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]


def config_values(name: str, variant: str | None = "smoke") -> dict[str, Any]:
    """What `configs/<name>.py` returns, as plain nested dicts."""
    file = f"{name}.py:{variant}" if variant else f"{name}.py"
    return load_config_file(ROOT / "configs", file)


def with_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with keys like `"train.batch_size"` replaced."""
    for key, value in overrides.items():
        *sections, name = key.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[name] = value
    return values


_TINY = {
    "stage.network.channels": 8,
    "stage.network.num_heads": 2,
    "data.read_threads": 1,
    "train.batch_size": 16,
    "train.log_every_steps": 1,
    "train.sample_every_steps": None,
    # The step's program is then the same for any number of steps, and compiled once.
    "train.lr_decay": "none",
    "eval.num_samples": 40,
    "eval.batch_size": 40,
}


def tiny_base(**overrides: Any) -> RunConfig:
    """A base stage at 16 px. Overrides are spelled `train__batch_size=...`."""
    return _tiny("mnist_base16", overrides)


def tiny_sr(**overrides: Any) -> RunConfig:
    """A super-resolution stage, 16 to 32 px."""
    return _tiny("mnist_sr32", overrides)


# The network that compiles soonest, for tests of what is done around it.
_ONE_LEVEL = {"stage__network__channel_mults": (1,), "stage__network__num_res_blocks": (1,)}


def smallest_base(**overrides: Any) -> RunConfig:
    """`tiny_base` with one level of feature maps."""
    return tiny_base(**{**_ONE_LEVEL, **overrides})


def smallest_sr(**overrides: Any) -> RunConfig:
    """`tiny_sr` with one level of feature maps."""
    return tiny_sr(**{**_ONE_LEVEL, **overrides})


def smallest_efficient(**overrides: Any) -> RunConfig:
    """A base stage of one level whose network is an Efficient U-Net: half of what a U-Net is."""
    network = {"name": "efficient_unet", "patch_size": 1, "attention_resolutions": (8,)}
    ours = {f"stage__network__{key}": value for key, value in network.items()}
    return smallest_base(**{**ours, **overrides})


def _tiny(name: str, overrides: dict[str, Any]) -> RunConfig:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return run_config_from(with_overrides(config_values(name), {**_TINY, **named}))


def round_trip(config: RunConfig, **overrides: Any) -> RunConfig:
    """The config with overrides applied."""
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return run_config_from(with_overrides(to_dict(config), named))


def two_devices() -> Mesh:
    """A mesh whose devices share the batch: eight take their time on two cores."""
    return build_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])


def array_source(
    images: np.ndarray, labels: np.ndarray, *, num_classes: int = 10, **overrides: Any
) -> ProcessedSource:
    """Arrays as a source; `raw` is what it was made of. Overrides are of `config.data`."""
    size, channels = images.shape[1], images.shape[3]
    config = tiny_base(
        data__resolution=size, **{f"data__{k}": v for k, v in overrides.items()}
    ).data
    raw = ArraySource(images, labels, tuple(map(str, range(num_classes))))
    return ProcessedSource(raw, config, channels=channels)


def random_source(num_images: int = 64, resolution: int = 32) -> ProcessedSource:
    """Images of noise, whose first pixels spell the image's index."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, resolution, resolution, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(num_images) % 256
    labels = (np.arange(num_images) % 10).astype(np.int32)
    return array_source(images, labels)


class Split:
    """What `RunData` asks of a data set's split, made up."""

    def __init__(self, identity="folder:40", times="t1", classes=("a", "b"), contents="c1"):
        self.identity, self.times, self.class_names = identity, times, classes
        self._contents = contents

    def content_sample(self):
        return self._contents
