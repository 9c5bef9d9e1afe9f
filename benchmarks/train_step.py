"""Compile time and speed of a config's training step, with and without the CPU flag.

    python benchmarks/train_step.py --config=configs/mnist_base16.py

measures, each in a fresh process and without a compilation cache: the seconds to
make the initial state, to trace and to compile the step, and the median step. The
rows are measured in turn, `--repeats` times over, so that a slow spell of the machine
meets all of them; ratios are within one run. `--write` stores the table in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import machine

from cascaded_diffusion.commands import config_flags, jax_setup

ROOT = pathlib.Path(__file__).resolve().parents[1]
VARIANTS = {
    "XLA's defaults": "",
    "YNN fusions off, steps in the calling thread (ours)": jax_setup.CPU_FLAG,
    "ours, fast math": f"{jax_setup.CPU_FLAG} --xla_cpu_enable_fast_math=true",
}


def measure_here(config_path: str, steps: int) -> dict[str, float]:
    """One measurement, in this process, with the XLA_FLAGS it was started with.

    With none it is JAX as it comes; else what the binaries set besides is set here, too.
    """
    import jax
    import numpy as np

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.config.run_checks import run_config_from
    from cascaded_diffusion.runtime import mesh as mesh_lib
    from cascaded_diffusion.training import step as step_lib

    if os.environ["XLA_FLAGS"]:
        jax_setup.set_up_jax()
    config = run_config_from(config_flags.load_config_file(pathlib.Path(), config_path))
    mesh = mesh_lib.build_mesh(config.mesh)
    stage, train = build_stage(config.stage), config.train
    size = config.data.resolution
    start = time.perf_counter()
    state = jax.block_until_ready(step_lib.init_state(stage, train, mesh))
    init_secs = time.perf_counter() - start

    start = time.perf_counter()
    compiled = step_lib.compile_train_step(
        stage, train, mesh, state, (size, size, config.stage.channels)
    )
    compile_secs = time.perf_counter() - start
    rng = np.random.default_rng(0)
    records = mesh_lib.global_batch(
        {
            "image": rng.integers(
                0, 256, (train.batch_size, size, size, config.stage.channels), np.uint8
            ),
            "label": np.zeros(train.batch_size, np.int32),
        },
        mesh,
    )
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, records)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return {
        "init_secs": init_secs,
        "compile_secs": compile_secs,
        "step_secs": statistics.median(times[2:]),
        "flops": step_lib.flops_per_step(stage, train.batch_size),
        "batch_size": train.batch_size,
    }


def main() -> None:
    """Measures every variant and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure_here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_here:
        print(json.dumps(measure_here(args.config, args.steps)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name, flags in VARIANTS.items():
            env = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
            command = [sys.executable, __file__, "--measure_here", f"--config={args.config}"]
            command.append(f"--steps={args.steps}")
            result = subprocess.run(
                command, env=env, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            results[name].append(json.loads(result.stdout.splitlines()[-1]))
    best = {
        name: {key: min(r[key] for r in rows) for key in rows[0]} for name, rows in results.items()
    }
    reference = next(iter(best.values()))
    lines = [
        f"# Training step of {args.config}",
        "",
        "| flags | initial state, s | trace + compile, s | step, ms | images/s | GFLOP/s | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in best.items():
        lines.append(
            f"| {name} | {row['init_secs']:.1f} | {row['compile_secs']:.1f} |"
            f" {1e3 * row['step_secs']:.0f} | {row['batch_size'] / row['step_secs']:.0f} |"
            f" {row['flops'] / row['step_secs'] / 1e9:.0f} |"
            f" {reference['step_secs'] / row['step_secs']:.2f}x |"
        )
    lines += [
        "",
        f"Batch {reference['batch_size']:.0f}; {reference['flops'] / 1e9:.1f} GFLOP a step, a"
        f" multiply-add counted as two; best of {args.repeats} processes each, no compilation"
        " cache.",
        f"Measured on: {machine.describe()}.",
        f"Command: `python benchmarks/train_step.py --config={args.config} --write`.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        name = pathlib.Path(args.config.partition(":")[0]).stem
        path = ROOT / "benchmarks" / "results" / f"train_step_{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
