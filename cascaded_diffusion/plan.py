"""What a model costs, before it is run: nothing is allocated.

    python -m cascaded_diffusion.plan --config=configs/sr256.py
    python -m cascaded_diffusion.plan --config=configs/cascade256.py --json

Prints, for a stage or for every stage of a cascade: parameters, FLOPs of one network
evaluation for one image (a multiply-add is two), network evaluations and FLOPs of one
sample, and FLOPs of the whole training. A cascade's are the sums of its stages'.
--json prints the same as one JSON object.

    python -m cascaded_diffusion.plan --config=configs/sr256.py --topology=v5e:16x16

adds what a training step costs on a slice of accelerators: bytes per device, collectives,
seconds a step at an assumed efficiency (--efficiency), days and chip-hours to the config's
train_steps. Where config.mesh.fsdp is None, as in the paper's models, it is the smallest that
fits by estimate, as `main` takes it on the devices it finds. With the [tpu] extra installed the
step is also compiled by the TPU's own compiler, some minutes a stage (--nocompile leaves that
out), to say whether it fits, else what to change. Exit code 1 if it does not.

FLOPs are those of convolutions and matrix products. Training is counted as three
forward passes, without rematerialization.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from cascaded_diffusion.commands import config_flags, entry, flag_checks, jax_setup
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain, run_config_from
from cascaded_diffusion.config.schema import RunConfig, SamplerConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning import plan_topology
from cascaded_diffusion.planning.topologies import Topology, parse_topology, set_up_tpu_compiler


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "a stage's or a cascade's config file")
    flags.DEFINE_string(
        "topology", None, "a slice, as v5e:16x16, v5p:4x4x8 or h100:8", flag_values=fv
    )
    flags.DEFINE_float(
        "efficiency", 0.4, "share of the peak FLOP/s that is assumed", flag_values=fv
    )
    flags.DEFINE_bool(
        "compile", None, "compile for the topology; default: if libtpu is there", flag_values=fv
    )
    flags.DEFINE_bool("json", False, "print one JSON object instead of a table", flag_values=fv)
    config_flags.parse(fv, argv, __doc__)
    flag_checks.require(fv, "config")
    values = config_flags.config_values(fv, argv)
    topology = _topology(fv)
    if "cascade" not in values:
        config = run_config_from(values)
        jax_setup.set_up_jax(platform="cpu")
        plans = [stage_plan(config, config.stage.sampler)]
        configs = [config]
    else:
        section = cascade_config_from(values).cascade
        folder = pathlib.Path(config_flags.config_path(argv)).parent
        configs = [
            run_config_from(config_flags.load_config_file(folder, name)) for name in section.configs
        ]
        check_chain(section, [c.stage for c in configs])
        jax_setup.set_up_jax(platform="cpu")
        plans = []
        for i, (config, sampler) in enumerate(zip(configs, section.samplers, strict=True)):
            is_cut = (
                section.truncated and i + 1 < len(configs) and configs[i + 1].stage.has_aug_level
            )
            stop_t = section.aug_levels[i] if is_cut else 0.0
            plans.append(stage_plan(config, sampler, stop_t=stop_t))
    from cascaded_diffusion.networks.kernels.execution import traced_for

    for config, plan in zip(configs, plans, strict=True):
        if topology is not None:
            # What this process would trace for itself is a CPU's program. GPUs' estimates leave
            # their fused attention out.
            with traced_for("tpu"):
                plan["on_topology"] = _on_topology(config, plan, topology, fv)
    whole = plans[0] if "cascade" not in values else _sum_of(plans, argv)
    if fv.json:
        print(json.dumps(whole))
    else:
        print(_table(plans if "cascade" not in values else [*plans, whole]))
        if topology is not None:
            for plan in plans:
                print(f"\n{_describe(plan)}")
    fits = [plan["on_topology"]["fits"] for plan in plans if "on_topology" in plan]
    return 0 if all(fits) else 1


def _topology(fv: flags.FlagValues) -> Topology | None:
    if not 0.001 <= fv.efficiency <= 1:
        raise UserError(f"--efficiency={fv.efficiency:g}: expected a share of the peak, 0.001 to 1")
    if fv.topology is None:
        return None
    topology = parse_topology(fv.topology)
    if fv.compile and not topology.is_tpu:
        raise UserError(
            f"--compile: expected a TPU's --topology, not {topology.name}: no compiler for others"
            " works without them"
        )
    if fv.compile and not plan_topology.has_tpu_compiler():
        raise UserError("--compile: libtpu is not installed; `pip install -e '.[tpu]'`")
    if topology.is_tpu and fv.compile is not False and plan_topology.has_tpu_compiler():
        set_up_tpu_compiler(topology)
    return topology


def _on_topology(
    config: RunConfig, plan: dict[str, Any], topology: Topology, fv: flags.FlagValues
) -> dict[str, Any]:
    memory = topology.accelerator.memory_bytes
    config, choice = plan_topology.divided(config, topology.num_devices, memory)
    found = plan_topology.topology_plan(
        config, topology, efficiency=fv.efficiency, flops_per_image=plan["flops_per_image"]
    )
    found["mesh_choice"] = choice
    used = None
    if topology.is_tpu and fv.compile is not False and plan_topology.has_tpu_compiler():
        name = config.stage.name
        print(f"{name}: compiling for {topology.name} ...", file=sys.stderr, flush=True)
        found["compiled"] = plan_topology.compiled_plan(config, topology)
        found["fits"], used = found["compiled"]["fits"], found["compiled"].get("used_bytes")
    if not found["fits"]:
        found["advice"] = plan_topology.advice(config, topology.num_devices, memory, used)
    return found


def _describe(plan: dict[str, Any]) -> str:
    """A stage on its topology, in lines."""
    on = plan["on_topology"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in on["mesh"].items())
    compiled = on.get("compiled")
    lines = [on["mesh_choice"]] if on["mesh_choice"] else []
    lines += [
        f"{plan['name']} on {on['topology']}: {on['devices']} devices, {mesh}, batch"
        f" {on['batch_size']} ({on['batch_size'] / on['devices']:g} a device), remat"
        f" {on['remat'] or 'none'}, {on['accumulation_steps']} part(s) a step",
        f"  memory of a device   {on['memory_bytes'] / 1e9:.1f} GB; estimated: state"
        f" {on['state_bytes_per_device'] / 1e9:.2f}, activations and gathered parameters"
        f" {on['activation_bytes_per_device'] / 1e9:.2f}",
    ]
    if compiled is not None and "used_bytes" in compiled:
        lines.append(
            f"  by the TPU compiler  {compiled['used_bytes'] / 1e9:.2f} GB: arguments"
            f" {compiled['argument_bytes'] / 1e9:.2f}, temporaries"
            f" {compiled['temporary_bytes'] / 1e9:.2f}; compiled in"
            f" {compiled['compile_secs']:.0f} s"
        )
    elif compiled is not None:
        lines.append(f"  by the TPU compiler  {compiled['problem']}")
    for title, source in (("collectives a step", on), ("the compiler's", compiled or {})):
        if "collectives" in source:
            sent = ", ".join(
                f"{kind} {t['count']} of {t['bytes'] / 1e9:.3g} GB"
                for kind, t in source["collectives"].items()
            )
            lines.append(f"  {title:<20} {sent or 'none'}")
        elif "collectives_problem" in source:
            lines.append(f"  {title:<20} not counted: {source['collectives_problem']}")
    lines += [
        f"  time                 {on['step_secs']:.3g} s a step at {on['assumed_efficiency']:.0%}"
        f" (assumed) of {on['peak_flops'] / 1e15:.3g} PFLOP/s;"
        f" collectives {on['collective_secs']:.3g} s if nothing overlaps",
        f"  whole training       {on['days']:.1f} days, {on['chip_hours']:,.0f} chip-hours",
    ]
    verdict = "fits" if on["fits"] else "does NOT fit"
    if not on["fits"]:
        verdict += f"; by estimate it would with {on['advice'] or 'a larger slice only'}"
    by = "the TPU's compiler"
    if not compiled:
        by = "estimate, activations counted twice to be safe; the [tpu] extra would compile it"
    return "\n".join([*lines, f"  => {verdict} (by {by})"])


_SUMMED = (
    "parameters",
    "flops_per_image",
    "calls_per_sample",
    "flops_per_sample",
    "training_flops",
)


def _sum_of(stages: Sequence[dict[str, Any]], argv: Sequence[str]) -> dict[str, Any]:
    sums = {key: sum(stage[key] for stage in stages) for key in _SUMMED}
    return {
        "name": pathlib.Path(config_flags.config_path(argv)).stem,
        **sums,
        "stages": list(stages),
    }


def stage_plan(config: RunConfig, sampler: SamplerConfig, *, stop_t: float = 0.0) -> dict[str, Any]:
    """The costs of one stage, sampled by `sampler` from t = 1 to `stop_t`."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.networks.flops import count_flops

    stage, train = build_stage(config.stage), config.train
    params = jax.eval_shape(stage.init, jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    inputs = jax.eval_shape(lambda: stage.example_inputs(batch_size=1))
    flops = count_flops(stage.network.apply, params, *inputs)
    evaluations = stage.evaluations(sampler, stop_t=stop_t)
    images = train.batch_size * train.train_steps
    # Parameters, their EMAs and Adam's two moments, float32.
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


_COLUMNS = (
    ("name", "stage", "{}"),
    ("resolution", "px", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("state_bytes", "state, GB", "{:.1f}"),
    ("flops_per_image", "GFLOP per evaluation", "{:,.1f}"),
    ("sampler", "sampler", "{}"),
    ("calls_per_sample", "evaluations per sample", "{:,}"),
    ("flops_per_sample", "TFLOP per sample", "{:,.2f}"),
    ("training_images", "training images", "{:.3g}"),
    ("training_flops", "training FLOP", "{:.2e}"),
)
_UNITS = {"state_bytes": 1e9, "flops_per_image": 1e9, "flops_per_sample": 1e12}


def _table(plans: Sequence[dict[str, Any]]) -> str:
    """One row per quantity, one column per stage."""
    rows = [[title] + [_cell(plan, key, form) for plan in plans] for key, title, form in _COLUMNS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def _cell(plan: dict[str, Any], key: str, form: str) -> str:
    if key not in plan:
        return ""
    value = plan[key]
    return form.format(value / _UNITS[key] if key in _UNITS else value)


if __name__ == "__main__":
    entry.run(main)
