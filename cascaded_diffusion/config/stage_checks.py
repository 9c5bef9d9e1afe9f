"""Which values of one stage's config go together."""

from collections.abc import Mapping
from functools import partial

from cascaded_diffusion.config.convert import fail, fail_at
from cascaded_diffusion.config.schema import SamplerConfig, ScheduleConfig, StageConfig
from cascaded_diffusion.config.stage_cost import stage_cost
from cascaded_diffusion.errors import UserError

# The largest published diffusion models have some 2e10 parameters and take 1e14 FLOPs a pass.
_MAX_PARAMETERS = 10**12
_MAX_FLOPS = 10**17
# The paper enlarges by 2 and 4; nobody has tried more than 64 (16 to 1024 px).
_MAX_ENLARGEMENT = 64


def check_stage(stage: StageConfig) -> None:
    """Checks a stage by itself. Raises UserError."""
    refuse = partial(fail_at, stage)
    if not stage.name.replace("_", "").isalnum():
        refuse("stage.name", "letters, digits and underscores")
    _check_network(stage)
    if stage.kind == "super_resolution":
        if stage.low_res_resolution is None or stage.low_res_resolution >= stage.resolution:
            refuse(
                "stage.low_res_resolution",
                f"the size of the images to enlarge, below config.stage.resolution ="
                f" {stage.resolution}, since config.stage.kind is 'super_resolution'",
            )
        factor, rest = divmod(stage.resolution, stage.low_res_resolution)
        if rest or factor > _MAX_ENLARGEMENT:
            refuse(
                "stage.low_res_resolution",
                f"a size that config.stage.resolution = {stage.resolution} is a multiple of, 2 to"
                f" {_MAX_ENLARGEMENT} times",
            )
    else:
        if stage.low_res_resolution is not None:
            refuse("stage.low_res_resolution", "None, since config.stage.kind is 'base'")
        if stage.augment.name != "none":
            refuse(
                "stage.augment.name",
                "'none': a stage of config.stage.kind 'base' has no low-res input to damage",
            )
    _check_schedule("stage.schedule", stage.schedule)
    _check_augment(stage)
    _check_diffusion(stage)
    check_sampler("stage.sampler", stage.sampler, stage)
    _check_cost(stage)


def _check_cost(stage: StageConfig) -> None:
    """Bounds what values cost together that are each within their bounds."""
    cost, network = stage_cost(stage), stage.network
    blame = (
        f"config.stage.resolution = {stage.resolution}, config.stage.num_classes ="
        f" {stage.num_classes}, config.stage.network.channels = {network.channels},"
        f" channel_mults = {network.channel_mults}, num_res_blocks = {network.num_res_blocks},"
        f" attention_resolutions = {network.attention_resolutions}"
    )
    for value, unit, most in (
        (cost.parameters, "parameters", _MAX_PARAMETERS),
        (cost.flops, "FLOPs for one image", _MAX_FLOPS),
    ):
        if value > most:
            raise UserError(f"{blame}: about {value:.1e} {unit}, expected at most {most:.0e}")


