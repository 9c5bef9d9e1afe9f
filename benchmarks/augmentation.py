"""What conditioning augmentation does for the demo cascade: the paper's section 4.3, small.

    python benchmarks/augmentation.py --runs=RUN

needs the demo's runs (./launch/demo.sh). It trains the super-resolution stage once
more on the same budget without augmentation (RUN/sr32_no_augment), then enlarges
the same base samples with both and prints, for every aug_level and for truncated
and non-truncated sampling, fd_classifier of 1,000 samples against the real training
images, and how many are recognised as their label. The table is also written to
benchmarks/results/augmentation.md.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
from typing import NoReturn

import machine
import numpy as np

from cascaded_diffusion.commands import entry, jax_setup
from cascaded_diffusion.commands.run_images import real_split
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime.run_folder import RunFolder

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4)


def train_without_augmentation(folder: RunFolder) -> None:
    """The ablation model: same config, same budget, through the product's own commands."""
    for command in (
        ["main", "--config=configs/mnist_sr32.py:no_augment", f"--workdir={folder.path}"],
        ["evaluate", f"--workdir={folder.path}"],
    ):
        argv = [sys.executable, "-m", f"cascaded_diffusion.{command[0]}", *command[1:]]
        print("$", " ".join(argv), flush=True)
        subprocess.run(argv, cwd=ROOT, check=True)


def _no_inception(resize: str) -> NoReturn:
    raise UserError(f"the demo's features are a classifier's, not Inception's ({resize})")


def main() -> None:
    """Trains what is missing, samples, prints the table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", required=True, type=pathlib.Path)
    runs = parser.parse_args().runs.resolve()
    folders = {name: RunFolder(runs / name) for name in ("base16", "sr32", "sr32_no_augment")}
    for name in ("base16", "sr32"):
        folders[name].chosen()  # complains if the demo has not run
    train_without_augmentation(folders["sr32_no_augment"])

    jax_setup.set_up_jax()
    from cascaded_diffusion.cascade.cascade import Cascade
    from cascaded_diffusion.data.sources import load_source
    from cascaded_diffusion.evaluation.evaluator import build_evaluator, build_extractor
    from cascaded_diffusion.evaluation.measure import metric_name
    from cascaded_diffusion.evaluation.samples import generate
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.runtime.mesh import build_mesh

    config: RunConfig = folders["sr32"].read_config()
    mesh = build_mesh(config.mesh)
    train, held_out = (
        real_split(config, split, load_source(config.data, split, config.stage))
        for split in (config.data.train_split, config.data.eval_split)
    )
    extractor = build_extractor(
        config, folders["sr32"], train, held_out, mesh, load_inception=_no_inception
    )
    evaluator = build_evaluator(config, folders["sr32"], extractor, {"train": train})
    fd, accuracy = (metric_name(name, extractor.name, 1000) for name in ("fid", "accuracy"))
    labels = generate.labels_of(np.arange(1000), 10)
    models = {name: load_trained(folder, mesh) for name, folder in folders.items()}
    base = models["base16"]

    def measure(name: str, levels: tuple[float, ...], truncated: bool) -> list[dict[str, float]]:
        chain = [base, models[name]]
        cascade = Cascade(
            stages=[t.stage for t in chain],
            samplers=[t.stage.config.sampler for t in chain],
            truncated=truncated,
        )
        rows = []
        for level in levels:
            images = generate.generate(
                generate.make_cascade_sampler(cascade, [level], seed=0, mesh=mesh),
                [t.params for t in chain],
                num_samples=1000,
                batch_size=200,
                label=f"{name}, level {level}, {'truncated' if truncated else 'non-truncated'}",
            )[-1]
            rows.append(evaluator.scores(images, labels))
        return rows

    non_truncated = measure("sr32", LEVELS, False)
    truncated = measure("sr32", LEVELS, True)
    (ablation,) = measure("sr32_no_augment", (0.0,), False)
    others = held_out.whole(32)
    floor = evaluator.scores(others.images, others.labels)

    def cell(row: dict[str, float]) -> str:
        return f"{row[fd]:.2f} / {100 * row[accuracy]:.1f} %"

    lines = [
        "| aug_level | non-truncated | truncated |",
        "|---|---|---|",
        *(
            f"| {level:g} | {cell(a)} | {cell(b)} |"
            for level, a, b in zip(LEVELS, non_truncated, truncated, strict=True)
        ),
        f"| trained without augmentation | {cell(ablation)} | |",
        f"| the 1,000 held-out real digits | {cell(floor)} | |",
    ]
    sampler = base.stage.config.sampler
    text = "\n".join(
        [
            "# fd_classifier of 1,000 cascade samples / recognised as their label",
            "",
            *lines,
            "",
            f"Base samples: {sampler.name}, {sampler.num_steps} steps, guidance"
            f" {sampler.guidance_scale:g}; reference {evaluator.reference}; the same seeds in every"
            " row, the same base samples in every row that is not truncated.",
            f"Measured on: {machine.describe()}.",
            "Command: `python benchmarks/augmentation.py --runs=RUN` after `./launch/demo.sh`.",
            "",
        ]
    )
    print(text)
    write_whole(ROOT / "benchmarks" / "results" / "augmentation.md", text.encode())


if __name__ == "__main__":
    entry.run(lambda argv: main() or 0)
