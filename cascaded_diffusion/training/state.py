"""The state that training carries from step to step, and the optimizer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from cascaded_diffusion.config.schema import TrainConfig
from cascaded_diffusion.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """The trainer's state, a pytree."""

    step: jax.Array  # int32 scalar, the number of optimizer steps taken
    params: Params  # the network's, float32
    ema_params: dict[str, Params]  # exponential moving averages, by `ema_name` of the decay
    opt_state: optax.OptState
    # Typed PRNG key of the run. Step k draws from `fold_in(key, k)`: only `step` advances, and a
    # resumed run repeats no noise.
    key: jax.Array


def updated_ema(ema_params: Params, params: Params, step: jax.Array, *, decay: float) -> Params:
    """EMA with a warm-up: the effective decay is min(decay, (1 + step) / (10 + step)).

    Without the warm-up, the average of a run shorter than a few times 1 / (1 - decay) steps
    would still contain the random initial parameters.
    """
    step = step.astype(jnp.float32)
    effective = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - effective) * (p - e), ema_params, params)


def build_learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0, then constant or a cosine decay to a twentieth."""
    if config.lr_decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if config.warmup_steps else config.learning_rate,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=config.train_steps,
            end_value=config.learning_rate / 20,
        )
    if not config.warmup_steps:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)


def build_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by the norm of the global batch's gradient, then Adam."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm),
        optax.adam(build_learning_rate(config), b2=config.adam_b2),
    )
