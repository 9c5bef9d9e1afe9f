"""Plans as text: a table with one column per stage, and a stage on a topology in lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def table(plans: Sequence[dict[str, Any]]) -> str:
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


def described(plan: dict[str, Any]) -> str:
    """The lines about a stage on its topology."""
    on = plan["on_topology"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in on["mesh"].items())
    compiled = on.get("compiled")
    sent = ", ".join(
        f"{kind} {t['count']} of {t['bytes'] / 1e9:.3g} GB" for kind, t in on["collectives"].items()
    )
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
    lines += [
        f"  collectives a step   {sent or 'none'}",
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
