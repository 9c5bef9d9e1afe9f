"""Bad values of a config: one line that names the key, its value and what is allowed."""

import math

import pytest

from cascaded_diffusion.config.run_checks import (
    cascade_config_from,
    check_chain,
    check_devices,
    evaluation_mesh,
    run_config_from,
)
from cascaded_diffusion.errors import UserError
from tests.tiny import config_values, tiny_base, tiny_sr, with_overrides

_DISCRETE = {"stage.schedule.num_timesteps": 20, "stage.schedule.noise_levels": "discrete"}
_ANCESTRAL = {"stage.sampler.name": "ancestral"}
_BLUR = {
    "stage.augment.name": "blur",
    "stage.augment.max_level": None,
    "stage.augment.blur_kernel_size": 3,
    "stage.augment.blur_sigmas": (0.4, 0.6),
    "stage.augment.blur_prob": 0.5,
    "stage.low_res_schedule": None,
    "eval.aug_level": 0.0,
}
BAD_RUNS = [
    (
        {"train.learning_rat": 1e-3},
        "config.train.learning_rat is not a config key; did you mean 'learning_rate'?",
    ),
    (
        {"stage.network.chanels": 3},
        "config.stage.network.chanels is not a config key; did you mean 'channels'?",
    ),
    ({"data.zzzz": 3}, "config.data.zzzz is not a config key; known keys: name, path"),
    ({"train": 3}, "config.train = 3: expected a section"),
    ({"train.batch_size": "64"}, "config.train.batch_size = '64': expected an integer"),
    ({"train.batch_size": 64.0}, "config.train.batch_size = 64.0: expected an integer"),
    ({"train.batch_size": True}, "config.train.batch_size = True: expected an integer"),
    ({"train.batch_size": 0}, "config.train.batch_size = 0: expected a value from 1"),
    ({"train.learning_rate": "fast"}, "config.train.learning_rate = 'fast': expected a number"),
    (
        {"train.learning_rate": math.nan},
        "config.train.learning_rate = nan: expected a finite number",
    ),
    (
        {"train.learning_rate": math.inf},
        "config.train.learning_rate = inf: expected a finite number",
    ),
    (
        {"train.learning_rate": -1e-4},
        "config.train.learning_rate = -0.0001: expected a value above 0",
    ),
    ({"train.learning_rate": 0}, "config.train.learning_rate = 0.0: expected a value above 0"),
    (
        {"train.lr_decay": "cosin"},
        "config.train.lr_decay = 'cosin': expected one of 'none', 'cosine' (did you mean",
    ),
    (
        {"train.warmup_steps": 31},
        "config.train.warmup_steps = 31: expected less than config.train.train_steps, which is 30",
    ),
    (
        {"train.ema_decays": (0.9, 1.0)},
        "config.train.ema_decays[1] = 1.0: expected a value from 0.0 to 0.999999",
    ),
    ({"train.ema_decays": ()}, "config.train.ema_decays = (): expected at least one decay"),
    (
        {"eval.ema_decays": (0.9,)},
        "config.eval.ema_decays = (0.9,): expected at least one, each of config.train.ema_decays,",
    ),
    ({"eval.ema_decays": ()}, "config.eval.ema_decays = (): expected at least one, each of"),
    ({"train.grad_clip_norm": 0.0}, "config.train.grad_clip_norm = 0.0: expected a value above 0"),
    (
        {"train.seed": 2**32},
        "config.train.seed = 4294967296: expected a value from 0 to 4294967295",
    ),
    ({"train.seed": 2**64}, "config.train.seed = 18446744073709551616: expected a value from 0"),
    ({"train.learning_rate": 10**400}, "config.train.learning_rate = 10000"),
    ({"train.learning_rate": 1e300}, "config.train.learning_rate = 1e+300: expected a value above"),
    ({"stage.sampler.num_steps": 10**30}, "config.stage.sampler.num_steps = 1000000000000000"),
    ({"stage.sampler.guidance_scale": 1e300}, "config.stage.sampler.guidance_scale = 1e+300: exp"),
    ({"stage.network.channels": 2**31}, "config.stage.network.channels = 2147483648: expected a"),
    ({"stage.network.channel_mults": (1, 2**40)}, "config.stage.network.channel_mults[1] = 10995"),
    ({"stage.resolution": 2**20}, "config.stage.resolution = 1048576: expected a value from 1 to"),
    ({"train.ema_decays": (0.9,) * 17}, "config.train.ema_decays = (0.9, 0.9, 0.9, 0.9, 0.9, 0.9"),
    (
        {"stage.network.channels": 65_536, "stage.network.channel_mults": (1, 1000)},
        "config.stage.resolution = 16, config.stage.num_classes = 10, config.stage.network.channels"
        " = 65536, channel_mults = (1, 1000), num_res_blocks = (1, 1), attention_resolutions = ",
    ),
    (
        {"stage.resolution": 16384, "data.resolution": 16384, "stage.network.channels": 4096},
        "config.stage.resolution = 16384, ",
    ),
    ({"train.batch_size": 2**20, "data.resolution": 16384}, "config.train.batch_size = 1048576: "),
    ({"eval.batch_size": 2**21}, "config.eval.batch_size = 2097152: expected a value from 1 to"),
    ({"data.train_split": "a\0b"}, "config.data.train_split = 'a\\x00b': expected text of at most"),
    ({"data.train_split": "\ud800"}, "config.data.train_split = '\\ud800': expected text that"),
    ({"data.train_split": "x" * 5000}, "config.data.train_split = 'xxxx"),
    ({"data.path": 3}, "config.data.path = 3: expected a string or None"),
    ({"train.seed": -1}, "config.train.seed = -1: expected a value from 0"),
    ({"stage.kind": "sr"}, "config.stage.kind = 'sr': expected one of 'base', 'super_resolution'"),
    ({"stage.name": "a/b"}, "config.stage.name = 'a/b': expected letters, digits and underscores"),
    ({"stage.resolution": 15}, "config.stage.resolution = 15: expected a multiple of 4"),
    ({"stage.network.patch_size": 3}, "config.stage.resolution = 16: expected a multiple of 6"),
    (
        {
            "stage.network.channel_mults": (1, 2, 2, 2, 2),
            "stage.network.num_res_blocks": (1,) * 5,
        },
        "config.stage.resolution = 16: expected a multiple of 32",
    ),
    (
        {"stage.network.channel_mults": ()},
        "config.stage.network.channel_mults = (): expected at least one level",
    ),
    (
        {"stage.network.channel_mults": (1, 0)},
        "config.stage.network.channel_mults[1] = 0: expected a value from 0.125",
    ),
    (
        {"stage.network.channel_mults": (1, "2")},
        "config.stage.network.channel_mults[1] = '2': expected a number",
    ),
    (
        {"stage.network.channel_mults": 2},
        "config.stage.network.channel_mults = 2: expected a tuple of a number",
    ),
    ({"stage.network.channels": 15}, "config.stage.network.channels = 15: expected an even number"),
    ({"stage.network.num_heads": 5}, "config.stage.network.num_heads = 5: expected a divisor"),
    (
        {"stage.network.attention_resolutions": (16,)},
        "config.stage.network.attention_resolutions = (16,): expected sizes of feature maps",
    ),
    (
        {"stage.network.dtype": "float16"},
        "config.stage.network.dtype = 'float16': expected one of 'float32', 'bfloat16'",
    ),
    (
        {"stage.network.dropout_rate": 1.0},
        "config.stage.network.dropout_rate = 1.0: expected a value from 0.0 to 0.99",
    ),
    (
        {"stage.low_res_resolution": 8},
        "config.stage.low_res_resolution = 8: expected None, since config.stage.kind is 'base'",
    ),
    ({"stage.augment.name": "gaussian"}, "config.stage.augment.name = 'gaussian': expected 'none'"),
    (
        {"stage.diffusion.label_dropout_prob": 0.0},
        "config.stage.sampler.guidance_scale = 1.5: expected 1.0 (no guidance)",
    ),
    (
        {"stage.schedule.num_timesteps": 0},
        "config.stage.schedule.num_timesteps = 0: expected a value from 2",
    ),
    (
        {"stage.schedule.num_timesteps": 1.5},
        "config.stage.schedule.num_timesteps = 1.5: expected an integer or None",
    ),
    (
        {"stage.schedule.noise_levels": "discrete"},
        "config.stage.schedule.noise_levels = 'discrete': expected 'continuous', since",
    ),
    (
        {"stage.schedule.name": "linear"},
        "config.stage.schedule.cosine_offset = 0.008: expected None, since"
        " config.stage.schedule.name is 'linear', not 'cosine'",
    ),
    (
        {"stage.schedule.cosine_offset": None},
        "config.stage.schedule.cosine_offset = None: expected a value, since",
    ),
    (
        {
            "stage.schedule.name": "linear",
            "stage.schedule.cosine_offset": None,
            "stage.schedule.linear_betas": (0.02, 0.01),
        },
        "config.stage.schedule.linear_betas = (0.02, 0.01): expected two values, the lower one",
    ),
    (
        {"stage.schedule": None},
        "config.stage.schedule = None: expected a section with the keys of ScheduleConfig",
    ),
    (
        {"stage.network.scale_skips": 1},
        "config.stage.network.scale_skips = 1: expected True or False",
    ),
    (
        {"stage.network.num_res_blocks": (1, 1, 1)},
        "config.stage.network.num_res_blocks = (1, 1, 1): expected 2 values, one per level",
    ),
    (
        {"stage.network.name": "efficient_unet"},
        "config.stage.network.patch_size = 2: expected 1, since config.stage.network.name is",
    ),
    (
        {"stage.augment.name": "blur"},
        "config.stage.augment.name = 'blur': expected 'none': a stage of config.stage.kind 'base'"
        " has no low-res input to damage",
    ),
    (
        {"stage.diffusion.variance": "learned"},
        "config.stage.diffusion.loss = 'simple': expected 'hybrid' or 'vlb', since",
    ),
    (
        {"stage.diffusion.loss": "vlb"},
        "config.stage.diffusion.loss = 'vlb': expected 'simple', since the bound is over the steps",
    ),
    (
        {"stage.diffusion.loss": "hybrid"},
        "config.stage.diffusion.vlb_weight = None: expected a value, since",
    ),
    (
        {**_DISCRETE, "stage.diffusion.loss": "hybrid", "stage.diffusion.vlb_weight": 0.001},
        "config.stage.diffusion.variance = 'fixed': expected 'learned', since",
    ),
    (
        {"stage.num_classes": 0, "stage.sampler.guidance_scale": 1.0},
        "config.stage.diffusion.label_dropout_prob = 0.15: expected 0.0, since",
    ),
    (
        {
            "stage.diffusion.parameterization": "eps",
            "stage.diffusion.weighting": "truncated_snr",
        },
        "config.stage.diffusion.weighting = 'truncated_snr': expected another weighting, or",
    ),
    (
        {
            "stage.schedule.name": "linear",
            "stage.schedule.cosine_offset": None,
            "stage.schedule.linear_betas": (1e-4, 0.02),
            "stage.schedule.num_timesteps": 20,
        },
        "config.stage.schedule.num_timesteps = 20: expected more than 20: with fewer steps",
    ),
    (
        {
            **_DISCRETE,
            "stage.diffusion.loss": "vlb",
            "stage.diffusion.weighting": "min_snr",
        },
        "config.stage.diffusion.weighting = 'min_snr': expected 'none', since",
    ),
    (
        {"stage.sampler.variance": "learned"},
        "config.stage.sampler.variance = 'learned': expected None, or config.stage.sampler.name ="
        " 'ancestral': 'dpmpp_2m' draws no noise of a learned variance",
    ),
    (
        {**_ANCESTRAL, "stage.sampler.variance": "learned"},
        "config.stage.sampler.variance = 'learned': expected 'small', 'large' or 'interpolated':",
    ),
    (
        {**_ANCESTRAL, "stage.sampler.variance": None},
        "config.stage.sampler.variance = None: expected a value, since",
    ),
    (
        {**_ANCESTRAL, "stage.sampler.variance": "interpolated"},
        "config.stage.sampler.variance_interpolation = None: expected a value, since",
    ),
    ({"stage.sampler.name": "ddim"}, "config.stage.sampler.eta = None: expected a value, since"),
    (
        {"stage.network.channel_mults": (1, 1.03)},
        "config.stage.network.channel_mults = (1, 1.03): expected multiples of config.stage.",
    ),
    (
        {"stage.network.num_head_channels": 8},
        "config.stage.network.num_heads = 4: expected None, since config.stage.network.num_head_",
    ),
    (
        {"stage.network.num_heads": None},
        "config.stage.network.num_heads = None: expected a number, or config.stage.network.num_",
    ),
    (
        {"stage.network.num_heads": None, "stage.network.num_head_channels": 5},
        "config.stage.network.num_head_channels = 5: expected a divisor",
    ),
    (
        {"stage.network.null_label": False},
        "config.stage.network.null_label = False: expected True or None, since config.stage.",
    ),
    (
        {"stage.network.noise_input": "step_index"},
        "config.stage.network.noise_input = 'step_index': expected 'cosine_time' or 'noise_level'",
    ),
    (
        {"stage.sampler.grid": "respaced"},
        "config.stage.sampler.grid = 'respaced': expected 'uniform', 'quadratic', 'logsnr' or 'k",
    ),
    (
        {"stage.sampler.churn": (1.0, 0.0, 1.0, 1.0)},
        "config.stage.sampler.churn = (1.0, 0.0, 1.0, 1.0): expected None, since",
    ),
    (
        {"stage.sampler.name": "edm", "stage.sampler.churn": (1.0,)},
        "config.stage.sampler.churn = (1.0,): expected four values",
    ),
    (
        {"stage.augment.blur_border": "reflect"},
        "config.stage.augment.blur_border = 'reflect': expected None, since",
    ),
    (
        {"stage.sampler.name": "heun", "stage.sampler.eta": 0.0},
        "config.stage.sampler.eta = 0.0: expected None, since config.stage.sampler.name is 'heun'",
    ),
    (
        {"stage.sampler.threshold": "dynamic"},
        "config.stage.sampler.threshold_percentile = None: expected a value, since",
    ),
    (
        {"stage.sampler.guidance_interval": (0.5,)},
        "config.stage.sampler.guidance_interval = (0.5,): expected two values, the lower one first",
    ),
    (
        {**_DISCRETE, "stage.sampler.num_steps": 21},
        "config.stage.sampler.num_steps = 21: expected at most 20, the"
        " config.stage.schedule.num_timesteps of stage 'base16'",
    ),
    (
        {"data.resolution": 8},
        "config.stage.resolution = 16: expected at most config.data.resolution, which is 8",
    ),
    ({"data.read_threads": 1.0}, "config.data.read_threads = 1.0: expected an integer"),
    (
        {"eval.num_samples": 41},
        "config.eval.num_samples = 41: expected a multiple of config.stage.num_classes",
    ),
    ({"eval.aug_level": 1.5}, "config.eval.aug_level = 1.5: expected a value from 0.0 to 1.0"),
    ({"eval.aug_level": 0.1}, "config.eval.aug_level = 0.1: expected 0.0: stage"),
    ({"eval.features": "vgg"}, "config.eval.features = 'vgg': expected one of 'classifier'"),
    ({"eval.features": "inception"}, "config.eval.resize = None: expected 'legacy' (as"),
    ({"eval.resize": "clean"}, "config.eval.resize = 'clean': expected None, since"),
    (
        {"eval.final_num_samples": 41},
        "config.eval.final_num_samples = 41: expected a multiple of config.stage.num_classes",
    ),
    ({"eval.sampler": "euler"}, "config.eval.sampler = 'euler': expected one of 'ancestral'"),
    ({"eval.num_steps": 0}, "config.eval.num_steps = 0: expected a value from 1"),
    ({"mesh.data": 3}, "config.train.batch_size = 16: expected a multiple of 3"),
    ({"mesh.data": 0}, "config.mesh.data = 0: expected -1 (all devices) or a value of at least 1"),
    ({"mesh.fsdp": 3}, "config.train.batch_size = 16: expected a multiple of 3"),
    ({"mesh.fsdp": 0}, "config.mesh.fsdp = 0: expected a value from 1"),
    (
        {"checkpoint.save_every_steps": -1},
        "config.checkpoint.save_every_steps = -1: expected a value from 1",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_RUNS, ids=lambda x: str(x)[:60])
def test_bad_run_configs(overrides, message):
    with pytest.raises(UserError) as error:
        run_config_from(with_overrides(config_values("mnist_base16"), overrides))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


BAD_SR_RUNS = [
    (
        {"stage.low_res_schedule": None},
        "config.stage.low_res_schedule = None: expected the low-res stage's own"
        " config.stage.schedule, since config.stage.augment.name is 'gaussian'",
    ),
    (
        {"stage.augment.name": "none", "stage.augment.max_level": None, "eval.aug_level": 0.0},
        "config.stage.low_res_schedule = '(a section)': expected None, since",
    ),
    (
        {"stage.augment.max_level": None},
        "config.stage.augment.max_level = None: expected a value, since",
    ),
    (
        {"stage.augment.max_level": 0.05},
        "config.eval.aug_level = 0.1: expected at most 0.05, the config.stage.augment.max_level",
    ),
    (
        {"stage.augment.blur_prob": 0.5},
        "config.stage.augment.blur_prob = 0.5: expected None, since config.stage.augment.name is",
    ),
    (
        {**_BLUR, "stage.augment.blur_kernel_size": 4},
        "config.stage.augment.blur_kernel_size = 4: expected an odd number",
    ),
    (
        {**_BLUR, "stage.augment.blur_sigmas": (0.6, 0.4)},
        "config.stage.augment.blur_sigmas = (0.6, 0.4): expected two values, the lower one first",
    ),
    (
        {**_BLUR, "eval.aug_level": 0.1},
        "config.eval.aug_level = 0.1: expected 0.0: stage 'sr32' was configured with"
        " config.stage.augment.name = 'blur' and has no level to choose",
    ),
    ({"stage.low_res_resolution": 15}, "config.stage.low_res_resolution = 15: expected a size"),
    ({"stage.low_res_resolution": 24}, "config.stage.low_res_resolution = 24: expected a size"),
    (
        {
            "stage.low_res_schedule.num_timesteps": 10,
            "stage.low_res_schedule.noise_levels": "discrete",
            "stage.augment.max_level": 0.05,
        },
        "config.stage.augment.max_level = 0.05: expected at least one of the 10 steps",
    ),
    (
        {
            "stage.low_res_schedule.num_timesteps": 30,
            "stage.low_res_schedule.noise_levels": "discrete",
            "stage.augment.max_level": 0.25,
            "eval.aug_level": 0.25,
        },
        "config.eval.aug_level = 0.25: expected at most 0.25, the",  # step 8 of 30 is 0.267
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_SR_RUNS, ids=lambda x: str(x)[:60])
def test_bad_super_resolution_configs(overrides, message):
    with pytest.raises(UserError) as error:
        run_config_from(with_overrides(config_values("mnist_sr32"), overrides))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("value", [None, 32, 64])
def test_super_resolution_needs_a_smaller_low_res(value):
    values = with_overrides(config_values("mnist_sr32"), {"stage.low_res_resolution": value})
    with pytest.raises(
        UserError, match=f"config.stage.low_res_resolution = {value}: expected the size"
    ):
        run_config_from(values)


_DDIM = {
    "name": "ddim",
    "num_steps": 8,
    "grid": "uniform",
    "eta": 0.0,
    "guidance_scale": 1.0,
    "guidance_interval": (0.0, 1.0),
    "threshold": "static",
}
BAD_CASCADES = [
    ({"cascade.stages": ()}, {}, "config.cascade.stages = (): expected the names"),
    ({"cascade.stages": ("../base16", "sr32")}, {}, "config.cascade.stages = "),
    (
        {"cascade.aug_levels": (0.1, 0.1)},
        {},
        "config.cascade.aug_levels = (0.1, 0.1): expected 1 values",
    ),
    (
        {"cascade.aug_levels": (1.2,)},
        {},
        "config.cascade.aug_levels[0] = 1.2: expected a value from 0.0 to 1.0",
    ),
    ({"cascade.configs": ("a.py",)}, {}, "config.cascade.configs = ('a.py',): expected 2 values"),
    (
        {"cascade.samplers": ("ddim", "dpm")},
        {},
        "config.cascade.samplers[0] = 'ddim': expected a section with the keys of SamplerConfig",
    ),
    (
        {"cascade.samplers": (_DDIM, {**_DDIM, "name": "dpm"})},
        {},
        "config.cascade.samplers[1].name = 'dpm': expected one of",
    ),
    ({"cascade.samplers": (_DDIM,)}, {}, "config.cascade.samplers = "),
    (
        {"cascade.truncated": True},
        {"stage.low_res_schedule.cosine_offset": 0.1},
        "config.cascade.truncated = True: expected False: the config.stage.schedule of 'base16' and"
        " the config.stage.low_res_schedule of 'sr32' differ",
    ),
    (
        {},
        {"stage.augment.max_level": 0.05, "eval.aug_level": 0.0},
        "config.cascade.aug_levels[0] = 0.1: expected at most 0.05, the",
    ),
    (
        {"cascade.truncated": True, "cascade.aug_levels": (0.0,)},
        _BLUR,
        "config.cascade.truncated = True: expected False: no stage was trained with",
    ),
    (
        {"cascade.samplers": (_DDIM, {**_DDIM, "num_steps": 21})},
        _DISCRETE,
        "config.cascade.samplers[1].num_steps = 21: expected at most 20",
    ),
    (
        {"cascade.aug_levels": (1.0,), "cascade.truncated": True},
        {},
        "config.cascade.aug_levels[0] = 1.0: expected a level below 1",
    ),
    (
        {},
        {"stage.low_res_resolution": 8},
        "config.cascade.stages = ('base16', 'sr32'): expected sizes that chain: 'base16' makes",
    ),
    (
        {},
        {"stage.num_classes": 8},
        "config.cascade.stages = ('base16', 'sr32'): expected stages with the same num_classes",
    ),
    (
        {},
        {
            "stage.augment.name": "none",
            "stage.augment.max_level": None,
            "stage.low_res_schedule": None,
            "eval.aug_level": 0.0,
        },
        "config.cascade.aug_levels[0] = 0.1: expected 0.0",
    ),
    (
        {"cascade.samplers": (_DDIM, {**_DDIM, "guidance_scale": 1.5})},
        {"stage.diffusion.label_dropout_prob": 0.0},
        "config.cascade.samplers[1].guidance_scale = 1.5: expected 1.0",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "sr_overrides", "message"), BAD_CASCADES, ids=lambda x: str(x)[:60]
)
def test_bad_cascades(overrides, sr_overrides, message):
    base = run_config_from(config_values("mnist_base16")).stage
    sr = run_config_from(with_overrides(config_values("mnist_sr32"), sr_overrides)).stage
    with pytest.raises(UserError) as error:
        config = cascade_config_from(with_overrides(config_values("mnist_cascade32"), overrides))
        check_chain(config.cascade, [base, sr])
    assert str(error.value).startswith(message)


def test_a_cascade_begins_with_a_base_model():
    config = cascade_config_from(config_values("mnist_cascade32"))
    sr = tiny_sr().stage
    with pytest.raises(UserError, match="a base model first; 'sr32' is not one"):
        check_chain(config.cascade, [sr, sr])


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (
            {"mesh__data": 2},
            8,
            "config.mesh.data = 2: expected data x fsdp 1 x tensor 1 to be the 8 devices found",
        ),
        (
            {"mesh__data": 4, "mesh__fsdp": 2, "mesh__tensor": 2},
            8,
            "config.mesh.data = 4: expected data x fsdp 2 x tensor 2 to be the 8 devices found",
        ),
        (
            {"mesh__tensor": 3},
            8,
            "config.mesh.tensor = 3: expected a divisor of the 8 devices found",
        ),
        (
            {"mesh__fsdp": 4, "mesh__tensor": 4},
            8,
            "config.mesh.fsdp = 4: expected a divisor, times config.mesh.tensor, of the 8 devices",
        ),
        (
            {"train__batch_size": 16, "train__accumulation_steps": 4},
            8,
            "config.train.batch_size = 16: expected a multiple of 32, the devices of config.mesh"
            " that a batch is split over (data 8 x fsdp 1), times config.train.accumulation_steps"
            " = 4",
        ),
        ({"mesh__fsdp": 8}, 4, "config.mesh.fsdp = 8: expected a divisor of the 4 devices found"),
        (
            {"train__batch_size": 12},
            8,
            "config.train.batch_size = 12: expected a multiple of 8, the devices",
        ),
        (
            {"train__batch_size": 4},
            8,
            "config.train.batch_size = 4: expected a multiple of 8, the devices of config.mesh that"
            " a batch is split over (data 8 x fsdp 1); with fewer examples than devices, raise"
            " config.mesh.tensor",
        ),
    ],
)
def test_mesh_and_batches_are_checked_against_the_devices(mesh, devices, message):
    with pytest.raises(UserError) as error:
        check_devices(tiny_base(**mesh), devices)
    assert str(error.value).startswith(message)


