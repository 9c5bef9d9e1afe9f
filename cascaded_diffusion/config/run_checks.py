"""Which values of a config go together: across sections and stages, with a run, with devices."""

import itertools
from collections.abc import Sequence
from functools import partial

from cascaded_diffusion.config.convert import convert, fail, fail_at
from cascaded_diffusion.config.schema import (
    CascadeConfig,
    CascadeSection,
    DataConfig,
    MeshConfig,
    RunConfig,
    StageConfig,
    eval_sampler,
)
from cascaded_diffusion.config.stage_checks import (
    check_feature_maps,
    check_level,
    check_sampler,
    check_stage,
    rounded_level,
)
from cascaded_diffusion.config.stage_cost import stage_cost
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.paths import check_path


def run_config_from(values: object) -> RunConfig:
    """A checked `RunConfig` from a ConfigDict's plain dicts or from parsed JSON.

    Raises UserError if a key is unknown or missing, a value has the wrong type or is out of
    range, or values do not go together.
    """
    config = convert(RunConfig, values)
    refuse = partial(fail_at, config)
    check_stage(config.stage)
    stage, data, train = config.stage, config.data, config.train
    if data.resolution < stage.resolution:
        refuse("stage.resolution", f"at most config.data.resolution, which is {data.resolution}")
    _check_data(config)
    _check_batch("train.batch_size", train.batch_size, config.mesh, train.parts)
    _check_remat(config)
    if not train.ema_decays:
        refuse("train.ema_decays", "at least one decay")
    _check_eval(config)
    _check_work(config)
    if train.warmup_steps >= train.train_steps:
        refuse(
            "train.warmup_steps",
            f"less than config.train.train_steps, which is {train.train_steps}",
        )
    return config


# Data sets that come with the package, and those that are wherever config.data.path says.
BUILTIN_DATA = ("mnist", "shapes")
FILE_DATA = ("folder", "adm_folder", "npz")


def _check_data(config: RunConfig) -> None:
    refuse = partial(fail_at, config)
    stage, data = config.stage, config.data
    if data.name in FILE_DATA and not data.path:
        refuse("data.path", f"where the images of config.data.name = {data.name!r} are")
    if data.name in BUILTIN_DATA and data.path is not None:
        refuse("data.path", f"None: {data.name!r} comes with the package")
    for key in ("path", "prepared_dir"):
        if (path := getattr(data, key)) is not None:
            check_path(path, f"config.data.{key}")
    if data.low_res == "stored" and stage.low_res_resolution is None:
        refuse("data.low_res", "'derived': this stage has no low-res input")


# A batch on a host; and a training that would take years on all computers of the world.
_MAX_BATCH_BYTES = 10**12
_MAX_TRAINING_FLOPS = 10**30


def _check_work(config: RunConfig) -> None:
    stage, data, train = config.stage, config.data, config.train
    _check_batch_bytes("train.batch_size", train.batch_size, "data", data, stage.channels)
    _check_batch_bytes("eval.batch_size", config.eval.batch_size, "stage", stage, stage.channels)
    flops = 3 * stage_cost(stage).flops * train.batch_size * train.train_steps
    if flops > _MAX_TRAINING_FLOPS:
        fail_at(
            config,
            "train.train_steps",
            f"fewer, or smaller batches: with config.train.batch_size = {train.batch_size} it"
            f" would be about {flops:.1e} FLOPs, expected at most {_MAX_TRAINING_FLOPS:.0e}",
        )


def _check_batch_bytes(
    key: str, batch_size: int, section: str, images: DataConfig | StageConfig, channels: int
) -> None:
    count = 4 * batch_size * images.resolution**2 * channels
    if count > _MAX_BATCH_BYTES:
        fail(
            key,
            batch_size,
            f"a smaller batch: images of config.{section}.resolution = {images.resolution} with"
            f" config.stage.channels = {channels} would take {count:.1e} bytes, expected at most"
            f" {_MAX_BATCH_BYTES:.0e}",
        )


# Feature extractors that are trained on the real images' labels.
LABELLED_FEATURES = ("classifier", "resnet", "resnet50")


def _check_eval(config: RunConfig) -> None:
    refuse = partial(fail_at, config)
    stage, settings, ema_decays = config.stage, config.eval, config.train.ema_decays
    if stage.num_classes:
        for key in ("num_samples", "final_num_samples"):
            if getattr(settings, key) % stage.num_classes:
                refuse(
                    f"eval.{key}",
                    f"a multiple of config.stage.num_classes, which is {stage.num_classes},"
                    " for the samples to be class-balanced",
                )
    check_level("eval.aug_level", settings.aug_level, stage)
    if not settings.ema_decays or not set(settings.ema_decays) <= set(ema_decays):
        refuse(
            "eval.ema_decays",
            f"at least one, each of config.train.ema_decays, which are {ema_decays}",
        )
    if (settings.features == "inception") != (settings.resize is not None):
        expected = "None, since config.eval.features is not 'inception'"
        if settings.features == "inception":
            expected = "'legacy' (as the original FID and ADM's evaluator), 'clean' (clean-fid)"
            expected += " or 'pytorch_fid'"
        refuse("eval.resize", expected)
    if settings.features in LABELLED_FEATURES and stage.num_classes < 2:
        refuse(
            "eval.features",
            "'rotation' or 'inception': a classifier needs at least 2 classes, and"
            f" config.stage.num_classes is {stage.num_classes}",
        )
    if settings.features == "inception" and stage.channels not in (1, 3):
        refuse("eval.features", "another extractor: Inception takes 1 or 3 channels")
    sampler = eval_sampler(config)
    if sampler != stage.sampler:
        try:
            check_sampler("eval", sampler, stage)
        except UserError as e:
            raise UserError(f"config.eval.sampler, config.eval.num_steps: {e}") from e


