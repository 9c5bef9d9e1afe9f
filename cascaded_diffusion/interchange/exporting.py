"""Writes a stage's weights as other code bases read them."""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.convert import fail_at
from cascaded_diffusion.config.schema import StageConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record, write_json
from cascaded_diffusion.files.whole import whole_file
from cascaded_diffusion.interchange.diffusers_folder import DETAILS, PREDICTS
from cascaded_diffusion.interchange.names import Family, translations
from cascaded_diffusion.interchange.weights_files import TIMESTEPS
from cascaded_diffusion.networks.classifier import flatten_params
from cascaded_diffusion.runtime.checkpoint import load_ema_params
from cascaded_diffusion.runtime.run_folder import RunFolder


def check_expressible(stage: StageConfig, family: Family) -> None:
    """Raises UserError, which names the config key, if the family has no such network."""

    def refuse_unless(key: str, value: object, *allowed: object) -> None:
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            fail_at(stage, key, f"{expected}: {family.name} has no other network")

    network = stage.network
    for key, only in (("name", "unet"), ("patch_size", 1), ("scale_skips", False)):
        refuse_unless(f"stage.network.{key}", getattr(network, key), only)
    refuse_unless("stage.augment.name", stage.augment.name, "none", "blur")
    for width in {network.channels, *network.widths}:
        if width % 32:
            fail_at(stage, "stage.network.channel_mults", "multiples of 32 channels at every level")
    if stage.low_res_resolution is not None:
        refuse_unless("stage.network.upsample", network.upsample, "bilinear")
    if family.name == "guided_diffusion" and network.widths[0] > network.channels:
        fail_at(stage, "stage.network.channel_mults", "at most 1 first: it begins there with that")
    if family.name == "improved_diffusion" and network.widths[0] < network.channels:
        fail_at(stage, "stage.network.channel_mults", "at least 1 first: it begins there with 1")
    if family.name != "diffusers":
        refuse_unless("stage.network.ddpm_details", network.ddpm_details, None, False)
    else:
        refuse_unless("stage.kind", stage.kind, "base")
        refuse_unless("stage.network.resample", network.resample, "conv")
        # With it, the attention in the middle has no norm there.
        refuse_unless("stage.network.scale_shift", network.scale_shift, False)
        refuse_unless("stage.network.channel_mults[0]", network.channel_mults[0], 1)
        if len(set(network.num_res_blocks)) > 1 or len(_head_channels(stage)) > 1:
            raise UserError(
                f"config.stage.network of stage {stage.name!r}: expected as many residual blocks at"
                " every level, and attention heads of one width: diffusers has no other network"
            )


def _head_channels(stage: StageConfig) -> set[int]:
    network = stage.network
    attending = {width for i, width in enumerate(network.widths) if stage.attends(i)}
    return {width // network.heads_of(width) for width in {*attending, network.widths[-1]}}


def export_weights(
    folder: RunFolder, family: Family, output: pathlib.Path, *, step: int | None = None
) -> Record:
    """Writes the chosen checkpoint's averaged parameters, and returns what was written.

    For diffusers `output` is a folder that `UNet2DModel.from_pretrained` takes, else a file of
    safetensors with a state dict. Another `step` than the chosen one may be given.

    Raises UserError if the family has no such network, no checkpoint was chosen, or the output is
    there already.
    """
    config, chosen = folder.read_config(), folder.chosen()
    stage = config.stage
    check_expressible(stage, family)
    step = chosen.step if step is None else step
    shapes = build_stage(stage).shapes()[0]
    params = load_ema_params(folder, step, chosen.ema_decay, shapes)
    ours = flatten_params(jax.device_get(params))
    tensors: dict[str, np.ndarray] = {}
    for translated in translations(family, stage, shapes):
        theirs = translated.to_theirs(ours[translated.path])
        tensors.update(zip(translated.names, theirs, strict=True))
    about = {
        "stage": stage.name,
        "step": str(step),
        "ema_decay": str(chosen.ema_decay),
        "timesteps": TIMESTEPS[stage.network.noise_input],
    }
    if family.name != "diffusers" and output.suffix != ".safetensors":
        raise UserError(f"--output={output}: expected a name that ends with .safetensors")
    if output.exists():
        raise UserError(f"--output={output}: is there already; name a new one")
    if family.name == "diffusers":
        write_json(output / "config.json", _diffusers_config(stage, tensors))
        if (scheduler := _diffusers_scheduler(stage)) is not None:
            write_json(output / "scheduler_config.json", scheduler)
        _write_safetensors(output / "diffusion_pytorch_model.safetensors", tensors, about)
    else:
        _write_safetensors(output, tensors, about)
    return {**about, "tensors": len(tensors)}


def _write_safetensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]
) -> None:
    from safetensors.numpy import save_file

    with whole_file(path) as f:
        save_file(dict(tensors), f.name, metadata={"format": "pt", **about})


def _diffusers_config(stage: StageConfig, tensors: Mapping[str, np.ndarray]) -> Record:
    network = stage.network
    kinds = ["Attn" if stage.attends(level) else "" for level in range(len(network.widths))]
    (head,) = _head_channels(stage)
    rows = len(tensors["class_embedding.weight"]) if stage.num_classes else None
    return {
        "_class_name": "UNet2DModel",
        "sample_size": stage.resolution,
        "in_channels": stage.channels,
        "out_channels": stage.channels * (1 + (stage.diffusion.variance == "learned")),
        "block_out_channels": list(network.widths),
        "layers_per_block": network.num_res_blocks[0],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "attention_head_dim": head,
        "num_class_embeds": rows,
        "resnet_time_scale_shift": "default",
        "dropout": network.dropout_rate,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        **{key: values[bool(network.ddpm_details)] for key, values in DETAILS.items()},
        "norm_num_groups": 32,
        "act_fn": "silu",
        "center_input_sample": False,
        "add_attention": True,
    }


def _diffusers_scheduler(stage: StageConfig) -> Record | None:
    """The settings of a DDPMScheduler; None if the network is told no step of such a schedule."""
    schedule, variance = stage.schedule, stage.diffusion.variance
    steps = schedule.num_timesteps
    if stage.network.noise_input != "step_index" or steps is None:
        return None
    if schedule.name == "linear" and schedule.linear_betas is not None:
        # Ours are those of 1,000 steps.
        start, end = (beta * 1000 / steps for beta in schedule.linear_betas)
        betas: Record = {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
    elif schedule.name == "cosine" and schedule.cosine_offset == 0.008:
        betas = {"beta_schedule": "squaredcos_cap_v2"}
    else:
        return None
    predicts = {ours: theirs for theirs, ours in PREDICTS.items()}
    large = stage.sampler.variance == "large"
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        **betas,
        "prediction_type": predicts[stage.diffusion.parameterization],
        "variance_type": {"learned": "learned_range"}.get(
            variance, "fixed_large" if large else "fixed_small"
        ),
        "clip_sample": stage.sampler.threshold == "static",
    }
