"""What a training step costs on a slice of accelerators: `plan --topology=v5e:16x16`.

Without the compiler: state per device from the shardings, activations as what the traced
step keeps for its backward pass, collectives by the formula of `runtime.collectives`, time
from the maker's peak and an assumed efficiency. With it (the [tpu] extra): the memory
that the TPU's own compiler gives the step.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Iterator
from typing import Any

from cascaded_diffusion.config.run_checks import check_devices, remat_sizes
from cascaded_diffusion.config.schema import RunConfig, StageConfig, TrainConfig
from cascaded_diffusion.config.stage_cost import stage_cost
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning.topologies import Topology, tpu_devices
from cascaded_diffusion.runtime.accelerators import accelerator_of

# Less effort of the compiler: a third of its time, and as far as seen the same memory.
_COMPILER_OPTIONS = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
# What is left of a device's memory for a program: the rest is the runtime's. A v5e's compiler
# gives a program 15.75 of 16 GiB.
_USABLE = 0.98
_MAX_FSDP = 64
# A compiled step has copies and buffers besides what is kept: of the paper's models it needs 0.9
# to 2.4 times the estimate (benchmarks/results/tpu_plan.md).
_MARGIN = 2.0
# Less than this part of the estimate no compiler has needed.
_LEAST = 0.5


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def topology_plan(
    config: RunConfig, topology: Topology, *, efficiency: float, flops_per_image: float
) -> dict[str, Any]:
    """The costs of a config's training on a topology, without compiling.

    Args:
      config: the run's.
      topology: where it shall run.
      efficiency: the share of the peak FLOP/s that is assumed to be reached.
      flops_per_image: of one forward pass, a multiply-add is two.
    """
    check_devices(config, topology.num_devices)
    train, accelerator = config.train, topology.accelerator
    memory = _memory(config, topology.num_devices)
    model_flops = 3 * flops_per_image * train.batch_size
    peak = topology.num_devices * accelerator.peak_flops
    # Computing the blocks again is a fourth forward pass, which counts for nothing.
    again = 4 / 3 if train.remat else 1.0
    step_secs = again * model_flops / (peak * efficiency)
    traffic = _traffic(config, topology.num_devices)
    sent = sum(t["bytes"] * (2 if kind == "all-reduce" else 1) for kind, t in traffic.items())
    total_secs = step_secs * train.train_steps
    plan = {
        "topology": topology.name,
        "devices": topology.num_devices,
        "mesh": _mesh_shape(config, topology.num_devices),
        "batch_size": train.batch_size,
        "remat": train.remat,
        "accumulation_steps": train.accumulation_steps or 1,
        **memory,
        "memory_bytes": accelerator.memory_bytes,
        "model_flops_per_step": model_flops,
        "collectives": traffic,
        "peak_flops": peak,
        "assumed_efficiency": efficiency,
        "step_secs": step_secs,
        "collective_secs": sent / accelerator.link_bandwidth,
        "days": total_secs / 86400,
        "chip_hours": total_secs / 3600 * topology.num_devices,
    }
    plan["fits"] = _fits(_total(config, topology.num_devices), accelerator.memory_bytes)
    return plan


def _fits(size: float, memory_bytes: float) -> bool:
    return size <= _USABLE * memory_bytes


def _mesh_shape(config: RunConfig, num_devices: int) -> dict[str, int]:
    mesh = config.mesh
    data = num_devices // (mesh.fsdp_size * mesh.tensor_size) if mesh.data == -1 else mesh.data
    return {"data": data, "fsdp": mesh.fsdp_size, "tensor": mesh.tensor_size}


@functools.cache
def _state_shapes(stage_config: StageConfig, train: TrainConfig) -> Any:
    """The shapes of the trainer's state."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.training import step

    return jax.eval_shape(step.make_init(build_stage(stage_config), train))


