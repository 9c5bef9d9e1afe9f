"""The optimizer and its learning rate, from optax."""

from __future__ import annotations

import optax

from cascaded_diffusion.config.schema import TrainConfig


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
