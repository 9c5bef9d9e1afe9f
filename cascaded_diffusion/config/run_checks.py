"""Which values of a config go together: across sections and stages, with a run, with devices."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Mapping
from typing import Any

from cascaded_diffusion.config.convert import convert, fail
from cascaded_diffusion.config.schema import (
    CascadeConfig,
    CascadeSection,
    MeshConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    eval_sampler,
    to_dict,
)
from cascaded_diffusion.config.stage_checks import (
    check_level,
    check_sampler,
    check_stage,
    feature_map_sizes,
    rounded_level,
)
from cascaded_diffusion.config.stage_cost import stage_cost
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.paths import check_local_path


def run_config_from(values: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from a ConfigDict's plain dicts or from parsed JSON.

    Raises:
      UserError: an unknown or missing key, a wrong type, a value that is out of
        range, or values that do not go together.
    """
    config = convert(RunConfig, values)
    check_stage(config.stage)
    stage, data, train = config.stage, config.data, config.train
    if data.resolution < stage.resolution:
        fail(
            "stage.resolution",
            stage.resolution,
            f"at most config.data.resolution, which is {data.resolution}",
        )
    _check_data(config)
    _check_batch("train.batch_size", train.batch_size, config.mesh, train.accumulation_steps or 1)
    _check_remat(config)
    if not train.ema_decays:
        fail("train.ema_decays", train.ema_decays, "at least one decay")
    _check_eval(config)
    _check_work(config)
    if train.warmup_steps >= train.train_steps:
        fail(
            "train.warmup_steps",
            train.warmup_steps,
            f"less than config.train.train_steps, which is {train.train_steps}",
        )
    return config


# Data sets that come with the package, and those that are wherever config.data.path says.
BUILTIN_DATA = ("mnist", "shapes")
FILE_DATA = ("folder", "adm_folder", "npz")


def _check_data(config: RunConfig) -> None:
    stage, data = config.stage, config.data
    if data.name in FILE_DATA and not data.path:
        fail("data.path", data.path, f"where the images of config.data.name = {data.name!r} are")
    if data.name in BUILTIN_DATA and data.path is not None:
        fail("data.path", data.path, f"None: {data.name!r} comes with the package")
    for key in ("path", "prepared_dir"):
        if (path := getattr(data, key)) is not None:
            check_local_path(path, f"config.data.{key}")
    if data.low_res == "stored" and stage.low_res_resolution is None:
        fail("data.low_res", data.low_res, "'derived': this stage has no low-res input")


# A batch on a host, and a training: all computers of the world would take years for it.
_MAX_BATCH_BYTES = 10**12
_MAX_TRAINING_FLOPS = 10**30


def _check_work(config: RunConfig) -> None:
    stage, data, train = config.stage, config.data, config.train
    batches = (
        ("train.batch_size", train.batch_size, "data.resolution", data.resolution),
        ("eval.batch_size", config.eval.batch_size, "stage.resolution", stage.resolution),
    )
    for key, batch_size, size_key, size in batches:
        _check_batch_bytes(key, batch_size, size_key, size, stage.channels)
    flops = 3 * stage_cost(stage).flops * train.batch_size * train.train_steps
    if flops > _MAX_TRAINING_FLOPS:
        fail(
            "train.train_steps",
            train.train_steps,
            f"fewer, or smaller batches: with config.train.batch_size = {train.batch_size} it"
            f" would be about {flops:.1e} FLOPs, expected at most {_MAX_TRAINING_FLOPS:.0e}",
        )


def _check_batch_bytes(key: str, batch_size: int, size_key: str, size: int, channels: int) -> None:
    count = 4 * batch_size * size**2 * channels
    if count > _MAX_BATCH_BYTES:
        fail(
            key,
            batch_size,
            f"a smaller batch: images of config.{size_key} = {size} with"
            f" config.stage.channels = {channels} would take {count:.1e} bytes, expected at most"
            f" {_MAX_BATCH_BYTES:.0e}",
        )


