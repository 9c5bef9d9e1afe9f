"""What a folder of diffusers says of its `UNet2DModel` and its scheduler, as keys of our config."""

import pathlib
from collections.abc import Mapping

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record, read_json
from cascaded_diffusion.interchange.weights_files import TIMESTEPS, told_timesteps, unet_folder

# What our U-Net cannot be told, and the only values that it has.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "_class_name": ("UNet2DModel",),
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional", None),
    "mid_block_scale_factor": (1, None),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", None),
    "upsample_type": ("conv", None),
    "act_fn": ("silu", "swish", None),
    "norm_num_groups": (32, None),
    "attn_norm_num_groups": (None,),
    "add_attention": (True, None),
    "class_embed_type": (None,),
    # With "scale_shift" the attention in the middle has no norm there.
    "resnet_time_scale_shift": ("default", None),
    "num_train_timesteps": (None,),
}
# What goes together in `config.stage.network.ddpm_details`, without it and with it.
DETAILS: Mapping[str, tuple[float, float]] = {
    "downsample_padding": (1, 0),
    "freq_shift": (0, 1),
    "norm_eps": (1e-5, 1e-6),
}
# Schedulers of a process that its betas describe; what they do differs in sampling alone.
_OF_BETAS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete"),
        *("EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"),
    )
)
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}


