"""What a stage or a cascade costs before it is run, as numbers and as text. Nothing is allocated.

FLOPs are those of convolutions and matrix products; a multiply-add is two. Training is counted
as three forward passes, without rematerialization.
"""

import functools
from collections.abc import Sequence

import jax

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import CascadeSection, RunConfig, SamplerConfig, StageConfig
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.networks.flops import count_flops
from cascaded_diffusion.planning.topologies import parse_topology

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


@functools.cache
def _network_cost(config: StageConfig) -> tuple[int, int]:
    stage = build_stage(config)
    shapes = stage.shapes()
    parameters = int(sum(leaf.size for leaf in jax.tree.leaves(shapes[0])))
    return parameters, count_flops(stage.network.apply, *shapes)


def stage_plan(config: RunConfig, sampler: SamplerConfig, *, stop_t: float = 0.0) -> Record:
    """The costs of one stage, sampled by `sampler` from t = 1 to `stop_t`."""
    train, (parameters, flops) = config.train, _network_cost(config.stage)
    evaluations = build_stage(config.stage).evaluations(sampler, stop_t=stop_t)
    images = train.batch_size * train.train_steps
    return {
        "name": config.stage.name,
        "resolution": config.stage.resolution,
        "parameters": parameters,
        "flops_per_image": flops,
        "sampler": sampler.name,
        "num_steps": sampler.num_steps,
        "calls_per_sample": evaluations,
        "flops_per_sample": flops * evaluations,
        "training_images": images,
        "training_flops": 3 * flops * images,
        # Parameters, Adam's two moments and the EMAs, in float32.
        "state_bytes": 4 * (3 + len(train.ema_decays)) * parameters,
    }


def cascade_plans(section: CascadeSection, configs: Sequence[RunConfig]) -> list[Record]:
    """The costs of each stage of a cascade, with truncated chains counted as they run."""
    # A stage is stopped where the next one's augmentation begins, if that has a level.
    stops = [
        level if section.truncated and above.stage.has_aug_level else 0.0
        for level, above in zip(section.aug_levels, configs[1:], strict=True)
    ]
    return [
        stage_plan(config, sampler, stop_t=stop_t)
        for config, sampler, stop_t in zip(configs, section.samplers, [*stops, 0.0], strict=True)
    ]


def summed(name: str, plans: Sequence[Record]) -> Record:
    """The plan of a cascade: the sums of its stages' costs, and the stages."""
    costs = ("parameters", "flops_per_image", "calls_per_sample", "flops_per_sample")
    sums = {key: sum(stage[key] for stage in plans) for key in (*costs, "training_flops")}
    return {"name": name, **sums, "stages": list(plans)}


def table(plans: Sequence[Record]) -> str:
    """One row per quantity, one column per stage."""

    def cell(plan: Record, key: str, form: str) -> str:
        if key not in plan:
            return ""
        return form.format(plan[key] / _UNITS[key] if key in _UNITS else plan[key])

    rows = [[title] + [cell(plan, key, form) for plan in plans] for key, title, form in _COLUMNS]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([title.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for title, *cells in rows
    )


def described(plan: Record) -> str:
    """The lines about a stage on its topology."""
    on = plan["on_topology"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in on["mesh"].items())
    compiled = on.get("compiled", {})
    sent = ", ".join(
        f"{kind} {t['count']} of {t['bytes'] / 1e9:.3g} GB" for kind, t in on["collectives"].items()
    )
    slower = f", bfloat16's peak: {on['dtype']} takes longer" * (on["dtype"] != "bfloat16")
    lines = [on["mesh_choice"]] if on["mesh_choice"] else []
    lines += [
        f"{plan['name']} on {on['topology']}: {on['devices']} devices, {mesh}, batch"
        f" {on['batch_size']} ({on['batch_size'] / on['devices']:g} a device), remat"
        f" {on['remat'] or 'none'}, {on['accumulation_steps']} part(s) a step",
        f"  memory of a device   {on['memory_bytes'] / 1e9:.1f} GB for JAX; estimated: state"
        f" {on['state_bytes_per_device'] / 1e9:.2f}, activations and gathered parameters"
        f" {on['activation_bytes_per_device'] / 1e9:.2f}",
    ]
    if "used_bytes" in compiled:
        lines.append(
            f"  by the TPU compiler  {compiled['used_bytes'] / 1e9:.2f} GB: arguments"
            f" {compiled['argument_bytes'] / 1e9:.2f}, temporaries"
            f" {compiled['temporary_bytes'] / 1e9:.2f}; compiled in"
            f" {compiled['compile_secs']:.0f} s"
        )
        if compiled["recomputed"]:
            lines.append(
                f"                       to fit, it computes {compiled['recomputed']} values again;"
                " a larger config.mesh.fsdp may save them"
            )
        secs = compiled["roofline_secs"]
        lines.append(
            f"  roofline             {max(secs.values()):.3g} s a step: computing"
            f" {secs['compute']:.3g} ({compiled['flops'] / 1e12:.3g} TFLOP), memory"
            f" {secs['memory']:.3g} ({compiled['bytes_accessed'] / 1e9:.3g} GB), links"
            f" {secs['links']:.3g}; {sum(secs.values()):.3g} s if nothing overlaps"
        )
    elif compiled:
        lines.append(f"  by the TPU compiler  {compiled['problem']}")
    lines += [
        f"  collectives a step   {sent or 'none'}",
        f"  time                 {on['step_secs']:.3g} s a step at {on['assumed_efficiency']:.0%}"
        f" (assumed) of {on['peak_flops'] / 1e15:.3g} PFLOP/s"
        f"{slower};"
        f" collectives {on['collective_secs']:.3g} s if nothing overlaps",
        f"  whole training       {on['days']:.1f} days, {on['chip_hours']:,.0f} chip-hours",
    ]
    verdict = "fits" if on["fits"] else "does NOT fit"
    if not on["fits"]:
        verdict += f"; by estimate it would with {on['advice'] or 'a larger slice only'}"
    by = "the TPU's compiler"
    if not compiled:
        by = "estimate, activations counted twice to be safe"
        if parse_topology(on["topology"]).is_tpu:
            by += "; the [tpu] extra would compile it"
    return "\n".join([*lines, f"  => {verdict} (by {by})"])
