"""The paper's claims on photographs: one command per table, which resumes where it was stopped.

    python -m cascaded_diffusion.prepare --config=configs/cifar10_base16.py
    python benchmarks/ablations/run.py --table=augmentation --seeds=3

Every row trains its stages for the same FLOPs, samples them, and measures the samples in the
features of a ResNet that was trained on the real images, and with --inception_weights=FILE by FID,
too. Rows are stored as they are finished in benchmarks/results/ablations/TABLE_BUDGET.json; run
again, the command makes what is missing. With --minutes=9 it stops in time. With --write the
table goes into the docs once it is complete. It needs JAX, Flax, Optax, Orbax and what reads the
images; prepared shards need array_record and grain.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402
import pages  # noqa: E402
from store import Results, check_same, digest_of_code  # noqa: E402
from tables import BUDGETS, TABLES, Budget, Row, Table  # noqa: E402

from cascaded_diffusion.commands import entry, jax_setup  # noqa: E402
from cascaded_diffusion.config.schema import to_dict  # noqa: E402
from cascaded_diffusion.errors import UserError  # noqa: E402
from cascaded_diffusion.files.json_files import Record  # noqa: E402
from cascaded_diffusion.files.whole import write_whole  # noqa: E402
from cascaded_diffusion.runtime import pictures  # noqa: E402

if TYPE_CHECKING:
    from lab import Lab

RESULTS = ROOT / "benchmarks" / "results" / "ablations"
# The exit code of a table that is not complete: the same command goes on.
EXIT_INCOMPLETE = 75


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", required=True, choices=sorted(TABLES))
    parser.add_argument("--budget", default="cpu", choices=sorted(BUDGETS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--flops", type=float, help="of a row's training, instead of the budget's")
    parser.add_argument("--num_samples", type=int, help="of a row, instead of the budget's")
    parser.add_argument("--seconds", type=float, help="of a row's training, where time bounds it")
    parser.add_argument("--torch_python", help="with PyTorch and diffusers, for the table peer")
    parser.add_argument("--inception_weights", help="a file of FID's network, for the FID besides")
    parser.add_argument("--minutes", type=float, help="after which it stops; default: never")
    parser.add_argument("--data_name", help="config.data.name: folder, npz, ...")
    parser.add_argument("--data_path", help="config.data.path: where the images are")
    parser.add_argument("--prepared_dir", help="config.data.prepared_dir: where the shards are")
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "RUN_ablations")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument(
        "--write", action="store_true", help="the complete table goes into docs/results.md"
    )
    return parser.parse_args(argv[1:])


def budget_of(flags: argparse.Namespace) -> Budget:
    """The budget as the flags change it. Raises UserError for a number that cannot be."""
    for name, least in (
        ("seeds", 1),
        ("flops", 1),
        ("num_samples", 2),
        ("seconds", 1),
        ("minutes", 0),
    ):
        value = getattr(flags, name)
        if value is not None and not (value >= least and value > 0):
            expected = f"at least {least}" if least else "more than 0"
            raise UserError(f"--{name}={value}: expected {expected}")
    names = ("flops", "num_samples", "seconds")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name)}
    return dataclasses.replace(BUDGETS[flags.budget], **given)


def fill(results: Results, lab: Lab, table: Table, budget: Budget, seeds: int) -> bool:
    """Makes the rows that are missing, seed by seed, and the picture; False if time ran out."""
    from lab import OutOfTime

    rows = table.rows(budget)
    todo = [(s, r) for s in range(seeds) for r in rows if not results.has(r.label, s)]
    try:
        for i, (seed, row) in enumerate(todo):
            missing = f"{len(todo) - i} rows are"
            print(f"row {i + 1} of {len(todo)}: {row.label}, seed {seed}", flush=True)
            results.add(measured(row, seed, results, lab, table, budget))
        missing = "the picture is"
        if table.shown:
            path = results.path.with_name(f"{results.path.stem}_samples.png")
            cascades = [row for row in rows if row.models]
            pictures.save_png(path, lab.shown(cascades[: table.shown]))
    except OutOfTime:
        print(f"out of time: {missing} missing; run it again", flush=True)
        return False
    return True


def measured(
    row: Row, seed: int, results: Results, lab: Lab, table: Table, budget: Budget
) -> Record:
    """A row's record."""
    start = time.monotonic()
    samples = lab.samples(row, seed)
    if table.neighbours:
        shown = row.images == "cascade" and seed == 0
        picture = results.path.with_suffix(".png") if shown else None
        scores = lab.scorer.neighbours(samples, picture)
    else:
        cas = table.cas and seed < budget.cas_seeds
        scores = lab.scorer.scores(samples, cas=cas, seed=seed)
    print(f"  {', '.join(f'{k} {v:.4g}' for k, v in scores.items())}", flush=True)
    return {
        "label": row.label,
        "seed": seed,
        "scores": scores,
        "num_samples": len(samples.images),
        "evaluations": samples.evaluations,
        "flops_per_sample": samples.flops,
        "wall_s": round(time.monotonic() - start, 1),
    }


def main(argv: Sequence[str]) -> int:
    """Makes a table, or goes on with it. Returns the exit code."""
    flags = _parse(argv)
    budget, table = budget_of(flags), TABLES[flags.table]
    deadline = time.monotonic() + 60 * flags.minutes if flags.minutes else float("inf")
    jax = jax_setup.set_up_jax()
    from lab import Lab
    from real_images import Data

    code, versions = digest_of_code(ROOT), machine.versions()
    data = Data(flags.data_name, flags.data_path, flags.prepared_dir)
    device = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        device = machine.processor()  # what JAX calls "cpu" has many kinds
    device = f"{jax.device_count()} {device}"
    lab = Lab(
        budget,
        table,
        data,
        flags.workdir,
        made_by=f"{code}, {device}, {versions}",
        deadline=deadline,
        torch_python=flags.torch_python,
        inception_weights=flags.inception_weights,
    )
    lab.check(table.rows(budget))
    about = {
        "table": flags.table,
        "budget": budget.name,
        "settings": to_dict(budget),
        "code": code,
        "device": device,
        "versions": versions,
        "data": {role: split.identity for role, split in lab.images.items()},
    }
    name = pages.name_of(about)
    path = flags.results / f"{name}.json"
    check_same(path, about)  # before the network whose features measure is trained
    about |= {
        "features": lab.scorer.identity,
        "features_about": f"a classifier ({budget.network}) that recognises"
        f" {100 * lab.scorer.network.accuracy:.1f} % of the held-out real images",
        "machine": machine.describe(),
        "commit": machine.commit(),
        "command": shlex.join(["python", os.path.relpath(__file__, ROOT), *argv[1:]]),
    }
    results = Results(path, about)
    complete = fill(results, lab, table, budget, flags.seeds)
    if results.rows:
        text = pages.table_of(results.about, results.rows)
        print(f"\n{text}\n")
        plot = pages.plot_of(results.about, results.rows)
        if plot is not None:
            write_whole(path.with_suffix(".png"), plot)
        if flags.write and complete:
            pages.write_into(ROOT / "docs" / "results.md", name, text)
    return 0 if complete else EXIT_INCOMPLETE


if __name__ == "__main__":
    entry.run(main)
