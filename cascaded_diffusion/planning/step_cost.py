"""What a training step costs on a slice of accelerators: `plan --topology=v5e:16x16`.

Without the compiler, memory comes from `fit.step_memory`, collectives from the formula of
`collectives`, and time from the maker's peak and an assumed efficiency. With the compiler (the
[tpu] extra), the TPU's own compiler says how much memory it gives the step, and how many FLOPs and
bytes of memory it counts. A roofline follows (Williams et al. 2009): the slowest of computing,
memory and links, if all overlaps, and their sum, if nothing does. It is an estimate: the compiler
is told to spend little effort, and may move fewer bytes in the program that trains.
"""

import dataclasses
import re
import sys
import time

import jax
from jax.experimental import topologies as jax_topologies

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError, is_out_of_memory
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.networks.kernels.platforms import traced_for
from cascaded_diffusion.planning import collectives, fit
from cascaded_diffusion.planning.topologies import Topology
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.training import step

# Less effort takes the compiler a third of the time and, as far as was seen, the same memory.
_EFFORTS = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
# XLA's names of instructions whose values a program computes again to save memory.
_RECOMPUTED = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+\.remat[\w.\-]* = ", re.MULTILINE)


def on_topology(
    config: RunConfig,
    topology: Topology,
    *,
    efficiency: float,
    flops_per_image: float,
    compile_step: bool,
) -> Record:
    """The cost of a config's training on a slice, by the TPU's compiler too if `compile_step`.

    Where `mesh.fsdp` is None, the smallest one that fits is chosen. `efficiency` is the share of
    the peak FLOP/s that is assumed to be reached, and `flops_per_image` are those of one forward
    pass; a multiply-add is two.
    """
    memory_bytes = topology.memory_bytes
    # This process would trace programs for the CPU.
    with traced_for("tpu" if topology.is_tpu else "gpu"):
        config, choice = fit.choose_fsdp(config, topology.num_devices, memory_bytes)
        found = _estimated(config, topology, efficiency, flops_per_image)
        found["mesh_choice"] = choice
        if compile_step:
            line = f"{config.stage.name}: compiling for {topology.name} ..."
            print(line, file=sys.stderr, flush=True)
            found["compiled"] = compiled = _compiled(config, topology)
            found["fits"] = compiled["fits"]
            if "flops" in compiled:
                compiled["roofline_secs"] = {
                    "compute": compiled["flops"] / topology.accelerator.peak_flops,
                    "memory": compiled["bytes_accessed"] / topology.accelerator.memory_bandwidth,
                    "links": found["collective_secs"],
                }
        if not found["fits"]:
            used = found.get("compiled", {}).get("used_bytes")
            found["advice"] = fit.advice(config, topology.num_devices, memory_bytes, used)
    return found


def _estimated(
    config: RunConfig, topology: Topology, efficiency: float, flops_per_image: float
) -> Record:
    check_devices(config, topology.num_devices)
    train, accelerator = config.train, topology.accelerator
    memory = fit.step_memory(config, topology.num_devices)
    model_flops = 3 * flops_per_image * train.batch_size
    peak = topology.num_devices * accelerator.peak_flops
    # Computing the blocks again is a fourth forward pass, which does not count as model FLOPs.
    again = 4 / 3 if train.remat else 1.0
    step_secs = again * model_flops / (peak * efficiency)
    state, mesh = fit.abstract_state(config, topology.num_devices)
    remat, dtype = train.remat == "everything", config.stage.network.dtype
    traffic = collectives.of_training_step(
        state.params, mesh, parts=train.parts, dtype=dtype, remat=remat
    )
    sent = sum(t.bytes * (2 if kind == "all-reduce" else 1) for kind, t in traffic.items())
    total_secs = step_secs * train.train_steps
    return {
        "topology": topology.name,
        "devices": topology.num_devices,
        "mesh": dict(mesh.shape),
        "batch_size": train.batch_size,
        "remat": train.remat,
        "dtype": dtype,
        "accumulation_steps": train.parts,
        "state_bytes_per_device": memory.state,
        "activation_bytes_per_device": memory.activations,
        "memory_bytes": topology.memory_bytes,
        "model_flops_per_step": model_flops,
        "collectives": {k: dataclasses.asdict(t) for k, t in traffic.items() if t.count},
        "peak_flops": peak,
        "assumed_efficiency": efficiency,
        "step_secs": step_secs,
        "collective_secs": sent / accelerator.link_bandwidth,
        "days": total_secs / 86400,
        "chip_hours": total_secs / 3600 * topology.num_devices,
        "fits": fit.fits(memory.total, topology.memory_bytes),
    }


def _compiled(config: RunConfig, topology: Topology) -> Record:
    """Compiles the training step with the TPU's compiler and returns its costs per device.

    Raises UserError if compilation fails for another reason than memory.
    """
    mesh = mesh_lib.build_mesh(config.mesh, _tpu_devices(topology))
    stage, train = build_stage(config.stage), config.train
    # The compiler computes values again until a program fits, or else refuses it.
    reserved = fit.reserved_bytes(topology.memory_bytes)
    start = time.monotonic()
    try:
        compiled = step.compile_train_step(
            stage,
            train,
            mesh,
            step.abstract_state(stage, train, mesh),
            **step.record_shapes(config),
            compiler_options={**_EFFORTS, "xla_tpu_user_reserved_hbm_bytes": reserved},
        )
    except jax.errors.JaxRuntimeError as e:
        text = str(e)
        if not is_out_of_memory(e):
            reason = text.splitlines()[0]
            raise UserError(f"--topology={topology.name}: does not compile ({reason})") from e
        lines = [line.strip() for line in text.splitlines() if "hbm" in line.lower()]
        return {
            "fits": False,
            "compile_secs": time.monotonic() - start,
            "problem": lines[0] if lines else text.splitlines()[0],
        }
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    # The compiler counts the loop over the parts of a batch once. Outside of it there is little
    # but the optimizer, which reads and writes the state.
    state_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    used = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "fits": True,
        "compile_secs": time.monotonic() - start,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "used_bytes": used,
        "recomputed": len(_RECOMPUTED.findall(compiled.as_text())),
        "flops": train.parts * costs["flops"],
        "bytes_accessed": state_bytes + train.parts * (costs["bytes accessed"] - state_bytes),
    }


def _tpu_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice to compile for. Raises UserError if libtpu does not know the slice."""
    try:
        # A v4 chip's two cores are one device, as they are where JAX runs on the chip.
        options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
        name = topology.name
        found = jax_topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as e:  # libtpu's errors have no type of their own
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(
            f"--topology={topology.name}: libtpu does not know it ({reason}); plan without"
            " its compiler by --nocompile"
        ) from e
    return list(found.devices)
