"""Whether a training step fits on the devices, and which division of the state makes it fit.

The memory of a step is estimated without compiling it. The state is counted from its shardings.
The activations are what the traced step keeps for its backward pass. Both are traced for shapes
alone; nothing is allocated.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.config.schema import RunConfig, StageConfig, TrainConfig
from cascaded_diffusion.config.stage_cost import stage_cost
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.networks.kernels.execution import Execution
from cascaded_diffusion.runtime import sharding
from cascaded_diffusion.runtime.accelerators import accelerator_of
from cascaded_diffusion.training import step
from cascaded_diffusion.training.step import TrainState

# The share of a device's memory that a program can use; the runtime needs the rest. The
# compiler of a v5e gives a program 15.75 of 16 GiB.
_USABLE = 0.98
# A compiled step also has copies and buffers. For the paper's models it needs 0.9 to 2.4 times
# the estimated activations (benchmarks/results/tpu_plan.md).
_MARGIN = 2.0
_MAX_FSDP = 64
# No compiler has needed less than this share of the estimated activations.
_LEAST = 0.5


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


def reserved_bytes(memory_bytes: float) -> int:
    """What a program on a device with `memory_bytes` leaves to the runtime."""
    return round((1 - _USABLE) * memory_bytes)


def _mesh_shape(config: RunConfig, num_devices: int) -> dict[str, int]:
    mesh = config.mesh
    data = num_devices // (mesh.fsdp_size * mesh.tensor_size) if mesh.data == -1 else mesh.data
    return {"data": data, "fsdp": mesh.fsdp_size, "tensor": mesh.tensor_size}


@functools.cache
def _state_shapes(stage: StageConfig, train: TrainConfig) -> TrainState:
    return step.state_shapes(build_stage(stage), train)


def abstract_state(config: RunConfig, num_devices: int) -> tuple[TrainState, AbstractMesh]:
    """The shapes of the trainer's state with their shardings, and the mesh without devices."""
    shape = _mesh_shape(config, num_devices)
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 3)
    # The shapes do not depend on these keys, so that one trace serves all of their values.
    plain = dataclasses.replace(
        config.train, batch_size=1, accumulation_steps=None, remat=None, remat_resolutions=None
    )
    return sharding.with_shardings(_state_shapes(config.stage, plain), mesh), mesh


@functools.cache
def kept_bytes(stage_config: StageConfig, remat_sizes: tuple[int, ...] | None) -> int:
    """The bytes that a step keeps of one image for its backward pass."""
    execution = Execution(per_device=lambda function: function, remat_sizes=remat_sizes)
    stage = build_stage(stage_config)
    shapes, apply = stage.shapes(), stage.with_execution(execution).network.apply
    kept = jax.eval_shape(lambda p, *x: jax.vjp(lambda p: apply(p, *x), p)[1], *shapes)
    # The parameters are kept, too, as they are stored: the state has counted them.
    stored = {x.shape for x in jax.tree.leaves(shapes[0])}
    leaves = [x for x in jax.tree.leaves(kept) if x.shape not in stored or x.ndim < 2]
    return sum(x.size * x.dtype.itemsize for x in leaves)


def step_memory(config: RunConfig, num_devices: int) -> StepMemory:
    """Estimates the memory of a training step by tracing the network."""
    state, mesh = abstract_state(config, num_devices)
    arrays = jax.tree.leaves(dataclasses.replace(state, key=None))
    state_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    # With fewer examples than devices, one example is traced and its bytes are divided up.
    parts = config.train.parts
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
    images = train.batch_size / train.parts / (shape["data"] * shape["fsdp"])
    state = 4 * (3 + len(train.ema_decays)) * cost.parameters / (shape["fsdp"] * shape["tensor"])
    width = 2 if config.stage.network.dtype == "bfloat16" else 4
    return StepMemory(state, width * cost.kept_values * images / shape["tensor"])


def device_bytes() -> float:
    """The memory of one device of this process. CPU devices share that of the machine."""
    device = jax.local_devices()[0]
    stats, accelerator = device.memory_stats() or {}, accelerator_of(device.device_kind)
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if accelerator is not None:
        return accelerator.memory_bytes
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / jax.local_device_count()