def _check_network(stage: StageConfig) -> None:
    refuse = partial(fail_at, stage)
    network, levels = stage.network, len(stage.network.channel_mults)
    if not levels:
        refuse("stage.network.channel_mults", "at least one level")
    if len(network.num_res_blocks) != levels:
        refuse(
            "stage.network.num_res_blocks",
            f"{levels} values, one per level of config.stage.network.channel_mults",
        )
    halvings = levels - 1
    if network.name == "efficient_unet":
        halvings = levels  # its first level works at half the image's size already
        for key, plain in (("resample", "conv"), ("patch_size", 1)):
            if getattr(network, key) != plain:
                expected = f"{plain!r}, since config.stage.network.name is 'efficient_unet'"
                refuse(f"stage.network.{key}", expected)
    factor = network.patch_size * 2**halvings
    if stage.resolution % factor:
        refuse(
            "stage.resolution",
            f"a multiple of {factor}: config.stage.network.patch_size = {network.patch_size} and"
            f" {levels} levels of config.stage.network.channel_mults",
        )
    if network.channels % 2:
        refuse("stage.network.channels", "an even number")
    for mult, width in zip(network.channel_mults, network.widths, strict=True):
        if network.channels * mult != width or not width:
            refuse(
                "stage.network.channel_mults",
                f"multiples of config.stage.network.channels = {network.channels} that are"
                f" integers; {mult} is not",
            )
    _check_heads(stage)
    if network.null_label is False and stage.diffusion.label_dropout_prob:
        refuse(
            "stage.network.null_label",
            "True or None, since config.stage.diffusion.label_dropout_prob ="
            f" {stage.diffusion.label_dropout_prob} drops labels",
        )
    if network.noise_input.endswith("step_index") and stage.schedule.num_timesteps is None:
        refuse(
            "stage.network.noise_input",
            "'cosine_time' or 'noise_level', since config.stage.schedule.num_timesteps is None",
        )
    sizes = network.attention_resolutions
    check_feature_maps("stage.network.attention_resolutions", sizes, stage)


def _check_heads(stage: StageConfig) -> None:
    network = stage.network
    if (network.num_heads is None) == (network.num_head_channels is None):
        other = "config.stage.network.num_head_channels"
        given = f"is {network.num_head_channels}"
        expected = f"None, since {other} {given}" if network.num_heads else f"a number, or {other}"
        fail_at(stage, "stage.network.num_heads", expected)
    # The Efficient U-Net's levels have other sizes; all of them are checked.
    every = network.name == "efficient_unet"
    attending = {w for i, w in enumerate(network.widths) if every or stage.attends(i)}
    for width in sorted({*attending, network.widths[-1]}):  # the middle always attends
        for key in ("num_heads", "num_head_channels"):
            divisor = getattr(network, key)
            if divisor is not None and width % divisor:
                expected = f"a divisor of every level's channels; {width} is not divided"
                fail_at(stage, f"stage.network.{key}", expected)