def _abstract(config: RunConfig, num_devices: int) -> tuple[Any, Any]:
    """The state's shapes with shardings, and a mesh of no devices."""
    import jax

    from cascaded_diffusion.runtime import sharding

    shape = _mesh_shape(config, num_devices)
    mesh = jax.sharding.AbstractMesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
    )
    # Not of what the shapes do not depend on: one trace serves all.
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
def _kept_bytes(stage_config: StageConfig, remat: tuple[int, ...]) -> int:
    """What a step keeps of one image for its backward pass."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.networks.kernels.execution import Execution

    execution = Execution(per_device=lambda function: function, remat_sizes=remat)
    stage = build_stage(stage_config).with_execution(execution)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    inputs = jax.eval_shape(lambda: stage.example_inputs(batch_size=1))

    def kept(params: Any, xt: Any, logsnr: Any, cond: Any) -> Any:
        return jax.vjp(lambda p: stage.network.apply(p, xt, logsnr, cond), params)[1]

    # Parameters are among what is kept, as they are stored: they are counted already.
    shapes = {x.shape for x in jax.tree.leaves(params)}
    leaves = jax.tree.leaves(jax.eval_shape(kept, params, *inputs))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.shape not in shapes or x.ndim < 2)


def _memory(config: RunConfig, num_devices: int) -> dict[str, int]:
    """Bytes of one device: of the state, and of what a step keeps for its backward pass."""
    import jax
    import jax.numpy as jnp

    state, mesh = _abstract(config, num_devices)
    arrays = jax.tree.leaves(dataclasses.replace(state, key=None))
    state_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    # Of fewer examples than devices one is traced, and divided up.
    parts = config.train.accumulation_steps or 1
    batch = config.train.batch_size / parts / (mesh.shape["data"] * mesh.shape["fsdp"])
    remat = remat_sizes(config.train, config.stage)
    activations = _kept_bytes(config.stage, remat) * max(1.0, batch)
    share = min(1.0, config.train.batch_size / parts / num_devices) if batch <= 1 else 1.0
    gathered = 0
    if mesh.shape["fsdp"] > 1 and config.train.remat != "everything":
        gathered = jnp.dtype(config.stage.network.dtype).itemsize * sum(
            x.size for x in jax.tree.leaves(state.params)
        )
    return {
        "state_bytes_per_device": state_bytes,
        # And the gradient, split as the state is, which has some four of its size.
        "activation_bytes_per_device": int(activations * share) + gathered + state_bytes // 4,
    }


def _traffic(config: RunConfig, num_devices: int) -> dict[str, dict[str, int]]:
    from cascaded_diffusion.planning import collectives

    state, mesh = _abstract(config, num_devices)
    found = collectives.of_training_step(
        state.params,
        mesh,
        parts=config.train.accumulation_steps or 1,
        dtype=config.stage.network.dtype,
        remat=config.train.remat == "everything",
    )
    return {kind: dataclasses.asdict(t) for kind, t in found.items() if t.count}


def compiled_plan(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """What the TPU's compiler makes of the training step: bytes per device, collectives.

    Raises:
      UserError: it fails for another reason than memory.
    """
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.planning import collectives
    from cascaded_diffusion.runtime import mesh as mesh_lib
    from cascaded_diffusion.training import step

    mesh = mesh_lib.build_mesh(config.mesh, tpu_devices(topology))
    stage, train, size = build_stage(config.stage), config.train, config.data.resolution
    low_res_shape = None
    if config.data.low_res == "stored":
        low_res_shape = (config.stage.low_res_resolution,) * 2 + (config.stage.channels,)
    start = time.monotonic()
    try:
        compiled = step.compile_train_step(
            step.make_train_step(stage, train, mesh),
            step.abstract_state(stage, train, mesh),
            (size, size, config.stage.channels),
            train.batch_size,
            mesh,
            low_res_shape=low_res_shape,
            compiler_options=_COMPILER_OPTIONS,
        )
    except jax.errors.JaxRuntimeError as e:
        text = str(e)
        if "RESOURCE_EXHAUSTED" not in text:
            reason = text.splitlines()[0]
            raise UserError(f"--topology={topology.name}: does not compile ({reason})") from e
        lines = [line.strip() for line in text.splitlines() if "hbm" in line.lower()]
        return {
            "fits": False,
            "compile_secs": time.monotonic() - start,
            "problem": lines[0] if lines else text.splitlines()[0],
        }
    memory = compiled.memory_analysis()
    used = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    found = {
        "fits": _fits(used, topology.accelerator.memory_bytes),
        "compile_secs": time.monotonic() - start,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "used_bytes": used,
    }
    try:
        traffic = collectives.in_program(compiled.as_text())
    except ValueError as e:  # minutes of compilation are not lost for it
        found["collectives_problem"] = str(e)
    else:
        found["collectives"] = {k: dataclasses.asdict(t) for k, t in traffic.items() if t.count}
    return found


def advice(
    config: RunConfig, num_devices: int, memory_bytes: float, used: float | None = None
) -> str | None:
    """Which keys to change for a step to fit, or None if nothing that is tried helps.

    Args:
      config: of a step that does not fit.
      num_devices: there are.
      memory_bytes: of one device.
      used: bytes per device by the compiler, where it says; the estimate is scaled to it.
    """
    here = _total(config, num_devices)
    scale = 1.0 if used is None else used / here
    for changes, changed in _changes(config):
        try:
            check_devices(changed, num_devices)
        except UserError:
            continue
        if _fits(scale * _total(changed, num_devices), memory_bytes):
            return ", ".join(f"--config.{key}={value}" for key, value in changes.items())
    return None


def divided(
    config: RunConfig, num_devices: int, memory_bytes: float
) -> tuple[RunConfig, str | None]:
    """A run's config with the smallest `mesh.fsdp` whose estimate fits, where it is None.

    Args:
      config: the run's.
      num_devices: there are, of all processes.
      memory_bytes: of one device.

    Returns:
      The config, and a line that says so where there was something to choose.
    """
    mesh, rest = config.mesh, num_devices // config.mesh.tensor_size
    if mesh.fsdp is not None:
        return config, None

    def of(fsdp: int) -> RunConfig:
        return dataclasses.replace(config, mesh=dataclasses.replace(mesh, fsdp=fsdp))

    sizes = [d for d in range(1, min(rest, _MAX_FSDP) + 1) if rest % d == 0]
    if mesh.data > 0:
        sizes = [d for d in sizes if mesh.data * d == rest]
    try:
        for fsdp in sizes:
            check_devices(of(fsdp), num_devices)
    except UserError:
        sizes = []
    if not sizes or num_devices == 1:
        return of(1), None  # and `check_devices` says what is wrong, if anything is
    if sizes[0] == 1 and _fits_by_far(config, num_devices, memory_bytes):
        return of(1), "config.mesh.fsdp = 1: the state and a step fit on each device by far"
    totals = {}
    for fsdp in sizes:
        totals[fsdp] = _total(of(fsdp), num_devices)
        if _fits(totals[fsdp], memory_bytes):
            return of(fsdp), (
                f"config.mesh.fsdp = {fsdp}: the smallest division whose estimated"
                f" {totals[fsdp] / 1e9:.3g} GB per device fits in {memory_bytes / 1e9:.3g} GB"
            )
    fsdp = min(totals, key=totals.__getitem__)
    return of(fsdp), (
        f"config.mesh.fsdp = {fsdp}: no division fits by estimate; with this one a device needs"
        f" {totals[fsdp] / 1e9:.3g} of {memory_bytes / 1e9:.3g} GB"
    )


def device_bytes() -> float:
    """The memory of one of this process's devices; a CPU's devices share the machine's."""
    import jax

    device = jax.local_devices()[0]
    stats, accelerator = device.memory_stats() or {}, accelerator_of(device.device_kind)
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if accelerator is not None:
        return accelerator.memory_bytes
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / jax.local_device_count()


