"""Which values of a config go together: across keys, across stages, with a run, with devices."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Mapping
from typing import Any

from cascaded_diffusion.config import (
    CascadeConfig,
    CascadeSection,
    MeshConfig,
    RunConfig,
    SamplerConfig,
    ScheduleConfig,
    StageConfig,
    convert,
    fail,
    to_dict,
)
from cascaded_diffusion.errors import UserError


def run_config_from(values: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from a ConfigDict's plain dicts or from parsed JSON.

    Raises:
      UserError: an unknown or missing key, a wrong type, a value that is out of
        range, or values that do not go together.
    """
    config = convert(RunConfig, values)
    _check_stage(config.stage)
    stage, data, train = config.stage, config.data, config.train
    if data.resolution < stage.resolution:
        fail(
            "stage.resolution",
            stage.resolution,
            f"at most config.data.resolution, which is {data.resolution}",
        )
    _check_batch("train.batch_size", train.batch_size, config.mesh)
    _check_batch("eval.batch_size", config.eval.batch_size, config.mesh)
    if stage.num_classes and config.eval.num_samples % stage.num_classes:
        fail(
            "eval.num_samples",
            config.eval.num_samples,
            f"a multiple of config.stage.num_classes, which is {stage.num_classes},"
            " for the samples to be class-balanced",
        )
    _check_level("eval.aug_level", config.eval.aug_level, stage)
    if not train.ema_decays:
        fail("train.ema_decays", train.ema_decays, "at least one decay")
    for decay in config.eval.ema_decays or (None,):
        if decay not in train.ema_decays:
            fail(
                "eval.ema_decays",
                config.eval.ema_decays,
                f"at least one, each of config.train.ema_decays, which are {train.ema_decays}",
            )
    if train.warmup_steps >= train.train_steps:
        fail(
            "train.warmup_steps",
            train.warmup_steps,
            f"less than config.train.train_steps, which is {train.train_steps}",
        )
    return config


def _check_stage(stage: StageConfig) -> None:
    if not stage.name.replace("_", "").isalnum():
        fail("stage.name", stage.name, "letters, digits and underscores")
    _check_network(stage)
    if stage.kind == "super_resolution":
        if stage.low_res_resolution is None or stage.low_res_resolution >= stage.resolution:
            fail(
                "stage.low_res_resolution",
                stage.low_res_resolution,
                f"the size of the images to enlarge, below config.stage.resolution ="
                f" {stage.resolution}, since config.stage.kind is 'super_resolution'",
            )
    else:
        if stage.low_res_resolution is not None:
            fail(
                "stage.low_res_resolution",
                stage.low_res_resolution,
                "None, since config.stage.kind is 'base'",
            )
        if stage.augment.name != "none":
            fail(
                "stage.augment.name",
                stage.augment.name,
                "'none': a stage of config.stage.kind 'base' has no low-res input to damage",
            )
    _check_schedule("stage.schedule", stage.schedule)
    _check_augment(stage)
    _check_diffusion(stage)
    _check_sampler("stage.sampler", stage.sampler, stage)


