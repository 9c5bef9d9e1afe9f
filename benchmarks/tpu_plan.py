"""What the paper's four models need on TPU slices, by the TPU's own compiler.

    pip install -e '.[tpu]' && python benchmarks/tpu_plan.py --write

runs `python -m cascaded_diffusion.plan --config=configs/X.py --topology=T --json` for each model
and slice of 256 chips, four minutes or more each on two cores, and prints a table. No TPU is
touched. `--write` stores it, and what was found so far, in benchmarks/results/: run again, it
goes on with what is missing. Each row names the commit it was compiled at; to have it compiled
again, remove its line from benchmarks/results/tpu_plan.jsonl.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

import machine

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODELS = ("base32", "sr64", "sr128", "sr256")
TOPOLOGIES = ("v5e:16x16", "v4:4x8x8", "v5p:4x8x8", "v6e:16x16")
RESULTS = ROOT / "benchmarks" / "results"


def plan(model: str, topology: str, *, compiles: bool) -> dict[str, Any]:
    """The JSON of one plan."""
    command = [sys.executable, "-m", "cascaded_diffusion.plan", "--json"]
    command += ["--compile" if compiles else "--nocompile"]
    # One division for all, to be compared; left open, it would be the smallest that fits.
    command += [f"--config=configs/{model}.py", f"--topology={topology}", "--config.mesh.fsdp=8"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode not in (0, 1):  # 1: does not fit
        raise SystemExit(f"{' '.join(command)}: exit code {result.returncode}")
    return json.loads(result.stdout)


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    plan_found = found["plan"]
    on = plan_found["on_topology"]
    compiled = on.get("compiled", {})
    mesh = f"{on['mesh']['data']} x {on['mesh']['fsdp']}"
    arguments = f"{on['state_bytes_per_device'] / 1e9:.2f}"
    if "used_bytes" in compiled:
        used = f"{compiled['used_bytes'] / 1e9:.1f}"
    elif compiled:
        used = "more"
    else:
        estimate = on["state_bytes_per_device"] + on["activation_bytes_per_device"]
        used = f"{estimate / 1e9:.1f} (estimate)"
    secs = f"{compiled['compile_secs']:.0f}" if compiled else "not compiled"
    # Rows of earlier commits have none.
    bounds = compiled.get("roofline_secs", {}).values()
    roofline = f"{max(bounds):.2f} to {sum(bounds):.2f}" if bounds else ""
    sent = on["collectives"]
    gathered = sent.get("all-gather", {}).get("bytes", 0) / 1e9
    remat = on["remat"] or "none"
    if again := compiled.get("recomputed"):
        remat += f"; {again} values by XLA"
    fits = "yes" if on["fits"] else f"no: {on['advice'] or 'a larger slice'}"
    return (
        f"| {plan_found['name']} | {on['topology']} | {mesh} | {on['batch_size']} |"
        f" {remat} | {arguments} | {used} | {on['memory_bytes'] / 1e9:.1f} |"
        f" {fits} | {gathered:.2f} | {on['model_flops_per_step'] / 1e15:.2f} |"
        f" {on['step_secs']:.2f} | {roofline} | {on['days']:.1f} | {on['chip_hours']:,.0f} |"
        f" {secs} | {found['commit']} |"
    )


def main() -> None:
    """Plans every model on every slice and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--nocompile", action="store_true", help="estimate what is missing")
    args = parser.parse_args()
    kept = RESULTS / "tpu_plan.jsonl"
    commit = machine.describe().rpartition("commit ")[2]
    found = []
    if args.write and kept.exists():
        found = [json.loads(line) for line in kept.read_text().splitlines()]
    for topology in args.topologies.split(","):
        for model in MODELS:
            if any(r["model"] == model and r["topology"] == topology for r in found):
                continue
            record = {"model": model, "topology": topology, "commit": commit}
            found.append({**record, "plan": plan(model, topology, compiles=not args.nocompile)})
            print(row(found[-1]), flush=True)
            # An estimate takes seconds, and is not kept: one day it is compiled.
            if args.write and not args.nocompile:
                kept.write_text("".join(json.dumps(r) + "\n" for r in found))
    lines = [
        "# The paper's models on TPU slices",
        "",
        "| model | slice | data x fsdp | batch | remat | state a chip, GB | used a chip, GB |"
        " there is, GB | fits | gathered a step, GB | model PFLOP a step | s a step at 40 % |"
        " s a step by roofline | days | chip-hours | compiled in, s | commit |",
        "|" + "---|" * 17,
        *map(row, found),
        "",
        "Used: arguments and temporaries of the training step as the TPU's own compiler (libtpu)"
        " lays them out, with its efforts turned down. FLOPs: a multiply-add is two, the backward"
        " pass twice the forward. Time: the maker's peak in bfloat16 at an *assumed* efficiency of"
        " 40 %. Roofline: the compiler's own FLOPs at the peak, its bytes accessed at the memory's"
        " bandwidth, and collectives at the links'; from the largest of the three to their sum."
        " Nothing here has run on a TPU.",
        f"Compiled on: {machine.describe()}.",
        "Command: `python benchmarks/tpu_plan.py --write`.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        (RESULTS / "tpu_plan.md").write_text(text)


if __name__ == "__main__":
    main()