def _rough(config: RunConfig, num_devices: int) -> tuple[float, float]:
    """Bytes of one device, state and activations, by arithmetic: tracing takes many seconds."""
    cost, train = stage_cost(config.stage), config.train
    shape = _mesh_shape(config, num_devices)
    images = train.batch_size / (train.accumulation_steps or 1) / (shape["data"] * shape["fsdp"])
    state = 4 * (3 + len(train.ema_decays)) * cost.parameters / (shape["fsdp"] * shape["tensor"])
    width = 2 if config.stage.network.dtype == "bfloat16" else 4
    return state, width * cost.kept_values * images / shape["tensor"]


def _fits_by_far(config: RunConfig, num_devices: int, memory_bytes: float) -> bool:
    state, activations = _rough(config, num_devices)
    return 2 * state + 4 * activations <= memory_bytes / 2


def check_memory(config: RunConfig, num_devices: int, memory_bytes: float) -> str | None:
    """Looks whether a training step can fit, before anything is compiled.

    Args:
      config: the run's, whose mesh fits the devices.
      num_devices: there are, of all processes.
      memory_bytes: of one device.

    Returns:
      A line of warning if it may well not fit; what the compiler makes of it varies.

    Raises:
      UserError: it cannot fit.
    """
    if _fits_by_far(config, num_devices, memory_bytes):
        return None
    state, activations = _rough(config, num_devices)
    least = activations if config.train.remat is None else 0.0
    if state / 2 + _LEAST / 2 * least > memory_bytes:
        raise UserError(_too_large(config, state, activations, memory_bytes))
    memory = _memory(config, num_devices)
    state, activations = memory["state_bytes_per_device"], memory["activation_bytes_per_device"]
    if _fits(state + _MARGIN * activations, memory_bytes):
        return None
    line = _too_large(config, state, activations, memory_bytes)
    if found := advice(config, num_devices, memory_bytes):
        line += f"; by estimate it fits with {found}"
    if state + _LEAST * activations > memory_bytes:
        raise UserError(line)
    return f"it may not fit: {line}"


