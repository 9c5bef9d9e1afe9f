"""One optimizer step, as one compiled program over the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config import TrainConfig, ema_name
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.training.optimizer import build_learning_rate, build_optimizer
from cascaded_diffusion.training.state import TrainState, init_state, updated_ema
from cascaded_diffusion.types import Batch

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]


def abstract_state(stage: Stage, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(make_init(stage, config))
    shardings = mesh_lib.state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def make_init(stage: Stage, config: TrainConfig) -> Callable[[], TrainState]:
    """Returns `init()`, the state before the first step, a function of the seed."""

    def init() -> TrainState:
        params_key, run_key = jax.random.split(jax.random.key(config.seed))
        return init_state(
            stage.init(params_key),
            build_optimizer(config),
            run_key,
            ema_decays=config.ema_decays,
        )

    return init


def make_train_step(stage: Stage, config: TrainConfig, mesh: Mesh) -> TrainStep:
    """Returns `train_step(state, records) -> (state, metrics)`, to be compiled by the caller.

    `records` is a dict of `image` uint8 [B, H, W, C], `label` int32 [B] and, where it is
    stored, `low_res` uint8 [B, h, w, C], sharded over the mesh.
    `metrics` are scalars of the global batch.
    """
    optimizer = build_optimizer(config)
    learning_rate = build_learning_rate(config)

    def train_step(state: TrainState, records: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        low_res = float_from_uint8(records["low_res"]) if "low_res" in records else None
        batch = Batch(
            image=float_from_uint8(records["image"]), label=records["label"], low_res=low_res
        )
        key = jax.random.fold_in(state.key, state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
            return stage.loss(mesh_lib.gathered(params, mesh), batch, key)

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema_params={
                ema_name(decay): updated_ema(
                    state.ema_params[ema_name(decay)], params, state.step, decay=decay
                )
                for decay in config.ema_decays
            },
            opt_state=opt_state,
            key=state.key,
        )
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        return new_state, metrics

    return train_step


def compile_train_step(
    train_step: TrainStep,
    state: TrainState,
    image_shape: tuple[int, int, int],
    batch_size: int,
    mesh: Mesh,
    *,
    low_res_shape: tuple[int, int, int] | None = None,
) -> tuple[Callable, float]:
    """Compiles the step ahead of time for the state's and the batch's shardings.

    Args:
      train_step: from `make_train_step`.
      state: the state or its abstract twin, with shardings.
      image_shape: (H, W, C) of the data.
      batch_size: global.
      mesh: the device mesh.
      low_res_shape: (h, w, C), where the data has low-res images stored.

    Returns:
      The compiled step, which donates the state, and the FLOPs of one step over
      the global batch (a multiply-add is two).
    """
    sharding = mesh_lib.batch_sharding(mesh)
    records = {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding),
    }
    if low_res_shape is not None:
        records["low_res"] = jax.ShapeDtypeStruct(
            (batch_size, *low_res_shape), jnp.uint8, sharding=sharding
        )
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    lowered = jax.jit(
        train_step,
        out_shardings=(state_shardings, mesh_lib.replicated(mesh)),
        donate_argnums=0,
    ).lower(state, records)
    # Counted before compilation, so before partitioning: FLOPs of the global batch.
    flops = lowered.cost_analysis()["flops"]
    return lowered.compile(), flops