def _check_network(stage: StageConfig) -> None:
    network, levels = stage.network, len(stage.network.channel_mults)
    if not levels:
        fail("stage.network.channel_mults", network.channel_mults, "at least one level")
    if len(network.num_res_blocks) != levels:
        fail(
            "stage.network.num_res_blocks",
            network.num_res_blocks,
            f"{levels} values, one per level of config.stage.network.channel_mults",
        )
    halvings = levels - 1
    if network.name == "efficient_unet":
        halvings = levels  # its first level works at half the image's size already
        for key, plain in (("resample", "conv"), ("patch_size", 1)):
            if getattr(network, key) != plain:
                fail(
                    f"stage.network.{key}",
                    getattr(network, key),
                    f"{plain!r}, since config.stage.network.name is 'efficient_unet'",
                )
    factor = network.patch_size * 2**halvings
    if stage.resolution % factor:
        fail(
            "stage.resolution",
            stage.resolution,
            f"a multiple of {factor}: config.stage.network.patch_size = {network.patch_size} and"
            f" {levels} levels of config.stage.network.channel_mults",
        )
    if network.channels % 2:
        fail("stage.network.channels", network.channels, "an even number")
    for mult in network.channel_mults:
        if network.channels * mult % network.num_heads:
            fail(
                "stage.network.num_heads",
                network.num_heads,
                f"a divisor of every level's channels; {network.channels * mult} is not divided",
            )
    first = stage.resolution // network.patch_size // 2 ** (halvings - levels + 1)
    sizes = [first // 2**i for i in range(levels)]
    for size in network.attention_resolutions:
        if size not in sizes:
            fail(
                "stage.network.attention_resolutions",
                network.attention_resolutions,
                f"sizes of feature maps, which are {', '.join(map(str, sizes))}",
            )


def _check_used(section: str, config: Any, uses: Mapping[str, str], by: str) -> None:
    """`uses` names, for each optional key, the value of key `by` that needs it."""
    for key, user in uses.items():
        value, used = getattr(config, key), getattr(config, by) == user
        if used and value is None:
            fail(f"{section}.{key}", None, f"a value, since config.{section}.{by} is {user!r}")
        if not used and value is not None:
            fail(
                f"{section}.{key}",
                value,
                f"None, since config.{section}.{by} is {getattr(config, by)!r}, not {user!r}",
            )


def _check_pair(key: str, pair: tuple[float, ...] | None) -> None:
    if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
        fail(key, pair, "two values, the lower one first")


def _check_schedule(key: str, schedule: ScheduleConfig) -> None:
    uses = {
        "cosine_offset": "cosine",
        "linear_betas": "linear",
        "reference_resolution": "shifted_cosine",
    }
    _check_used(key, schedule, uses, "name")
    _check_pair(f"{key}.linear_betas", schedule.linear_betas)
    steps, betas = schedule.num_timesteps, schedule.linear_betas
    if steps is not None and betas is not None and betas[1] * 1000 / steps >= 1:
        fail(
            f"{key}.num_timesteps",
            steps,
            f"more than {1000 * betas[1]:g}: with fewer steps a beta of config.{key}.linear_betas ="
            f" {betas} would not be below 1",
        )
    if schedule.num_timesteps is None and schedule.noise_levels == "discrete":
        fail(
            f"{key}.noise_levels",
            "discrete",
            f"'continuous', since config.{key}.num_timesteps is None",
        )


def _check_augment(stage: StageConfig) -> None:
    augment, gaussian = stage.augment, stage.augment.name == "gaussian"
    uses = {key: "blur" for key in ("blur_kernel_size", "blur_sigmas", "blur_prob")}
    _check_used("stage.augment", augment, {"max_level": "gaussian", **uses}, "name")
    _check_pair("stage.augment.blur_sigmas", augment.blur_sigmas)
    if augment.blur_kernel_size is not None and augment.blur_kernel_size % 2 == 0:
        fail("stage.augment.blur_kernel_size", augment.blur_kernel_size, "an odd number")
    if gaussian != (stage.low_res_schedule is not None):
        fail(
            "stage.low_res_schedule",
            None if gaussian else "(a section)",
            "the low-res stage's own config.stage.schedule, since config.stage.augment.name is"
            " 'gaussian'"
            if gaussian
            else f"None, since config.stage.augment.name is {augment.name!r}, not 'gaussian'",
        )
    if stage.low_res_schedule is not None:
        _check_schedule("stage.low_res_schedule", stage.low_res_schedule)
        steps = stage.low_res_schedule.discrete_timesteps
        if steps is not None and augment.max_level * steps < 1:
            fail(
                "stage.augment.max_level",
                augment.max_level,
                f"at least one of the {steps} steps of config.stage.low_res_schedule",
            )


def _check_diffusion(stage: StageConfig) -> None:
    diffusion, schedule = stage.diffusion, stage.schedule
    _check_used("stage.diffusion", diffusion, {"vlb_weight": "hybrid"}, "loss")
    if diffusion.loss != "simple" and schedule.noise_levels != "discrete":
        fail(
            "stage.diffusion.loss",
            diffusion.loss,
            "'simple', since the bound is over the steps of a process whose"
            " config.stage.schedule.noise_levels are 'discrete'",
        )
    if diffusion.variance == "fixed" and diffusion.loss == "hybrid":
        fail(
            "stage.diffusion.variance",
            diffusion.variance,
            "'learned', since config.stage.diffusion.loss is 'hybrid', whose bound trains the"
            " variance alone",
        )
    if diffusion.label_dropout_prob and not stage.num_classes:
        fail(
            "stage.diffusion.label_dropout_prob",
            diffusion.label_dropout_prob,
            "0.0, since config.stage.num_classes is 0",
        )
    if diffusion.weighting == "truncated_snr" and diffusion.parameterization == "eps":
        fail(
            "stage.diffusion.weighting",
            diffusion.weighting,
            "another weighting, or config.stage.diffusion.parameterization = 'v' or 'x0': of an"
            " error of eps it would be 1 / SNR, without bound",
        )
    if diffusion.variance == "learned" and diffusion.loss == "simple":
        fail(
            "stage.diffusion.loss",
            diffusion.loss,
            "'hybrid' or 'vlb', since config.stage.diffusion.variance is 'learned'",
        )
    if diffusion.weighting != "none" and diffusion.loss != "simple":
        fail(
            "stage.diffusion.weighting",
            diffusion.weighting,
            f"'none', since config.stage.diffusion.loss is {diffusion.loss!r}",
        )


def _check_sampler(key: str, sampler: SamplerConfig, stage: StageConfig) -> None:
    scale = sampler.guidance_scale
    if scale != 1.0 and not (stage.num_classes and stage.diffusion.label_dropout_prob > 0):
        fail(
            f"{key}.guidance_scale",
            scale,
            f"1.0 (no guidance): stage {stage.name!r} was configured without classes or with"
            " config.stage.diffusion.label_dropout_prob = 0",
        )
    if sampler.variance == "learned" and sampler.name != "ancestral":
        fail(
            f"{key}.variance",
            "learned",
            f"None, or config.{key}.name = 'ancestral': {sampler.name!r} draws no noise of a"
            " learned variance",
        )
    _check_used(key, sampler, {"variance": "ancestral", "eta": "ddim"}, "name")
    _check_used(key, sampler, {"variance_interpolation": "interpolated"}, "variance")
    _check_used(key, sampler, {"threshold_percentile": "dynamic"}, "threshold")
    if sampler.variance == "learned" and stage.diffusion.variance != "learned":
        fail(
            f"{key}.variance",
            "learned",
            f"'small', 'large' or 'interpolated': stage {stage.name!r} was configured with"
            " config.stage.diffusion.variance = 'fixed'",
        )
    _check_pair(f"{key}.guidance_interval", sampler.guidance_interval)
    steps = stage.schedule.discrete_timesteps
    if steps is not None and sampler.num_steps > steps:
        fail(
            f"{key}.num_steps",
            sampler.num_steps,
            f"at most {steps}, the config.stage.schedule.num_timesteps of stage {stage.name!r},"
            " whose noise levels are discrete",
        )


def _rounded(level: float, stage: StageConfig) -> float:
    """The level that a stage with discrete steps makes of it."""
    steps = stage.low_res_schedule.discrete_timesteps
    return level if steps is None else round(level * steps) / steps


def _check_level(key: str, level: float, stage: StageConfig) -> None:
    if not stage.has_level:
        if level != 0.0:
            fail(
                key,
                level,
                f"0.0: stage {stage.name!r} was configured with config.stage.augment.name ="
                f" {stage.augment.name!r} and has no level to choose",
            )
    elif _rounded(level, stage) > stage.augment.max_level + 1e-6:
        fail(
            key,
            level,
            f"at most {stage.augment.max_level}, the config.stage.augment.max_level up to which"
            f" stage {stage.name!r} was trained",
        )


def _check_batch(key: str, batch_size: int, mesh: MeshConfig, num_devices: int = 1) -> None:
    if mesh.data == 0:
        fail("mesh.data", mesh.data, "-1 (all devices) or a value of at least 1")
    shards = mesh.fsdp * (mesh.data if mesh.data > 0 else max(1, num_devices // mesh.fsdp))
    if batch_size % shards:
        fail(
            key,
            batch_size,
            f"a multiple of {shards}, the devices of config.mesh (data {shards // mesh.fsdp} x"
            f" fsdp {mesh.fsdp})",
        )


def check_devices(config: RunConfig | CascadeConfig, num_devices: int) -> None:
    """Checks the mesh and the batches against the number of devices there are."""
    mesh = config.mesh
    if mesh.fsdp > num_devices or (mesh.data == -1 and num_devices % mesh.fsdp):
        fail("mesh.fsdp", mesh.fsdp, f"a divisor of the {num_devices} devices found")
    if mesh.data > 0 and mesh.data * mesh.fsdp != num_devices:
        fail("mesh.data", mesh.data, f"data x fsdp to be the {num_devices} devices found, or -1")
    if isinstance(config, RunConfig):
        _check_batch("train.batch_size", config.train.batch_size, mesh, num_devices)
        _check_batch("eval.batch_size", config.eval.batch_size, mesh, num_devices)
    else:
        _check_batch("cascade.batch_size", config.cascade.batch_size, mesh, num_devices)


def cascade_config_from(values: Mapping[str, Any]) -> CascadeConfig:
    """A checked `CascadeConfig`. Raises UserError like `run_config_from`."""
    config = convert(CascadeConfig, values)
    cascade = config.cascade
    if not cascade.stages:
        fail("cascade.stages", cascade.stages, "the names of at least one run folder")
    for name in cascade.stages:
        if not name.replace("_", "").isalnum():
            fail("cascade.stages", cascade.stages, "names of letters, digits and underscores")
    for key, extra in (("aug_levels", 1), ("samplers", 0), ("configs", 0)):
        wanted = len(cascade.stages) - extra
        if len(getattr(cascade, key)) != wanted:
            fail(f"cascade.{key}", getattr(cascade, key), f"{wanted} values")
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
        fail("cascade.stages", cascade.stages, f"a base model first; {stages[0].name!r} is none")
    for i, stage in enumerate(stages):
        _check_sampler(f"cascade.samplers[{i}]", cascade.samplers[i], stage)
    for i, (below, stage) in enumerate(itertools.pairwise(stages)):
        if stage.low_res_resolution != below.resolution:
            fail(
                "cascade.stages",
                cascade.stages,
                f"sizes that chain: {below.name!r} makes {below.resolution} px images,"
                f" {stage.name!r} enlarges {stage.low_res_resolution} px images",
            )
        for field in ("channels", "num_classes"):
            if getattr(below, field) != getattr(stage, field):
                fail(
                    "cascade.stages",
                    cascade.stages,
                    f"stages with the same {field}: {below.name!r} has {getattr(below, field)},"
                    f" {stage.name!r} has {getattr(stage, field)}",
                )
        level = cascade.aug_levels[i]
        _check_level(f"cascade.aug_levels[{i}]", level, stage)
        if cascade.truncated and stage.has_level:
            if stage.low_res_schedule != below.schedule:
                fail(
                    "cascade.truncated",
                    True,
                    f"False: the config.stage.schedule of {below.name!r} and the"
                    f" config.stage.low_res_schedule of {stage.name!r} differ",
                )
            if _rounded(level, stage) >= 1.0:
                fail(f"cascade.aug_levels[{i}]", level, "a level below 1 to truncate at")
    if cascade.truncated and not any(stage.has_level for stage in stages):
        fail(
            "cascade.truncated",
            True,
            "False: no stage was trained with config.stage.augment.name = 'gaussian'",
        )


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
