"""Seconds from the command to the end of the first training step.

    python benchmarks/startup.py [--config=configs/mnist_base16.py] [--write]

runs the trainer for two steps, first with an empty compilation cache, then with what that left,
and prints when the trainer says that its first step is done, and what it says of compilation.
`--write` stores the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import machine

ROOT = pathlib.Path(__file__).resolve().parents[1]


def first_step(config: str, cache: str) -> tuple[float, float]:
    """Seconds to the first step, and of tracing and compiling the step."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "cascaded_diffusion.main", f"--config={config}"]
        command += [f"--workdir={workdir}/run", "--config.train.train_steps=2"]
        command += ["--config.train.warmup_steps=0", "--config.train.log_every_steps=1"]
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        out = subprocess.run(
            command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    return (
        float(re.search(r"first step done ([\d.]+) s", out)[1]),
        float(re.search(r"train step compiled in ([\d.]+) s", out)[1]),
    )


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/mnist_base16.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    cold, warm = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step(args.config, cache))
            warm.append(first_step(args.config, cache))
    lines = [
        f"# Time to the first step of {args.config}",
        "",
        "| compilation cache | first step after, s | of it tracing and compiling the step, s |",
        "|---|---|---|",
    ]
    for name, runs in (("empty", cold), ("filled", warm)):
        total, compiling = zip(*runs, strict=True)
        lines.append(
            f"| {name} | {min(total):.1f} to {max(total):.1f} |"
            f" {min(compiling):.1f} to {max(compiling):.1f} |"
        )
    lines += [
        "",
        f"From the start of the process, {args.repeats} runs each.",
        f"Measured on: {machine.describe()}.",
        f"Command: `python benchmarks/startup.py --config={args.config} --write`.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        (ROOT / "benchmarks" / "results" / "startup.md").write_text(text)


if __name__ == "__main__":
    main()