def _too_large(config: RunConfig, state: float, activations: float, memory_bytes: float) -> str:
    train = config.train
    return (
        f"config.train.batch_size = {train.batch_size}, config.train.accumulation_steps ="
        f" {train.accumulation_steps}, config.train.remat = {train.remat!r}, config.mesh.fsdp ="
        f" {config.mesh.fsdp_size}: by estimate a device needs {state / 1e9:.3g} GB for the state"
        f" and {activations / 1e9:.3g} GB for a step, and has {memory_bytes / 1e9:.3g} GB;"
        " expected a smaller batch, more parts, remat = 'everything', a larger fsdp or more devices"
    )


def _total(config: RunConfig, num_devices: int) -> float:
    """Bytes of one device, on the safe side."""
    memory = _memory(config, num_devices)
    return memory["state_bytes_per_device"] + _MARGIN * memory["activation_bytes_per_device"]


def _changes(config: RunConfig) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Ways to need less memory: the cheapest in time first."""
    train, mesh = config.train, config.mesh
    fsdps = [mesh.fsdp_size * 2**i for i in range(7) if mesh.fsdp_size * 2**i <= _MAX_FSDP]
    for parts in (1, 2, 4, 8, 16):
        for remat in (None, "everything") if train.remat != "everything" else (None,):
            for fsdp in fsdps:
                changes: dict[str, Any] = {}
                if fsdp != mesh.fsdp_size:
                    changes["mesh.fsdp"] = fsdp
                if remat is not None:
                    changes["train.remat"] = remat
                if parts > 1:
                    changes["train.accumulation_steps"] = parts * (train.accumulation_steps or 1)
                if not changes:
                    continue
                changed_train = dataclasses.replace(
                    train,
                    remat=remat or train.remat,
                    remat_resolutions=None if remat else train.remat_resolutions,
                    accumulation_steps=changes.get(
                        "train.accumulation_steps", train.accumulation_steps
                    ),
                )
                changed_mesh = dataclasses.replace(mesh, fsdp=fsdp)
                yield changes, dataclasses.replace(config, train=changed_train, mesh=changed_mesh)
