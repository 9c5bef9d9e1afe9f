"""The state of training, the optimizer, and one step of it as a program over the mesh."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.cascade.stage import NoisedBatch, Stage
from cascaded_diffusion.config.schema import RunConfig, TrainConfig, ema_name
from cascaded_diffusion.networks.flops import count_flops
from cascaded_diffusion.networks.kernels import layouts
from cascaded_diffusion.networks.kernels.execution import Execution
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import sharding
from cascaded_diffusion.types import Batch, Params, Tree


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


Metrics = dict[str, jax.Array]
Summed = tuple[Params, Metrics]
TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]


def state_shapes(stage: Stage, config: TrainConfig) -> TrainState:
    """The state's shapes and dtypes."""
    return jax.eval_shape(_make_init(stage, config), jax.random.key(config.seed))


def abstract_state(stage: Stage, config: TrainConfig, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, without allocating it."""
    return sharding.with_shardings(state_shapes(stage, config), mesh)


def init_state(stage: Stage, config: TrainConfig, mesh: Mesh) -> TrainState:
    """A run's first state, made from its seed on the mesh. EMAs start at the parameters."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(stage, config, mesh))
    init = jax.jit(_make_init(stage, config), out_shardings=shardings)
    return init(jax.random.key(config.seed))


def _make_init(stage: Stage, config: TrainConfig) -> Callable[[jax.Array], TrainState]:
    # The seed is no part of the program, so that all seeds share it.
    def init(key: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(key)
        params = stage.init(params_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params={ema_name(d): jax.tree.map(jnp.copy, params) for d in config.ema_decays},
            opt_state=build_optimizer(config).init(params),
            key=run_key,
        )

    return init


def stage_for_sampling(stage: Stage, mesh: Mesh) -> Stage:
    """The stage as it samples, any number of images, from parameters stored as in training."""
    gather = sharding.make_gather(stage.shapes()[0], mesh)
    return stage.with_execution(Execution(gather=gather))


def _in_parts(noised: NoisedBatch, parts: int, mesh: Mesh) -> NoisedBatch:
    """[B, ...] -> [parts, B / parts, ...]; every part has rows of every device."""
    split = NamedSharding(mesh, PartitionSpec(None, mesh_lib.DATA_AXES))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def cut(x: jax.Array) -> jax.Array:
        b, *rest = x.shape
        x = x.reshape(shards, parts, b // (shards * parts), *rest).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(parts, b // parts, *rest), split)

    return jax.tree.map(cut, noised)


def make_train_step(stage: Stage, config: TrainConfig, mesh: Mesh) -> TrainStep:
    """Returns `train_step(state, records) -> (state, metrics)`, which the caller compiles.

    `records` is a dict of `image` uint8 [B, H, W, C], `label` int32 [B] and, if the data has it
    stored, `low_res` uint8 [B, h, w, C], sharded over the mesh. `metrics` are scalars of the
    global batch, which do not depend on the number of parts, and `grad_squares`, the squared norms
    of the gradients of all parameters (`nonfinite.leaf_names`). If one of them is not finite, the
    step changes nothing but its number, by which data, noise and the EMA's warm-up go.
    """
    optimizer = build_optimizer(config)
    parts, params = config.parts, stage.shapes()[0]
    constrain = sharding.make_sharding_constraint(mesh, batch_size=config.batch_size // parts)
    execution = Execution(
        gather=sharding.make_gather(params, mesh),
        constrain_sharding=constrain,
        per_device=sharding.make_per_device(mesh),
        remat_sizes=config.remat_sizes,
    )
    stage = stage.with_execution(execution)
    grad_fn = jax.grad(stage.loss_of, has_aux=True)

    def gradient(params: Params, noised: NoisedBatch, key: jax.Array) -> Summed:
        if parts == 1:
            return grad_fn(params, noised, key)
        first_part = jax.tree.map(lambda x: x[: len(x) // parts], noised)
        shapes = jax.eval_shape(grad_fn, params, first_part, key)

        def add(total: Summed, part: NoisedBatch) -> tuple[Summed, None]:
            summed = jax.tree.map(jnp.add, total, grad_fn(params, part, key))
            return _stored(summed, mesh), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, _stored(zeros, mesh), _in_parts(noised, parts, mesh))
        return jax.tree.map(lambda x: x / parts, total)

    def train_step(state: TrainState, records: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        noised, key = noised_batch(stage, state, records)
        grads, metrics = gradient(state.params, noised, key)
        # Transposed inside of the update, gradients would keep it from being written over what it
        # is computed from: XLA would copy parameters, moments and averages once more.
        ordered = layouts.in_order(grads, sharding.state_shardings(grads, mesh))
        grads = layouts.in_memory(ordered)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = {
            ema_name(decay): updated_ema(
                state.ema_params[ema_name(decay)], params, state.step, decay=decay
            )
            for decay in config.ema_decays
        }
        # Clipping has the same sums, which the compiler finds.
        squares = [jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)]
        metrics |= {"grad_norm": jnp.sqrt(functools.reduce(operator.add, squares))}
        finite = functools.reduce(operator.and_, map(jnp.isfinite, metrics.values()))
        new = {"params": params, "ema_params": ema_params, "opt_state": opt_state}
        old = {name: getattr(state, name) for name in new}
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        metrics |= {
            "learning_rate": jnp.asarray(
                build_learning_rate(config)(_updates(state.opt_state)), jnp.float32
            ),
            "grad_squares": jnp.stack(squares),
        }
        return dataclasses.replace(state, step=state.step + 1, **kept), metrics

    return train_step


def _updates(opt_state: optax.OptState) -> jax.Array:
    """How many updates the optimizer has made; steps that were skipped made none."""

    def is_schedule(x: object) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    (count,) = (leaf.count for leaf in leaves if is_schedule(leaf))
    return count


def make_losses(stage: Stage) -> Callable[[TrainState, dict[str, jax.Array]], jax.Array]:
    """Returns `losses(state, records) -> [B]`: what the step after `state` averages."""

    def losses(state: TrainState, records: dict[str, jax.Array]) -> jax.Array:
        return stage.losses_of(state.params, *noised_batch(stage, state, records))["loss"]

    return losses


def noised_batch(
    stage: Stage, state: TrainState, records: dict[str, jax.Array]
) -> tuple[NoisedBatch, jax.Array]:
    """The batch of the step after `state`, and the step's key."""
    low_res = float_from_uint8(records["low_res"]) if "low_res" in records else None
    image = float_from_uint8(records["image"])
    batch = Batch(image=image, label=records["label"], low_res=low_res)
    key = jax.random.fold_in(state.key, state.step)
    # Noise is drawn for the whole batch, so that it depends on the row alone.
    return stage.noised(batch, key), key


def _stored(tree: Tree, mesh: Mesh) -> Tree:
    return jax.lax.with_sharding_constraint(tree, sharding.state_shardings(tree, mesh))


def flops_per_step(stage: Stage, batch_size: int) -> float:
    """Model FLOPs of one step: three forward passes; a multiply-add counts as two.

    Convolutions and matrix products count; what rematerialization computes again does not.
    """
    return 3.0 * batch_size * count_flops(stage.network.apply, *stage.shapes())


def record_shapes(config: RunConfig) -> dict[str, tuple[int, int, int] | None]:
    """The shapes of a config's images, by their names in `compile_train_step`."""
    stage, size = config.stage, config.data.resolution
    low_res = None
    if config.data.low_res == "stored":
        low_res = (stage.low_res_resolution, stage.low_res_resolution, stage.channels)
    return {"image_shape": (size, size, stage.channels), "low_res_shape": low_res}


def compile_train_step(
    stage: Stage,
    config: TrainConfig,
    mesh: Mesh,
    state: TrainState,
    image_shape: tuple[int, int, int],
    *,
    low_res_shape: tuple[int, int, int] | None = None,
    compiler_options: Mapping[str, float] | None = None,
) -> jax.stages.Compiled:
    """Compiles `make_train_step` for the shardings of a state, or its shapes, which it donates.

    `image_shape` is (H, W, C), `low_res_shape` (h, w, C) where low-res images are stored.
    """
    shapes = {"image": image_shape, "label": (), "low_res": low_res_shape}
    records = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *shape),
            jnp.uint8 if shape else jnp.int32,
            sharding=mesh_lib.batch_sharding(mesh),
        )
        for name, shape in shapes.items()
        if shape is not None
    }
    outputs = jax.tree.map(lambda x: x.sharding, state), mesh_lib.replicated(mesh)
    train_step = make_train_step(stage, config, mesh)
    jitted = jax.jit(train_step, out_shardings=outputs, donate_argnums=0)
    return jitted.lower(state, records).compile(compiler_options)