def choose_fsdp(
    config: RunConfig, num_devices: int, memory_bytes: float
) -> tuple[RunConfig, str | None]:
    """Where `mesh.fsdp` is None, chooses the smallest one whose estimate fits.

    `num_devices` are those of all processes, with `memory_bytes` each. Returns the config, and a
    line about the choice where there was something to choose.
    """
    mesh, rest = config.mesh, num_devices // config.mesh.tensor_size
    if mesh.fsdp is not None:
        return config, None

    def with_fsdp(fsdp: int) -> RunConfig:
        return dataclasses.replace(config, mesh=dataclasses.replace(mesh, fsdp=fsdp))

    sizes = [d for d in range(1, min(rest, _MAX_FSDP) + 1) if rest % d == 0]
    if mesh.data > 0:
        sizes = [d for d in sizes if mesh.data * d == rest]
    try:
        for fsdp in sizes:
            check_devices(with_fsdp(fsdp), num_devices)
    except UserError:
        sizes = []
    if not sizes or num_devices == 1:
        return with_fsdp(1), None  # `check_devices` then says what is wrong, if anything is
    if sizes[0] == 1 and _fits_by_far(rough_step_memory(config, num_devices), memory_bytes):
        return with_fsdp(1), "config.mesh.fsdp = 1: the state and a step fit on each device by far"
    totals = {}
    for fsdp in sizes:
        totals[fsdp] = step_memory(with_fsdp(fsdp), num_devices).total
        if fits(totals[fsdp], memory_bytes):
            return with_fsdp(fsdp), (
                f"config.mesh.fsdp = {fsdp}: the smallest division whose estimated"
                f" {totals[fsdp] / 1e9:.3g} GB per device fits in {memory_bytes / 1e9:.3g} GB"
            )
    fsdp = min(totals, key=totals.__getitem__)
    return with_fsdp(fsdp), (
        f"config.mesh.fsdp = {fsdp}: no division fits by estimate; with this one a device needs"
        f" {totals[fsdp] / 1e9:.3g} of {memory_bytes / 1e9:.3g} GB"
    )


def _fits_by_far(memory: StepMemory, memory_bytes: float) -> bool:
    return 2 * memory.state + 4 * memory.activations <= memory_bytes / 2


def check_memory(config: RunConfig, num_devices: int, memory_bytes: float) -> str | None:
    """Checks that a training step can fit, before anything is compiled.

    Returns a line of warning if the step may not fit; how much the compiler needs varies. Raises
    UserError if it cannot fit. The config's mesh must fit the devices.
    """
    rough = rough_step_memory(config, num_devices)
    if _fits_by_far(rough, memory_bytes):
        return None
    least = rough.activations if config.train.remat is None else 0.0
    if rough.state / 2 + _LEAST / 2 * least > memory_bytes:
        raise UserError(_too_large(config, rough, memory_bytes))
    memory = step_memory(config, num_devices)
    if fits(memory.total, memory_bytes):
        return None
    line = _too_large(config, memory, memory_bytes)
    if found := advice(config, num_devices, memory_bytes):
        line += f"; by estimate it fits with {found}"
    if memory.state + _LEAST * memory.activations > memory_bytes:
        raise UserError(line)
    return f"it may not fit: {line}"


def out_of_memory(config: RunConfig, num_devices: int, memory_bytes: float) -> str:
    """A line about a step for which a device had too little memory, with keys that need less."""
    memory = step_memory(config, num_devices)
    # It needed more than there is, whatever was estimated; how much more is not known.
    found = advice(config, num_devices, memory_bytes, max(memory.total, 1.2 * memory_bytes))
    return _too_large(config, memory, memory_bytes) + (f"; try {found}" if found else "")


def _too_large(config: RunConfig, memory: StepMemory, memory_bytes: float) -> str:
    train = config.train
    return (
        f"config.train.batch_size = {train.batch_size}, config.train.accumulation_steps ="
        f" {train.accumulation_steps}, config.train.remat = {train.remat!r}, config.mesh.fsdp ="
        f" {config.mesh.fsdp_size}: by estimate a device needs {memory.state / 1e9:.3g} GB for the"
        f" state and {memory.activations / 1e9:.3g} GB for a step, and has"
        f" {memory_bytes / 1e9:.3g} GB; expected a smaller batch, more parts, remat ="
        " 'everything', a larger fsdp or more devices"
    )


def advice(
    config: RunConfig, num_devices: int, memory_bytes: float, used: float | None = None
) -> str | None:
    """Names the keys to change for a step to fit, or returns None if no change that is tried helps.

    `used` is what a device needs by the compiler, if it was asked; estimates are scaled to it.
    """
    scale = 1.0 if used is None else used / step_memory(config, num_devices).total
    for changes, changed in _changes(config):
        try:
            check_devices(changed, num_devices)
        except UserError:
            continue
        if fits(scale * step_memory(changed, num_devices).total, memory_bytes):
            return ", ".join(f"--config.{key}={value}" for key, value in changes.items())
    return None


def _changes(config: RunConfig) -> Iterator[tuple[dict[str, int | str], RunConfig]]:
    """Yields changes that need less memory, those that cost the least time first."""
    train, mesh = config.train, config.mesh
    fsdps = [mesh.fsdp_size * 2**i for i in range(7) if mesh.fsdp_size * 2**i <= _MAX_FSDP]
    remats = [None] if train.remat == "everything" else [None, "everything"]
    for parts, remat, fsdp in itertools.product((1, 2, 4, 8, 16), remats, fsdps):
        changes: dict[str, int | str] = {}
        changed = train
        if fsdp != mesh.fsdp_size:
            changes["mesh.fsdp"] = fsdp
        if remat is not None:
            changes["train.remat"] = remat
            changed = dataclasses.replace(changed, remat=remat, remat_resolutions=None)
        if parts > 1:
            total = parts * train.parts
            changes["train.accumulation_steps"] = total
            changed = dataclasses.replace(changed, accumulation_steps=total)
        if changes:
            changed_mesh = dataclasses.replace(mesh, fsdp=fsdp)
            yield changes, dataclasses.replace(config, train=changed, mesh=changed_mesh)