# Feature extractors that are trained on the real images' labels.
LABELLED_FEATURES = ("classifier", "resnet", "resnet50")


def _check_eval(config: RunConfig) -> None:
    stage, settings, ema_decays = config.stage, config.eval, config.train.ema_decays
    if stage.num_classes:
        for key in ("num_samples", "final_num_samples"):
            if getattr(settings, key) % stage.num_classes:
                fail(
                    f"eval.{key}",
                    getattr(settings, key),
                    f"a multiple of config.stage.num_classes, which is {stage.num_classes},"
                    " for the samples to be class-balanced",
                )
    check_level("eval.aug_level", settings.aug_level, stage)
    for decay in settings.ema_decays or (None,):
        if decay not in ema_decays:
            fail(
                "eval.ema_decays",
                settings.ema_decays,
                f"at least one, each of config.train.ema_decays, which are {ema_decays}",
            )
    if (settings.features == "inception") != (settings.resize is not None):
        expected = "None, since config.eval.features is not 'inception'"
        if settings.features == "inception":
            expected = "'legacy' (as the original FID and ADM's evaluator) or 'clean' (clean-fid)"
        fail("eval.resize", settings.resize, expected)
    if settings.features in LABELLED_FEATURES and stage.num_classes < 2:
        fail(
            "eval.features",
            settings.features,
            "'rotation' or 'inception': a classifier needs at least 2 classes, and"
            f" config.stage.num_classes is {stage.num_classes}",
        )
    if settings.features == "inception" and stage.channels not in (1, 3):
        fail(
            "eval.features", settings.features, "another extractor: Inception takes 1 or 3 channels"
        )
    sampler = eval_sampler(config)
    if sampler != stage.sampler:
        try:
            check_sampler("eval", sampler, stage)
        except UserError as e:
            raise UserError(f"config.eval.sampler, config.eval.num_steps: {e}") from e


def _check_remat(config: RunConfig) -> None:
    remat, sizes = config.train.remat, config.train.remat_resolutions
    if remat == "resolutions" and not sizes:
        fail("train.remat_resolutions", sizes, "sizes, since config.train.remat is 'resolutions'")
    if remat != "resolutions" and sizes is not None:
        fail(
            "train.remat_resolutions",
            sizes,
            f"None, since config.train.remat is {remat!r}, not 'resolutions'",
        )
    known = feature_map_sizes(config.stage)
    if sizes and not set(sizes) <= set(known):
        fail(
            "train.remat_resolutions",
            sizes,
            f"sizes of feature maps, which are {', '.join(map(str, known))}",
        )


def remat_sizes(train: TrainConfig, stage: StageConfig) -> tuple[int, ...]:
    """Sizes of the feature maps whose blocks are computed anew in the backward pass."""
    if train.remat == "everything":
        return tuple(feature_map_sizes(stage))
    return train.remat_resolutions or ()


