"""The memory that a training step needs on each device, estimated without compiling it.

The state is counted from its shardings. The activations are what the traced step keeps for its
backward pass. Both are traced for shapes alone; nothing is allocated.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import RunConfig, StageConfig, TrainConfig
from cascaded_diffusion.config.stage_cost import stage_cost
from cascaded_diffusion.networks.kernels.execution import Execution
from cascaded_diffusion.runtime import sharding
from cascaded_diffusion.training import step
from cascaded_diffusion.training.step import TrainState

# The share of a device's memory that a program can use; the runtime needs the rest. The
# compiler of a v5e gives a program 15.75 of 16 GiB.
_USABLE = 0.98
# A compiled step also has copies and buffers. For the paper's models it needs 0.9 to 2.4 times
# the estimated activations (benchmarks/results/tpu_plan.md).
_MARGIN = 2.0


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on each device: the state, and what one training step keeps besides."""

    state: float
    activations: float

    @property
    def total(self) -> float:
        """Both, with a margin for what the compiler adds."""
        return self.state + _MARGIN * self.activations


def fits(size: float, memory_bytes: float) -> bool:
    """Whether a program of `size` bytes fits on a device with `memory_bytes`."""
    return size <= _USABLE * memory_bytes


def _mesh_shape(config: RunConfig, num_devices: int) -> dict[str, int]:
    mesh = config.mesh
    data = num_devices // (mesh.fsdp_size * mesh.tensor_size) if mesh.data == -1 else mesh.data
    return {"data": data, "fsdp": mesh.fsdp_size, "tensor": mesh.tensor_size}


@functools.cache
def _state_shapes(stage: StageConfig, train: TrainConfig) -> TrainState:
    return jax.eval_shape(step.make_init(build_stage(stage), train))


def abstract_state(
    config: RunConfig, num_devices: int
) -> tuple[TrainState, jax.sharding.AbstractMesh]:
    """The shapes of the trainer's state with their shardings, and the mesh without devices."""
    shape = _mesh_shape(config, num_devices)
    mesh = jax.sharding.AbstractMesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
    )
    # The shapes do not depend on these keys, so that one trace serves all of their values.
    plain = dataclasses.replace(
        config.train, batch_size=1, accumulation_steps=None, remat=None, remat_resolutions=None
    )
    shapes = _state_shapes(config.stage, plain)
    shardings = sharding.state_shardings(shapes, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return state, mesh


@functools.cache
def kept_bytes(stage_config: StageConfig, remat_sizes: tuple[int, ...] | None) -> int:
    """The bytes that a step keeps of one image for its backward pass."""
    execution = Execution(per_device=lambda function: function, remat_sizes=remat_sizes)
    stage = build_stage(stage_config).with_execution(execution)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    inputs = jax.eval_shape(lambda: stage.example_inputs(batch_size=1))

    def kept(params: Any, xt: Any, logsnr: Any, cond: Any) -> Any:
        return jax.vjp(lambda p: stage.network.apply(p, xt, logsnr, cond), params)[1]

    # The parameters are kept, too, as they are stored: the state has counted them.
    shapes = {x.shape for x in jax.tree.leaves(params)}
    leaves = jax.tree.leaves(jax.eval_shape(kept, params, *inputs))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.shape not in shapes or x.ndim < 2)


def step_memory(config: RunConfig, num_devices: int) -> StepMemory:
    """Estimates the memory of a training step by tracing the network."""
    state, mesh = abstract_state(config, num_devices)
    arrays = jax.tree.leaves(dataclasses.replace(state, key=None))
    state_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    # With fewer examples than devices, one example is traced and its bytes are divided up.
    parts = config.train.accumulation_steps or 1
    batch = config.train.batch_size / parts / (mesh.shape["data"] * mesh.shape["fsdp"])
    activations = kept_bytes(config.stage, config.train.remat_sizes) * max(1.0, batch)
    share = min(1.0, config.train.batch_size / parts / num_devices) if batch <= 1 else 1.0
    gathered = 0
    if mesh.shape["fsdp"] > 1 and config.train.remat != "everything":
        gathered = jnp.dtype(config.stage.network.dtype).itemsize * sum(
            x.size for x in jax.tree.leaves(state.params)
        )
    # The gradient is split as the state is, which holds about four arrays of its size.
    return StepMemory(state_bytes, int(activations * share) + gathered + state_bytes // 4)


def rough_step_memory(config: RunConfig, num_devices: int) -> StepMemory:
    """Estimates the same by arithmetic on the config, because tracing takes many seconds."""
    cost, train = stage_cost(config.stage), config.train
    shape = _mesh_shape(config, num_devices)
    images = train.batch_size / (train.accumulation_steps or 1) / (shape["data"] * shape["fsdp"])
    state = 4 * (3 + len(train.ema_decays)) * cost.parameters / (shape["fsdp"] * shape["tensor"])
    width = 2 if config.stage.network.dtype == "bfloat16" else 4
    return StepMemory(state, width * cost.kept_values * images / shape["tensor"])