def test_a_run_of_any_mesh_is_evaluated_on_all_devices():
    config = tiny_base(mesh__fsdp=8, eval__batch_size=40, train__batch_size=16)
    mesh = evaluation_mesh(config, 4)
    assert (mesh.data, mesh.fsdp, mesh.tensor_size) == (-1, 1, 1)
    with pytest.raises(UserError, match="config.eval.batch_size = 40: expected a multiple of 16"):
        evaluation_mesh(config, 16)
    cascade = cascade_config_from(config_values("mnist_cascade32"))
    assert evaluation_mesh(cascade, 1) == cascade.mesh


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train__remat": "all"}, "config.train.remat = 'all': expected"),
        (
            {"train__remat": "resolutions"},
            "config.train.remat_resolutions = None: expected sizes, since config.train.remat is",
        ),
        (
            {"train__remat": "everything", "train__remat_resolutions": (8,)},
            "config.train.remat_resolutions = (8,): expected None, since config.train.remat is",
        ),
        (
            {"train__remat": "resolutions", "train__remat_resolutions": (8, 5)},
            "config.train.remat_resolutions = (8, 5): expected sizes of feature maps, which are 8,",
        ),
        ({"train__accumulation_steps": 0}, "config.train.accumulation_steps = 0: expected"),
        ({"mesh__tensor": 0}, "config.mesh.tensor = 0: expected"),
    ],
)
def test_ways_of_computing_that_are_none_are_refused(overrides, message):
    with pytest.raises(UserError) as error:
        tiny_base(**overrides)
    assert str(error.value).startswith(message)


def test_a_warm_up_leaves_steps_to_train():
    values = with_overrides(config_values("mnist_base16"), {"train.train_steps": 3})
    with pytest.raises(UserError, match="config.train.warmup_steps = 3: expected less than"):
        run_config_from(values)