def config_changes(path: pathlib.Path, flag: str) -> tuple[dict[str, object], bool]:
    """The config keys that a folder decides, and whether its embedding has cosines first.

    A folder without a scheduler leaves `stage.schedule` as it is.

    Raises UserError, which names the setting, if our U-Net cannot be that network.
    """
    folder = unet_folder(path, flag)
    file = folder / "config.json"
    config = read_json(file, remedy="download it again")
    if not isinstance(config, dict):
        raise UserError(f"{file}: is no object; expected the config of a UNet2DModel")
    told = told_timesteps(folder)
    if told not in (None, TIMESTEPS["step_index"]):
        raise UserError(
            f"{folder}: its network was exported as one that is told {told}; expected one that is"
            f" told {TIMESTEPS['step_index']}, which is what diffusers' schedulers tell"
        )
    for key, known in _FIXED.items():
        if (value := config.get(key)) not in known:
            raise UserError(f"{file}: {key} = {value!r}: expected {known[0]!r}")
    details = _has_ddpm_details(config, file)
    try:
        changes = {**_network(config, file), "stage.network.ddpm_details": details}
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError) as e:
        reason = f"{type(e).__name__}: {e}"[:100]
        raise UserError(f"{file}: not the config of a UNet2DModel ({reason})") from e
    for scheduler in (folder, folder.parent / "scheduler"):
        file = scheduler / "scheduler_config.json"
        if not file.exists():
            continue
        try:
            changes |= _schedule(file)
        except (KeyError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {e}"[:100]
            raise UserError(f"{file}: not the config of a scheduler ({reason})") from e
        break
    return changes, config.get("flip_sin_to_cos", True) is not False


def _has_ddpm_details(config: Record, file: pathlib.Path) -> bool:
    given = {k: plain if config.get(k) is None else config[k] for k, (plain, _) in DETAILS.items()}
    for ddpm in (False, True):
        if all(given[key] == values[ddpm] for key, values in DETAILS.items()):
            return ddpm
    together = [", ".join(f"{k} = {v[ddpm]}" for k, v in DETAILS.items()) for ddpm in (0, 1)]
    found = ", ".join(f"{key} = {value!r}" for key, value in given.items())
    raise UserError(f"{file}: {found}: expected {together[0]}, or as DDPM has it {together[1]}")


def _network(config: Record, file: pathlib.Path) -> dict[str, object]:
    size, widths = config["sample_size"], config["block_out_channels"]
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise UserError(f"{file}: sample_size = {size}: expected a square")
        size = size[0]
    attends = ["Attn" in name for name in config["down_block_types"]]
    up = ["Attn" in name for name in config["up_block_types"]][::-1]
    names = [{*config[f"{way}_block_types"]} for way in ("down", "up")]
    known = [{f"{kind}{way}Block2D" for kind in ("", "Attn")} for way in ("Down", "Up")]
    fits = all(found <= all_ for found, all_ in zip(names, known, strict=True))
    if attends != up or not fits or len(attends) != len(widths):
        raise UserError(
            f"{file}: block types {config['down_block_types']} and {config['up_block_types']}:"
            " expected DownBlock2D and AttnDownBlock2D, and the same on the way up"
        )
    channels, learned = config["in_channels"], config["out_channels"] == 2 * config["in_channels"]
    if config["out_channels"] not in (channels, 2 * channels):
        expected = f"{channels} or {2 * channels}"
        raise UserError(f"{file}: out_channels = {config['out_channels']}: expected {expected}")
    head = config.get("attention_head_dim", 8)
    mults = [width / widths[0] for width in widths]
    return {
        "stage.kind": "base",
        "stage.resolution": size,
        "stage.low_res_resolution": None,
        "stage.channels": channels,
        "stage.num_classes": config.get("num_class_embeds") or 0,
        "stage.network.channels": widths[0],
        "stage.network.channel_mults": [int(m) if m.is_integer() else m for m in mults],
        "stage.network.num_res_blocks": [config["layers_per_block"]] * len(widths),
        "stage.network.attention_resolutions": [
            size // 2**level for level, has in enumerate(attends) if has
        ],
        "stage.network.num_heads": 1 if head is None else None,
        "stage.network.num_head_channels": head,
        "stage.network.dropout_rate": float(config.get("dropout") or 0.0),
        "stage.network.patch_size": 1,
        "stage.network.resample": "conv",
        "stage.network.scale_shift": False,
        "stage.network.scale_skips": False,
        "stage.network.noise_input": "step_index",
        "stage.network.null_label": False,
        "stage.diffusion.label_dropout_prob": 0.0,
        "stage.diffusion.variance": "learned" if learned else "fixed",
        "stage.diffusion.loss": "hybrid" if learned else "simple",
        "stage.diffusion.vlb_weight": 0.001 if learned else None,
        "stage.sampler.variance": "learned" if learned else "small",
    }


def _schedule(file: pathlib.Path) -> dict[str, object]:
    config = read_json(file, remedy="download it again")
    if not isinstance(config, dict):
        raise UserError(f"{file}: is no object; expected the config of a scheduler")
    name = config.get("_class_name", "DDPMScheduler")
    if name not in _OF_BETAS:
        raise UserError(f"{file}: _class_name = {name!r}: expected one of {sorted(_OF_BETAS)}")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in PREDICTS:
        raise UserError(f"{file}: prediction_type = {predicts!r}: expected one of {PREDICTS}")
    for key, plain in (("trained_betas", None), ("rescale_betas_zero_snr", False)):
        if config.get(key, plain) not in (plain, None):
            raise UserError(f"{file}: {key} is set: expected {plain}, as our schedules have it")
    schedule: dict[str, object] = {"num_timesteps": steps, "noise_levels": "discrete"}
    if betas == "linear":
        # Ours are those of 1,000 steps.
        ends = (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
        schedule |= {"name": "linear", "linear_betas": [beta * steps / 1000 for beta in ends]}
    elif betas == "squaredcos_cap_v2":
        schedule |= {"name": "cosine", "cosine_offset": 0.008}
    else:
        raise UserError(
            f"{file}: beta_schedule = {betas!r}: expected 'linear' or 'squaredcos_cap_v2'"
        )
    changes: dict[str, object] = {
        "stage.schedule": schedule,
        "stage.diffusion.parameterization": PREDICTS[predicts],
    }
    if (variance := config.get("variance_type")) in _VARIANCES:
        changes["stage.sampler.variance"] = _VARIANCES[variance]
    return changes
