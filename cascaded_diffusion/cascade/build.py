"""Builds stages from their configs: the one place that knows the names and their meaning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from cascaded_diffusion.cascade.augment import Augment, BlurAugment, GaussianAugment, NoAugment
from cascaded_diffusion.cascade.pixels import UPSAMPLERS
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import ScheduleConfig, StageConfig
from cascaded_diffusion.diffusion.schedules import make_schedule
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.networks.conditioning import NOISE_INPUTS
from cascaded_diffusion.networks.unet import NETWORKS, Network
from cascaded_diffusion.types import Schedule


@functools.cache  # so that equal configs make equal stages, which share their compiled programs
def build_schedule(config: ScheduleConfig, resolution: int) -> Schedule:
    """A section's schedule. Raises UserError if two of its steps have the same noise level."""
    try:
        return make_schedule(
            config.name,
            resolution=resolution,
            num_timesteps=config.num_timesteps,
            between_steps=config.noise_levels == "continuous",
            cosine_offset=config.cosine_offset,
            linear_beta_range=config.linear_betas,
            reference_resolution=config.reference_resolution,
        )
    except ValueError as e:
        raise UserError(f"config.stage.schedule.num_timesteps = {config.num_timesteps}: {e}") from e


def build_augment(config: StageConfig) -> Augment | None:
    """A stage's conditioning augmentation; None for a base model."""
    augment, low_res_schedule = config.augment, config.low_res_schedule
    if config.low_res_resolution is None:
        return None
    if augment.name == "none":
        return NoAugment()
    if augment.name == "blur":
        return BlurAugment(
            augment.blur_kernel_size,
            augment.blur_sigmas,
            augment.blur_prob,
            augment.blur_border or "edge",
        )
    return GaussianAugment(
        schedule=build_schedule(low_res_schedule, config.low_res_resolution),
        num_timesteps=low_res_schedule.discrete_timesteps,
        max_level=augment.max_level,
    )


def build_network(config: StageConfig) -> Network:
    """A stage's network, whose attributes have the names of the config's keys."""
    section = dataclasses.asdict(config.network)
    name, dtype, upsample = (section.pop(key) for key in ("name", "dtype", "upsample"))
    schedule = build_schedule(config.schedule, config.resolution)
    noise_input = NOISE_INPUTS[section.pop("noise_input")](schedule, config.schedule.num_timesteps)
    null_label = section.pop("null_label") is not False
    ddpm_details = section.pop("ddpm_details") is True
    module = NETWORKS[name](
        out_channels=config.channels * (2 if config.diffusion.variance == "learned" else 1),
        num_classes=config.num_classes,
        aug_level_input=config.has_aug_level,
        upsample=None if config.low_res_resolution is None else UPSAMPLERS[upsample],
        noise_input=noise_input,
        null_label=null_label,
        ddpm_details=ddpm_details,
        dtype=jnp.dtype(dtype),
        **section,
    )
    return Network(module=module)


def check_precision() -> None:
    """Raises UserError if JAX computes with 64 bits, unlike checkpoints and samplers."""
    if jax.config.jax_enable_x64:
        raise UserError(
            "jax_enable_x64 is on: expected off, by jax.config.update('jax_enable_x64', False) or"
            " without JAX_ENABLE_X64; stages are computed in float32 or bfloat16"
        )


def build_stage(config: StageConfig) -> Stage:
    """A section's stage. Raises UserError as `build_schedule` and `check_precision`.

    stage = cd.build_stage(cd.load_config("configs/mnist_base16.py").stage)
    """
    check_precision()
    return Stage(
        config=config,
        schedule=build_schedule(config.schedule, config.resolution),
        network=build_network(config),
        augment=build_augment(config),
    )
