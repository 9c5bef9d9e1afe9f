"""Throughput of sampling a whole cascade: images per second for every (sampler, steps).

    python benchmarks/sampling.py --config=configs/mnist_cascade32.py

builds the cascade's stages with random weights (the speed does not depend on them) and
samples one batch with all stages on the same sampler and number of steps, the labels,
levels, guidance and batch size being the config's. Compilation is left out and stated
beside. The rows are measured in turn, `--repeats` times over; the best counts. `--write`
stores the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence

import machine
import numpy as np

from cascaded_diffusion.commands import config_flags, entry, jax_setup
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain, run_config_from
from cascaded_diffusion.config.schema import sampler_named

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main(argv: Sequence[str]) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=pathlib.Path)
    parser.add_argument("--samplers", default="ddim,ancestral,dpmpp_2m,heun")
    parser.add_argument("--num_steps", default="4,8,16,32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(list(argv)[1:])
    folder, file = args.config.parent, args.config.name
    config = cascade_config_from(config_flags.load_config_file(folder, file))
    section = config.cascade
    configs = [
        run_config_from(config_flags.load_config_file(folder, name)).stage
        for name in section.configs
    ]
    check_chain(section, configs)

    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.cascade.cascade import Cascade
    from cascaded_diffusion.evaluation.samples import generate
    from cascaded_diffusion.runtime.mesh import build_mesh

    mesh = build_mesh(config.mesh)
    stages = [build_stage(c) for c in configs]
    params = [jax.jit(s.init)(jax.random.key(i)) for i, s in enumerate(stages)]
    indices = np.arange(section.batch_size)
    rows = {}
    for name in args.samplers.split(","):
        for steps in map(int, args.num_steps.split(",")):
            samplers = [
                dataclasses.replace(sampler_named(name, s, c), num_steps=steps)
                for s, c in zip(section.samplers, configs, strict=True)
            ]
            cascade = Cascade(stages=stages, samplers=samplers, truncated=section.truncated)
            sample = generate.make_cascade_sampler(cascade, section.aug_levels, seed=0, mesh=mesh)

            def run(sample: generate.BatchSampler = sample) -> float:
                start = time.perf_counter()
                jax.block_until_ready(sample(params, indices))
                return time.perf_counter() - start

            rows[name, steps] = (run, run(), [])
    for _ in range(args.repeats):
        for run, _, times in rows.values():
            times.append(run())

    scales = ", ".join(f"{s.guidance_scale:g}" for s in section.samplers)
    lines = [
        f"# Sampling {args.config.as_posix()}: whole cascades a second",
        "",
        "| sampler | steps per stage | images/s | s per batch | first batch, with compilation, s |",
        "|---|---|---|---|---|",
    ]
    for (name, steps), (_, first, times) in rows.items():
        best = min(times)
        lines.append(
            f"| {name} | {steps} | {section.batch_size / best:.1f} | {best:.2f} | {first:.1f} |"
        )
    lines += [
        "",
        f"{' -> '.join(f'{c.resolution} px' for c in configs)}, batch {section.batch_size},"
        f" guidance {scales} per stage (a scale other than 1 evaluates the network twice);"
        f" best of {args.repeats}. First batches may find their programs in the compilation cache.",
        f"Measured on: {machine.describe()}; devices: {jax.device_count()}"
        f" {jax.default_backend()}.",
        f"Command: `python benchmarks/sampling.py --config={args.config.as_posix()} --write`.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        (ROOT / "benchmarks" / "results" / f"sampling_{args.config.stem}.md").write_text(text)
    return 0


if __name__ == "__main__":
    entry.run(main)
