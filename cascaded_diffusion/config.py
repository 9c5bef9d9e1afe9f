"""What a run is made of: frozen dataclasses, and the one strict way into them.

A config file returns an `ml_collections.ConfigDict` with the sections `stage`,
`data`, `train`, `eval`, `mesh` and `checkpoint` (one stage), or `cascade` (a
chain of trained stages). `run_config_from` and `cascade_config_from` turn it, or
the JSON of an earlier run, into the dataclasses below and check every value.
Nothing has a default: a config file says all there is to say about a run.

Every problem is a `UserError` of one line that names the key, its value and what
is allowed. No device is touched here, and nothing is imported from JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cascaded_diffusion.errors import UserError

T = TypeVar("T")


def _at_least(minimum: float) -> Any:
    return dataclasses.field(metadata={"minimum": minimum})


def _above(bound: float) -> Any:
    return dataclasses.field(metadata={"above": bound})


def _between(minimum: float, maximum: float) -> Any:
    return dataclasses.field(metadata={"minimum": minimum, "maximum": maximum})


def _one_of(*choices: str) -> Any:
    return dataclasses.field(metadata={"choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """`stage.network`: see `networks.unet.UNet` for the fields' meaning."""

    name: str = _one_of("unet")
    channels: int = _at_least(2)
    channel_mults: tuple[int, ...] = _at_least(1)
    num_res_blocks: int = _at_least(1)
    attention_resolutions: tuple[int, ...] = _at_least(1)
    num_heads: int = _at_least(1)
    dropout_rate: float = _between(0.0, 0.99)
    patch_size: int = _at_least(1)
    resample: str = _one_of("conv", "pool")
    upsample: str = _one_of("bilinear", "bicubic")  # of the low-res input
    dtype: str = _one_of("float32", "bfloat16")  # of the computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """`stage.diffusion`: the forward process and what the network predicts."""

    schedule: str = _one_of("cosine")
    num_timesteps: int | None = _at_least(1)  # T; None trains in continuous time
    parameterization: str = _one_of("eps", "x0", "v")
    label_dropout_prob: float = _between(0.0, 1.0)  # > 0 allows guidance


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """`stage.augment`: conditioning augmentation of a super-resolution stage."""

    name: str = _one_of("none", "gaussian")
    schedule: str = _one_of("cosine")  # the low-res stage's forward process
    num_timesteps: int | None = _at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """`stage.sampler`: how this stage is sampled unless a cascade says otherwise."""

    name: str = _one_of("ancestral", "ddim")
    num_steps: int = _at_least(1)
    guidance_scale: float = _at_least(0.0)  # 1 is no guidance
    clip: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """`stage`: one diffusion model. With these fields it can be rebuilt and sampled."""

    name: str
    kind: str = _one_of("base", "super_resolution")
    resolution: int = _at_least(1)
    channels: int = _at_least(1)
    num_classes: int = _at_least(0)
    low_res_resolution: int | None = _at_least(1)
    network: NetworkConfig
    diffusion: DiffusionConfig
    augment: AugmentConfig
    sampler: SamplerConfig

    @property
    def null_label(self) -> int:
        """The label that stands for "dropped"."""
        return self.num_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`data`: where the images come from. `resolution` is the data set's own here."""

    name: str
    train_split: str
    eval_split: str
    resolution: int = _at_least(1)
    random_flip: bool
    shuffle_seed: int = _at_least(0)
    read_threads: int = _between(0, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`train`: the optimization."""

    seed: int = _at_least(0)
    batch_size: int = _at_least(1)  # global
    train_steps: int = _at_least(1)
    learning_rate: float = _above(0.0)
    lr_decay: str = _one_of("none", "cosine")
    warmup_steps: int = _at_least(0)
    adam_b2: float = _between(0.0, 0.99999)
    grad_clip_norm: float = _above(0.0)
    ema_decay: float = _between(0.0, 0.999999)
    log_every_steps: int = _at_least(1)
    sample_every_steps: int = _at_least(1)  # grids of EMA samples for TensorBoard


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """`eval`: how checkpoints are scored, and when training may stop."""

    features: str = _one_of("classifier")
    num_samples: int = _at_least(2)
    batch_size: int = _at_least(1)
    seed: int = _at_least(0)
    aug_level: float = _between(0.0, 1.0)
    patience_evals: int = _at_least(1)  # scores without a new best before EARLY_STOP


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """`mesh`: devices along each axis; `data` = -1 takes what `fsdp` leaves."""

    data: int = _at_least(-1)
    fsdp: int = _at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`checkpoint`: when to save, and how many of the latest to keep (and the best)."""

    save_every_steps: int = _at_least(1)
    max_to_keep: int = _at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of one stage's run."""

    stage: StageConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeSection:
    """`cascade`: which runs are chained, in order of resolution, and how.

    The tuples have one entry per stage, `aug_levels` one per enlargement.
    """

    stages: tuple[str, ...]  # names of run folders
    aug_levels: tuple[float, ...] = _between(0.0, 1.0)
    truncated: bool
    samplers: tuple[str, ...] = _one_of("ancestral", "ddim")
    num_steps: tuple[int, ...] = _at_least(1)
    guidance_scales: tuple[float, ...] = _at_least(0.0)
    num_samples: int = _at_least(1)
    batch_size: int = _at_least(1)
    seed: int = _at_least(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """All that sampling a cascade needs besides the run folders."""

    cascade: CascadeSection
    mesh: MeshConfig


def _fail(key: str, value: Any, expected: str) -> typing.NoReturn:
    raise UserError(f"config.{key} = {value!r}: expected {expected}")


def _describe(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {_describe(typing.get_args(hint)[0])}"
    return {int: "an integer", float: "a number", bool: "True or False", str: "a string"}[hint]


def _convert_value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, or UserError. Nothing is silently rounded or cast."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (inner,) = (h for h in typing.get_args(hint) if h is not type(None))
        if isinstance(value, inner) and not isinstance(value, bool):
            return value
    elif typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, (tuple, list)):
            return tuple(_convert_value(inner, v, f"{key}[{i}]") for i, v in enumerate(value))
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    _fail(key, value, _describe(hint))


def _check_bounds(value: Any, metadata: Mapping[str, Any], key: str) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_bounds(item, metadata, f"{key}[{i}]")
        return
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        _fail(key, value, "a finite number")
    if "choices" in metadata and value not in metadata["choices"]:
        close = difflib.get_close_matches(str(value), metadata["choices"], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        _fail(key, value, f"one of {', '.join(map(repr, metadata['choices']))}{hint}")
    if "maximum" in metadata and not metadata["minimum"] <= value <= metadata["maximum"]:
        _fail(key, value, f"a value from {metadata['minimum']} to {metadata['maximum']}")
    if "minimum" in metadata and not value >= metadata["minimum"]:
        _fail(key, value, f"a value of at least {metadata['minimum']}")
    if "above" in metadata and not value > metadata["above"]:
        _fail(key, value, f"a value above {metadata['above']}")


def _convert(cls: type[T], values: Any, prefix: str = "") -> T:
    if not isinstance(values, Mapping):
        _fail(prefix.rstrip("."), values, f"a section with the keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"config.{prefix}{key} is not a config key{nearest_key(key, fields)}")
    converted = {}
    for name, field in fields.items():
        key = prefix + name
        if name not in values:
            raise UserError(f"config.{key} is missing")
        if dataclasses.is_dataclass(hints[name]):
            converted[name] = _convert(hints[name], values[name], f"{key}.")
        else:
            converted[name] = _convert_value(hints[name], values[name], key)
            _check_bounds(converted[name], field.metadata, key)
    return cls(**converted)


def nearest_key(key: str, known: typing.Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the list of known keys where nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"


def run_config_from(values: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from a ConfigDict's plain dicts or from parsed JSON.

    Raises:
      UserError: an unknown or missing key, a wrong type, a value that is out of
        range, or values that do not go together.
    """
    config = _convert(RunConfig, values)
    _check_stage(config.stage)
    stage, data, train = config.stage, config.data, config.train
    if data.resolution < stage.resolution:
        _fail(
            "stage.resolution",
            stage.resolution,
            f"at most config.data.resolution, which is {data.resolution}",
        )
    _check_batch("train.batch_size", train.batch_size, config.mesh)
    _check_batch("eval.batch_size", config.eval.batch_size, config.mesh)
    if stage.num_classes and config.eval.num_samples % stage.num_classes:
        _fail(
            "eval.num_samples",
            config.eval.num_samples,
            f"a multiple of config.stage.num_classes, which is {stage.num_classes},"
            " for the samples to be class-balanced",
        )
    if stage.augment.name == "none" and config.eval.aug_level != 0.0:
        _fail(
            "eval.aug_level",
            config.eval.aug_level,
            "0.0, since config.stage.augment.name is 'none'",
        )
    if train.warmup_steps >= train.train_steps:
        _fail(
            "train.warmup_steps",
            train.warmup_steps,
            f"less than config.train.train_steps, which is {train.train_steps}",
        )
    return config


def _check_stage(stage: StageConfig) -> None:
    if not stage.name.replace("_", "").isalnum():
        _fail("stage.name", stage.name, "letters, digits and underscores")
    network = stage.network
    if not network.channel_mults:
        _fail("stage.network.channel_mults", network.channel_mults, "at least one level")
    factor = network.patch_size * 2 ** (len(network.channel_mults) - 1)
    if stage.resolution % factor:
        _fail(
            "stage.resolution",
            stage.resolution,
            f"a multiple of {factor}: config.stage.network.patch_size = {network.patch_size} and"
            f" {len(network.channel_mults)} levels of config.stage.network.channel_mults",
        )
    if network.channels % 2:
        _fail("stage.network.channels", network.channels, "an even number")
    for mult in network.channel_mults:
        if network.channels * mult % network.num_heads:
            _fail(
                "stage.network.num_heads",
                network.num_heads,
                f"a divisor of every level's channels; {network.channels * mult} is not divided",
            )
    sizes = [
        stage.resolution // network.patch_size // 2**i for i in range(len(network.channel_mults))
    ]
    for size in network.attention_resolutions:
        if size not in sizes:
            _fail(
                "stage.network.attention_resolutions",
                network.attention_resolutions,
                f"sizes of feature maps, which are {', '.join(map(str, sizes))}",
            )
    if stage.kind == "super_resolution":
        if stage.low_res_resolution is None or stage.low_res_resolution >= stage.resolution:
            _fail(
                "stage.low_res_resolution",
                stage.low_res_resolution,
                f"the size of the images to enlarge, below config.stage.resolution ="
                f" {stage.resolution}, since config.stage.kind is 'super_resolution'",
            )
    else:
        if stage.low_res_resolution is not None:
            _fail(
                "stage.low_res_resolution",
                stage.low_res_resolution,
                "None, since config.stage.kind is 'base'",
            )
        if stage.augment.name != "none":
            _fail(
                "stage.augment.name",
                stage.augment.name,
                "'none', since config.stage.kind is 'base'",
            )
    _check_guidance("stage.sampler.guidance_scale", stage.sampler.guidance_scale, stage)


def _check_guidance(key: str, scale: float, stage: StageConfig) -> None:
    if scale != 1.0 and not (stage.num_classes and stage.diffusion.label_dropout_prob > 0):
        _fail(
            key,
            scale,
            f"1.0 (no guidance): stage {stage.name!r} was configured without classes or with"
            " config.stage.diffusion.label_dropout_prob = 0",
        )


def _check_batch(key: str, batch_size: int, mesh: MeshConfig, num_devices: int = 1) -> None:
    if mesh.data == 0:
        _fail("mesh.data", mesh.data, "-1 (all devices) or a value of at least 1")
    shards = mesh.fsdp * (mesh.data if mesh.data > 0 else max(1, num_devices // mesh.fsdp))
    if batch_size % shards:
        _fail(
            key,
            batch_size,
            f"a multiple of {shards}, the devices of config.mesh (data {shards // mesh.fsdp} x"
            f" fsdp {mesh.fsdp})",
        )


def check_devices(config: RunConfig | CascadeConfig, num_devices: int) -> None:
    """Checks the mesh and the batches against the number of devices there are."""
    mesh = config.mesh
    if mesh.fsdp > num_devices or (mesh.data == -1 and num_devices % mesh.fsdp):
        _fail("mesh.fsdp", mesh.fsdp, f"a divisor of the {num_devices} devices found")
    if mesh.data > 0 and mesh.data * mesh.fsdp != num_devices:
        _fail("mesh.data", mesh.data, f"data x fsdp to be the {num_devices} devices found, or -1")
    if isinstance(config, RunConfig):
        _check_batch("train.batch_size", config.train.batch_size, mesh, num_devices)
        _check_batch("eval.batch_size", config.eval.batch_size, mesh, num_devices)
    else:
        _check_batch("cascade.batch_size", config.cascade.batch_size, mesh, num_devices)


def cascade_config_from(values: Mapping[str, Any]) -> CascadeConfig:
    """A checked `CascadeConfig`. Raises UserError like `run_config_from`."""
    config = _convert(CascadeConfig, values)
    cascade = config.cascade
    if not cascade.stages:
        _fail("cascade.stages", cascade.stages, "the names of at least one run folder")
    for name in cascade.stages:
        if not name.replace("_", "").isalnum():
            _fail("cascade.stages", cascade.stages, "names of letters, digits and underscores")
    for key, extra in (
        ("aug_levels", 1),
        ("samplers", 0),
        ("num_steps", 0),
        ("guidance_scales", 0),
    ):
        wanted = len(cascade.stages) - extra
        if len(getattr(cascade, key)) != wanted:
            _fail(f"cascade.{key}", getattr(cascade, key), f"{wanted} values")
    _check_batch("cascade.batch_size", cascade.batch_size, config.mesh)
    return config


def check_chain(cascade: CascadeSection, stages: typing.Sequence[StageConfig]) -> None:
    """Checks that the runs a cascade names fit together.

    Raises:
      UserError: sizes that do not chain, different channels or classes, levels
        or guidance that a stage was not trained for, truncation across stages
        whose forward processes differ.
    """
    if stages[0].kind != "base":
        _fail("cascade.stages", cascade.stages, f"a base model first; {stages[0].name!r} is none")
    for i, stage in enumerate(stages):
        _check_guidance(f"cascade.guidance_scales[{i}]", cascade.guidance_scales[i], stage)
    for i, (below, stage) in enumerate(itertools.pairwise(stages)):
        if stage.low_res_resolution != below.resolution:
            _fail(
                "cascade.stages",
                cascade.stages,
                f"sizes that chain: {below.name!r} makes {below.resolution} px images,"
                f" {stage.name!r} enlarges {stage.low_res_resolution} px images",
            )
        for field in ("channels", "num_classes"):
            if getattr(below, field) != getattr(stage, field):
                _fail(
                    "cascade.stages",
                    cascade.stages,
                    f"stages with the same {field}: {below.name!r} has {getattr(below, field)},"
                    f" {stage.name!r} has {getattr(stage, field)}",
                )
        level = cascade.aug_levels[i]
        if stage.augment.name == "none":
            if level != 0.0 or cascade.truncated:
                _fail(
                    f"cascade.aug_levels[{i}]",
                    level,
                    f"0.0, and config.cascade.truncated = False: stage {stage.name!r} was trained"
                    " without conditioning augmentation",
                )
        elif cascade.truncated and stage.augment.schedule != below.diffusion.schedule:
            _fail(
                "cascade.truncated",
                True,
                f"False: {below.name!r} and the augmentation of {stage.name!r} have different"
                " schedules",
            )
        if cascade.truncated and level >= 1.0:
            _fail(f"cascade.aug_levels[{i}]", level, "a level below 1 to truncate at")


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


# What a run that goes on may change. Everything else decides what is computed:
# another value there is another run.
_FREE_TO_CHANGE = (
    "train.train_steps",
    "train.log_every_steps",
    "train.sample_every_steps",
    "data.read_threads",
    "eval.",
    "mesh.",
    "checkpoint.",
    "stage.sampler.",
)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def check_resume(old: RunConfig, new: RunConfig, workdir: str) -> list[str]:
    """Compares the config of a run folder with the one it shall go on with.

    Returns:
      One line for every key that changed and may.

    Raises:
      UserError: a key changed that decides what the run computes.
    """
    old_flat, new_flat = _flatten(to_dict(old)), _flatten(to_dict(new))
    changed = [key for key in new_flat if old_flat[key] != new_flat[key]]
    for key in changed:
        if not key.startswith(_FREE_TO_CHANGE):
            raise UserError(
                f"config.{key} = {new_flat[key]!r}: the run in {workdir} was started with"
                f" {old_flat[key]!r}; set it back, or choose another --workdir"
            )
    return [f"config.{key}: {old_flat[key]!r} -> {new_flat[key]!r}" for key in changed]
