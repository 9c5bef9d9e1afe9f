"""What a training step costs on a slice of accelerators: `plan --topology=v5e:16x16`.

Without the compiler, memory comes from `step_memory`, collectives from the formula of
`collectives`, and time from the maker's peak and an assumed efficiency. With the compiler (the
[tpu] extra), the TPU's own compiler says how much memory it gives the step.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning import collectives
from cascaded_diffusion.planning.step_memory import abstract_state, fits, mesh_shape, step_memory
from cascaded_diffusion.planning.topologies import Topology
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.training import step

# Less effort takes the compiler a third of the time and, as far as was seen, the same memory.
_COMPILER_OPTIONS = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}


def estimated_cost(
    config: RunConfig, topology: Topology, *, efficiency: float, flops_per_image: float
) -> dict[str, Any]:
    """Estimates the cost of a config's training on a topology, without compiling.

    Args:
      config: the config of the run.
      topology: the slice.
      efficiency: the share of the peak FLOP/s that is assumed to be reached.
      flops_per_image: FLOPs of one forward pass; a multiply-add is two.
    """
    check_devices(config, topology.num_devices)
    train, accelerator = config.train, topology.accelerator
    memory = step_memory(config, topology.num_devices)
    model_flops = 3 * flops_per_image * train.batch_size
    peak = topology.num_devices * accelerator.peak_flops
    # Computing the blocks again is a fourth forward pass, which does not count as model FLOPs.
    again = 4 / 3 if train.remat else 1.0
    step_secs = again * model_flops / (peak * efficiency)
    traffic = _traffic(config, topology.num_devices)
    sent = sum(t["bytes"] * (2 if kind == "all-reduce" else 1) for kind, t in traffic.items())
    total_secs = step_secs * train.train_steps
    return {
        "topology": topology.name,
        "devices": topology.num_devices,
        "mesh": mesh_shape(config, topology.num_devices),
        "batch_size": train.batch_size,
        "remat": train.remat,
        "accumulation_steps": train.accumulation_steps or 1,
        "state_bytes_per_device": memory.state,
        "activation_bytes_per_device": memory.activations,
        "memory_bytes": accelerator.memory_bytes,
        "model_flops_per_step": model_flops,
        "collectives": traffic,
        "peak_flops": peak,
        "assumed_efficiency": efficiency,
        "step_secs": step_secs,
        "collective_secs": sent / accelerator.link_bandwidth,
        "days": total_secs / 86400,
        "chip_hours": total_secs / 3600 * topology.num_devices,
        "fits": fits(memory.total, accelerator.memory_bytes),
    }


def _traffic(config: RunConfig, num_devices: int) -> dict[str, dict[str, int]]:
    state, mesh = abstract_state(config, num_devices)
    found = collectives.of_training_step(
        state.params,
        mesh,
        parts=config.train.accumulation_steps or 1,
        dtype=config.stage.network.dtype,
        remat=config.train.remat == "everything",
    )
    return {kind: dataclasses.asdict(t) for kind, t in found.items() if t.count}


def compiled_cost(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """Compiles the training step with the TPU's compiler and returns its bytes per device.

    Raises:
      UserError: compilation fails for another reason than memory.
    """
    mesh = mesh_lib.build_mesh(config.mesh, _tpu_devices(topology))
    stage, train, size = build_stage(config.stage), config.train, config.data.resolution
    low_res_shape = None
    if config.data.low_res == "stored":
        low_res_shape = (config.stage.low_res_resolution,) * 2 + (config.stage.channels,)
    start = time.monotonic()
    try:
        compiled = step.compile_train_step(
            stage,
            train,
            mesh,
            step.abstract_state(stage, train, mesh),
            (size, size, config.stage.channels),
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
    return {
        "fits": fits(used, topology.accelerator.memory_bytes),
        "compile_secs": time.monotonic() - start,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "used_bytes": used,
    }


def _tpu_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice to compile for. Raises UserError if libtpu does not know the slice."""
    try:
        # A v4 chip's two cores are one device, as they are where JAX runs on the chip.
        options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
        found = jax_topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except Exception as e:  # libtpu's errors have no type of their own
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(
            f"--topology={topology.name}: libtpu does not know it ({reason}); plan without"
            " its compiler by --nocompile"
        ) from e
    return list(found.devices)