def _check_remat(config: RunConfig) -> None:
    refuse = partial(fail_at, config, "train.remat_resolutions")
    remat, sizes = config.train.remat, config.train.remat_resolutions
    if remat == "resolutions" and not sizes:
        refuse("sizes, since config.train.remat is 'resolutions'")
    if remat != "resolutions" and sizes is not None:
        refuse(f"None, since config.train.remat is {remat!r}, not 'resolutions'")
    check_feature_maps("train.remat_resolutions", sizes or (), config.stage)


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
    refuse, mesh = partial(fail_at, config), config.mesh
    others = mesh.fsdp_size * mesh.tensor_size
    if mesh.data > 0 and mesh.data * others != num_devices:
        refuse(
            "mesh.data",
            f"data x fsdp {mesh.fsdp_size} x tensor {mesh.tensor_size} to be the {num_devices}"
            " devices found, or -1 to take what there is",
        )
    if others > num_devices or num_devices % others:
        key = "fsdp" if mesh.fsdp_size > 1 or mesh.tensor is None else "tensor"
        product = "" if mesh.tensor_size == 1 or key == "tensor" else ", times config.mesh.tensor,"
        refuse(f"mesh.{key}", f"a divisor{product} of the {num_devices} devices found")
    if isinstance(config, RunConfig):
        parts = config.train.parts
        _check_batch("train.batch_size", config.train.batch_size, mesh, parts, num_devices)
    else:
        _check_batch("cascade.batch_size", config.cascade.batch_size, mesh, 1, num_devices)


def evaluation_mesh(config: RunConfig | CascadeConfig, num_devices: int) -> MeshConfig:
    """The mesh on which a config's samples are made: for a run, all devices along `data`.

    A run's own mesh is for training, perhaps on a pod; evaluation takes the devices it finds.
    Raises UserError if a batch cannot be split over them.
    """
    if isinstance(config, CascadeConfig):
        check_devices(config, num_devices)
        return config.mesh
    if config.eval.batch_size % num_devices:
        fail_at(
            config,
            "eval.batch_size",
            f"a multiple of {num_devices}, the devices found, over which samples are split; set it"
            " by a call of `main` with --config.eval.batch_size",
        )
    return MeshConfig(data=-1, fsdp=1, tensor=None)


def cascade_config_from(values: object) -> CascadeConfig:
    """A checked `CascadeConfig`. Raises UserError like `run_config_from`."""
    config = convert(CascadeConfig, values)
    refuse, cascade = partial(fail_at, config), config.cascade
    if not cascade.stages:
        refuse("cascade.stages", "the names of at least one run folder")
    for name in cascade.stages:
        if not name.replace("_", "").isalnum():
            refuse("cascade.stages", "names of letters, digits and underscores")
    for key, extra in (("aug_levels", 1), ("samplers", 0), ("configs", 0)):
        wanted = len(cascade.stages) - extra
        if len(getattr(cascade, key)) != wanted:
            refuse(f"cascade.{key}", f"{wanted} values")
    _check_batch("cascade.batch_size", cascade.batch_size, config.mesh)
    return config


def check_chain(cascade: CascadeSection, stages: Sequence[StageConfig]) -> None:
    """Checks that the runs a cascade names fit together.

    Raises UserError if sizes do not chain, channels or classes differ, a stage was not trained
    for a level or for guidance, or truncation spans stages whose forward processes differ.
    """
    refuse = partial(fail_at, cascade)
    if stages[0].kind != "base":
        refuse("cascade.stages", f"a base model first; {stages[0].name!r} is not one")
    for i, stage in enumerate(stages):
        check_sampler(f"cascade.samplers[{i}]", cascade.samplers[i], stage)
        _check_batch_bytes("cascade.batch_size", cascade.batch_size, "stage", stage, stage.channels)
    for i, (below, stage) in enumerate(itertools.pairwise(stages)):
        if stage.low_res_resolution != below.resolution:
            refuse(
                "cascade.stages",
                f"sizes that chain: {below.name!r} makes {below.resolution} px images,"
                f" {stage.name!r} enlarges {stage.low_res_resolution} px images",
            )
        for field in ("channels", "num_classes"):
            if getattr(below, field) != getattr(stage, field):
                refuse(
                    "cascade.stages",
                    f"stages with the same {field}: {below.name!r} has {getattr(below, field)},"
                    f" {stage.name!r} has {getattr(stage, field)}",
                )
        level = cascade.aug_levels[i]
        check_level(f"cascade.aug_levels[{i}]", level, stage)
        if cascade.truncated and stage.has_aug_level:
            if stage.low_res_schedule != below.schedule:
                refuse(
                    "cascade.truncated",
                    f"False: the config.stage.schedule of {below.name!r} and the"
                    f" config.stage.low_res_schedule of {stage.name!r} differ",
                )
            if rounded_level(level, stage) >= 1.0:
                fail(f"cascade.aug_levels[{i}]", level, "a level below 1 to truncate at")
    if cascade.truncated and not any(stage.has_aug_level for stage in stages):
        refuse(
            "cascade.truncated",
            "False: no stage was trained with config.stage.augment.name = 'gaussian'",
        )


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