def check_feature_maps(key: str, sizes: tuple[int, ...], stage: StageConfig) -> None:
    """Checks that a stage's network has blocks at these sizes. Raises UserError."""
    network = stage.network
    # The Efficient U-Net's first level works at half the image's size already.
    first = stage.resolution // network.patch_size // (1 + (network.name == "efficient_unet"))
    known = [first // 2**i for i in range(len(network.channel_mults))]
    if not set(sizes) <= set(known):
        fail(key, sizes, f"sizes of feature maps, which are {', '.join(map(str, known))}")


def _check_used(section: str, config: object, uses: Mapping[str, str], by: str) -> None:
    """Checks that optional keys have values exactly if key `by` has the value in `uses`."""
    chosen = getattr(config, by)
    for key, user in uses.items():
        value = getattr(config, key)
        reason = f"since config.{section}.{by} is {chosen!r}"
        if chosen == user and value is None:
            fail(f"{section}.{key}", None, f"a value, {reason}")
        if chosen != user and value is not None:
            fail(f"{section}.{key}", value, f"None, {reason}, not {user!r}")


def _check_pair(key: str, pair: tuple[float, ...] | None) -> None:
    if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
        fail(key, pair, "two values, the lower one first")


def _check_schedule(key: str, schedule: ScheduleConfig) -> None:
    refuse = partial(fail_at, schedule)
    uses = {"cosine_offset": "cosine", "linear_betas": "linear"}
    uses["reference_resolution"] = "shifted_cosine"
    _check_used(key, schedule, uses, "name")
    _check_pair(f"{key}.linear_betas", schedule.linear_betas)
    steps, betas = schedule.num_timesteps, schedule.linear_betas
    if steps is not None and betas is not None and betas[1] * 1000 / steps >= 1:
        refuse(
            f"{key}.num_timesteps",
            f"more than {1000 * betas[1]:g}: with fewer steps a beta of config.{key}.linear_betas ="
            f" {betas} would not be below 1",
        )
    if schedule.num_timesteps is None and schedule.noise_levels == "discrete":
        refuse(f"{key}.noise_levels", f"'continuous', since config.{key}.num_timesteps is None")


def _check_augment(stage: StageConfig) -> None:
    refuse = partial(fail_at, stage)
    augment, gaussian = stage.augment, stage.augment.name == "gaussian"
    uses = {key: "blur" for key in ("blur_kernel_size", "blur_sigmas", "blur_prob")}
    _check_used("stage.augment", augment, {"max_level": "gaussian", **uses}, "name")
    if augment.blur_border is not None and augment.name != "blur":
        refuse(
            "stage.augment.blur_border",
            f"None, since config.stage.augment.name is {augment.name!r}, not 'blur'",
        )
    half, size = (augment.blur_kernel_size or 0) // 2, stage.low_res_resolution or 0
    if augment.blur_border == "reflect" and half >= size:
        refuse(
            "stage.augment.blur_kernel_size",
            f"less than {2 * size}: an image of {size} px cannot be mirrored so far",
        )
    _check_pair("stage.augment.blur_sigmas", augment.blur_sigmas)
    if augment.blur_kernel_size is not None and augment.blur_kernel_size % 2 == 0:
        refuse("stage.augment.blur_kernel_size", "an odd number")
    since = f"since config.stage.augment.name is {augment.name!r}"
    if gaussian and stage.low_res_schedule is None:
        refuse("stage.low_res_schedule", f"the low-res stage's own config.stage.schedule, {since}")
    if not gaussian and stage.low_res_schedule is not None:
        fail("stage.low_res_schedule", "(a section)", f"None, {since}, not 'gaussian'")
    if stage.low_res_schedule is not None:
        _check_schedule("stage.low_res_schedule", stage.low_res_schedule)
        steps = stage.low_res_schedule.discrete_timesteps
        if steps is not None and augment.max_level * steps < 1:
            refuse(
                "stage.augment.max_level",
                f"at least one of the {steps} steps of config.stage.low_res_schedule",
            )


def _check_diffusion(stage: StageConfig) -> None:
    refuse = partial(fail_at, stage)
    diffusion, schedule = stage.diffusion, stage.schedule
    _check_used("stage.diffusion", diffusion, {"vlb_weight": "hybrid"}, "loss")
    if diffusion.loss != "simple" and schedule.noise_levels != "discrete":
        refuse(
            "stage.diffusion.loss",
            "'simple', since the bound is over the steps of a process whose"
            " config.stage.schedule.noise_levels are 'discrete'",
        )
    if diffusion.variance == "fixed" and diffusion.loss == "hybrid":
        refuse(
            "stage.diffusion.variance",
            "'learned', since config.stage.diffusion.loss is 'hybrid', whose bound trains the"
            " variance alone",
        )
    if diffusion.label_dropout_prob and not stage.num_classes:
        refuse("stage.diffusion.label_dropout_prob", "0.0, since config.stage.num_classes is 0")
    if diffusion.weighting == "truncated_snr" and diffusion.parameterization == "eps":
        refuse(
            "stage.diffusion.weighting",
            "another weighting, or config.stage.diffusion.parameterization = 'v' or 'x0', since"
            " for an error of eps it would be 1 / SNR, which has no bound",
        )
    if diffusion.variance == "learned" and diffusion.loss == "simple":
        refuse(
            "stage.diffusion.loss",
            "'hybrid' or 'vlb', since config.stage.diffusion.variance is 'learned'",
        )
    if diffusion.weighting != "none" and diffusion.loss != "simple":
        refuse(
            "stage.diffusion.weighting",
            f"'none', since config.stage.diffusion.loss is {diffusion.loss!r}",
        )


def ddim_stride(num_timesteps: int, num_steps: int) -> int | None:
    """The n of which every n-th of T steps, from the first, are `num_steps`; None if none is."""
    n = -(-num_timesteps // num_steps)
    return n if -(-num_timesteps // n) == num_steps else None


def check_sampler(key: str, sampler: SamplerConfig, stage: StageConfig) -> None:
    """Checks that `config.<key>` can sample a stage. Raises UserError."""
    refuse = partial(fail_at, sampler)
    guided = sampler.guidance_scale != 1.0
    if guided and not (stage.num_classes and stage.diffusion.label_dropout_prob > 0):
        refuse(
            f"{key}.guidance_scale",
            f"1.0 (no guidance): stage {stage.name!r} was configured without classes or with"
            " config.stage.diffusion.label_dropout_prob = 0",
        )
    if sampler.variance == "learned" and sampler.name != "ancestral":
        refuse(
            f"{key}.variance",
            f"None, or config.{key}.name = 'ancestral': {sampler.name!r} draws no noise of a"
            " learned variance",
        )
    _check_used(key, sampler, {"variance": "ancestral", "eta": "ddim"}, "name")
    if sampler.churn is not None and (sampler.name != "edm" or len(sampler.churn) != 4):
        four = "four values (S_churn, S_min, S_max, S_noise)"
        expected = four if sampler.name == "edm" else f"None, since config.{key}.name is"
        refuse(f"{key}.churn", expected + ("" if sampler.name == "edm" else f" {sampler.name!r}"))
    if sampler.churn is not None and sampler.churn[1] > sampler.churn[2]:
        refuse(f"{key}.churn", "S_min, the second value, at most S_max, the third")
    _check_used(key, sampler, {"variance_interpolation": "interpolated"}, "variance")
    _check_used(key, sampler, {"threshold_percentile": "dynamic"}, "threshold")
    if sampler.variance == "learned" and stage.diffusion.variance != "learned":
        refuse(
            f"{key}.variance",
            f"'small', 'large' or 'interpolated': stage {stage.name!r} was configured with"
            " config.stage.diffusion.variance = 'fixed'",
        )
    _check_pair(f"{key}.guidance_interval", sampler.guidance_interval)
    steps = stage.schedule.discrete_timesteps
    if steps is not None and sampler.num_steps > steps:
        refuse(
            f"{key}.num_steps",
            f"at most {steps}, the config.stage.schedule.num_timesteps of stage {stage.name!r},"
            " whose noise levels are discrete",
        )
    if steps is None and sampler.grid in ("respaced", "ddim_respaced"):
        refuse(
            f"{key}.grid",
            f"'uniform', 'quadratic', 'logsnr' or 'karras': the noise levels of stage"
            f" {stage.name!r} are not discrete",
        )
    if sampler.grid == "ddim_respaced" and ddim_stride(steps, sampler.num_steps) is None:
        refuse(
            f"{key}.num_steps",
            f"as many as every n-th of {steps} steps are, for some n, since config.{key}.grid is"
            " 'ddim_respaced'",
        )


def rounded_level(level: float, stage: StageConfig) -> float:
    """The level that a stage with discrete steps makes of it."""
    steps = stage.low_res_schedule.discrete_timesteps
    return level if steps is None else round(level * steps) / steps


def check_level(key: str, level: float, stage: StageConfig) -> None:
    """Checks a level of conditioning augmentation. Raises UserError."""
    if not stage.has_aug_level:
        if level != 0.0:
            fail(
                key,
                level,
                f"0.0: stage {stage.name!r} was configured with config.stage.augment.name ="
                f" {stage.augment.name!r} and has no level to choose",
            )
    elif rounded_level(level, stage) > stage.augment.max_level + 1e-6:
        fail(
            key,
            level,
            f"at most {stage.augment.max_level}, the config.stage.augment.max_level up to which"
            f" stage {stage.name!r} was trained",
        )
