"""What a stage or a cascade costs before it is run. Nothing is allocated.

FLOPs are those of convolutions and matrix products; a multiply-add is two. Training is counted
as three forward passes, without rematerialization.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import CascadeSection, RunConfig, SamplerConfig
from cascaded_diffusion.networks.flops import count_flops
from cascaded_diffusion.networks.kernels.platforms import traced_for
from cascaded_diffusion.planning import fit, step_cost
from cascaded_diffusion.planning.topologies import Topology

_SUMMED = (
    "parameters",
    "flops_per_image",
    "calls_per_sample",
    "flops_per_sample",
    "training_flops",
)


def stage_plan(config: RunConfig, sampler: SamplerConfig, *, stop_t: float = 0.0) -> dict[str, Any]:
    """The costs of one stage, sampled by `sampler` from t = 1 to `stop_t`."""
    stage, train = build_stage(config.stage), config.train
    params = jax.eval_shape(stage.init, jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    inputs = jax.eval_shape(lambda: stage.example_inputs(batch_size=1))
    flops = count_flops(stage.network.apply, params, *inputs)
    evaluations = stage.evaluations(sampler, stop_t=stop_t)
    images = train.batch_size * train.train_steps
    # The parameters, their EMAs and Adam's two moments, in float32.
    copies = 1 + len(train.ema_decays) + 2
    return {
        "name": config.stage.name,
        "resolution": config.stage.resolution,
        "parameters": int(parameters),
        "flops_per_image": flops,
        "sampler": sampler.name,
        "num_steps": sampler.num_steps,
        "calls_per_sample": evaluations,
        "flops_per_sample": flops * evaluations,
        "training_images": images,
        "training_flops": 3 * flops * images,
        "state_bytes": 4 * copies * int(parameters),
    }


def cascade_plans(section: CascadeSection, configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """The costs of each stage of a cascade, with truncated chains counted as they run."""
    plans = []
    for i, (config, sampler) in enumerate(zip(configs, section.samplers, strict=True)):
        truncated = (
            section.truncated and i + 1 < len(configs) and configs[i + 1].stage.has_aug_level
        )
        stop_t = section.aug_levels[i] if truncated else 0.0
        plans.append(stage_plan(config, sampler, stop_t=stop_t))
    return plans


def summed(name: str, plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plan of a cascade: the sums of its stages' costs, and the stages."""
    sums = {key: sum(stage[key] for stage in plans) for key in _SUMMED}
    return {"name": name, **sums, "stages": list(plans)}


def on_topology(
    config: RunConfig,
    topology: Topology,
    *,
    efficiency: float,
    flops_per_image: float,
    compile_step: bool,
) -> dict[str, Any]:
    """The cost of a training step on a slice; see `step_cost.estimated_cost`.

    Args:
      config: the config of the run. Where `mesh.fsdp` is None, the smallest one that fits is
        chosen.
      topology: the slice.
      efficiency: the share of the peak FLOP/s that is assumed.
      flops_per_image: FLOPs of one forward pass.
      compile_step: compile the step with the TPU's compiler, too.
    """
    memory_bytes = topology.accelerator.memory_bytes
    used = None
    # This process would trace programs for the CPU. Those for the TPU have fused attention,
    # which the estimates for GPUs leave out.
    with traced_for("tpu"):
        config, choice = fit.choose_fsdp(config, topology.num_devices, memory_bytes)
        found = step_cost.estimated_cost(
            config, topology, efficiency=efficiency, flops_per_image=flops_per_image
        )
        found["mesh_choice"] = choice
        if compile_step:
            line = f"{config.stage.name}: compiling for {topology.name} ..."
            print(line, file=sys.stderr, flush=True)
            found["compiled"] = step_cost.compiled_cost(config, topology)
            found["fits"], used = found["compiled"]["fits"], found["compiled"].get("used_bytes")
        if not found["fits"]:
            found["advice"] = fit.advice(config, topology.num_devices, memory_bytes, used)
    return found