def _check_batch(
    key: str, batch_size: int, mesh: MeshConfig, parts: int = 1, num_devices: int = 1
) -> None:
    if mesh.data == 0:
        fail("mesh.data", mesh.data, "-1 (all devices) or a value of at least 1")
    others = mesh.fsdp_size * mesh.tensor_size
    data = mesh.data if mesh.data > 0 else max(1, num_devices // others)
    shards = data * mesh.fsdp_size
    if batch_size % (shards * parts):
        in_parts = "" if parts == 1 else f", times config.train.accumulation_steps = {parts}"
        hint = ""
        if batch_size < shards and parts == 1:
            hint = "; with fewer examples than devices, raise config.mesh.tensor"
        fail(
            key,
            batch_size,
            f"a multiple of {shards * parts}, the devices of config.mesh that a batch is split"
            f" over (data {data} x fsdp {mesh.fsdp_size}){in_parts}{hint}",
        )


def check_devices(config: RunConfig | CascadeConfig, num_devices: int) -> None:
    """Checks the mesh and the batches against the number of devices there are."""
    mesh = config.mesh
    others = mesh.fsdp_size * mesh.tensor_size
    if mesh.data > 0 and mesh.data * others != num_devices:
        fail(
            "mesh.data",
            mesh.data,
            f"data x fsdp {mesh.fsdp_size} x tensor {mesh.tensor_size} to be the {num_devices}"
            " devices found, or -1 to take what there is",
        )
    if others > num_devices or num_devices % others:
        key = "fsdp" if mesh.fsdp_size > 1 or mesh.tensor is None else "tensor"
        product = "" if mesh.tensor_size == 1 or key == "tensor" else ", times config.mesh.tensor,"
        fail(
            f"mesh.{key}",
            getattr(mesh, key),
            f"a divisor{product} of the {num_devices} devices found",
        )
    if isinstance(config, RunConfig):
        train = config.train
        parts = train.accumulation_steps or 1
        _check_batch("train.batch_size", train.batch_size, mesh, parts, num_devices)
    else:
        batch_size = config.cascade.batch_size
        _check_batch("cascade.batch_size", batch_size, mesh, num_devices=num_devices)


def evaluation_mesh(config: RunConfig | CascadeConfig, num_devices: int) -> MeshConfig:
    """The mesh that a config's samples are made on: for a run, all devices along `data`.

    A run's own mesh is that of its training, perhaps of a pod; it may be evaluated beside it on
    whatever there is. Raises UserError if a batch cannot be split over the devices.
    """
    if isinstance(config, CascadeConfig):
        check_devices(config, num_devices)
        return config.mesh
    if config.eval.batch_size % num_devices:
        fail(
            "eval.batch_size",
            config.eval.batch_size,
            f"a multiple of {num_devices}, the devices found, over which samples are split; set it"
            " by a call of `main` with --config.eval.batch_size",
        )
    return MeshConfig(data=-1, fsdp=1, tensor=None)


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
        check_sampler(f"cascade.samplers[{i}]", cascade.samplers[i], stage)
        _check_batch_bytes(
            "cascade.batch_size",
            cascade.batch_size,
            "stage.resolution",
            stage.resolution,
            stage.channels,
        )
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
        check_level(f"cascade.aug_levels[{i}]", level, stage)
        if cascade.truncated and stage.has_aug_level:
            if stage.low_res_schedule != below.schedule:
                fail(
                    "cascade.truncated",
                    True,
                    f"False: the config.stage.schedule of {below.name!r} and the"
                    f" config.stage.low_res_schedule of {stage.name!r} differ",
                )
            if rounded_level(level, stage) >= 1.0:
                fail(f"cascade.aug_levels[{i}]", level, "a level below 1 to truncate at")
    if cascade.truncated and not any(stage.has_aug_level for stage in stages):
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
    # How it is computed, not what.
    "train.accumulation_steps",
    "train.remat",
    # Where the images are, and how they get here. That they are the same ones is for
    # runtime.run_data to say.
    "data.path",
    "data.prepared_dir",
    "data.on_corrupt",
    "data.max_corrupt_fraction",
    "data.max_pixels",
    "data.read_threads",
    "data.read_workers",
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


# Below its 2,048 features, Inception's covariance is singular and an FID mostly bias.
_LEAST_SAMPLES = 2048


def check_sample_count(num_samples: int, features: str, *, allow_few: bool) -> None:
    """Raises UserError for an FID of fewer samples than Inception has features."""
    if features == "inception" and num_samples < _LEAST_SAMPLES and not allow_few:
        raise UserError(
            f"an FID of {num_samples} samples: expected at least {_LEAST_SAMPLES}, the number of"
            " Inception's features, below which it is mostly bias; to have it all the same, add"
            " --allow_few_samples"
        )
