"""How fast FID's features are, and how much of an FID is bookkeeping.

    python benchmarks/inception.py [--write]

Images per second through resizing and the Inception network, for both ways of resizing,
with random weights (the speed does not depend on them); and, without the network, the
seconds that 10,000 x 2048 features take: summing them up, the Fréchet distance, KID,
precision and recall. Beside the distance stands the same by scipy's matrix square root.
With --write the table goes to benchmarks/results/inception.md.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import machine
import numpy as np
import scipy.linalg

from cascaded_diffusion.commands import entry, jax_setup
from cascaded_diffusion.files.whole import write_whole

ROOT = pathlib.Path(__file__).resolve().parents[1]
_NUM, _FEATURES = 10_000, 2048


def main() -> None:
    """Measures, prints, and with --write stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    jax_setup.set_up_jax()
    from cascaded_diffusion.config.schema import MeshConfig
    from cascaded_diffusion.evaluation.features.inception_extractor import InceptionExtractor
    from cascaded_diffusion.evaluation.features.inception_weights import InceptionWeights
    from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
    from cascaded_diffusion.evaluation.metrics.kernel_distance import kernel_distance
    from cascaded_diffusion.evaluation.metrics.precision_recall import precision_recall
    from cascaded_diffusion.networks.inception import checkpoint_tensors, params_from_checkpoint
    from cascaded_diffusion.runtime.mesh import build_mesh
    from tests.evaluation.random_inception import random_checkpoint

    weights = InceptionWeights(
        params_from_checkpoint(random_checkpoint(checkpoint_tensors())), "random"
    )
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    images = np.random.default_rng(0).integers(0, 256, (192, 64, 64, 3), np.uint8)
    lines = ["| features of 64 px images | batch | images/s |", "|---|---|---|"]
    for resize in ("legacy", "clean"):
        for batch in (16, 64):
            extractor = InceptionExtractor(weights, resize, mesh, batch)
            extractor(images[:batch])  # compiles
            start = time.perf_counter()
            extractor(images)
            rate = len(images) / (time.perf_counter() - start)
            lines.append(f"| {resize} | {batch} | {rate:.1f} |")
            print(lines[-1], flush=True)

    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(_FEATURES, _FEATURES)) / np.sqrt(_FEATURES)
    real, own = (
        (rng.normal(size=(_NUM, _FEATURES)) @ mixing + shift).astype(np.float32)
        for shift in (0.4, 0.42)
    )
    lines += ["", f"| of {_NUM:,} x {_FEATURES} features | seconds |", "|---|---|"]

    def timed(name: str, function):  # noqa: ANN001, ANN202
        start = time.perf_counter()
        result = function()
        lines.append(f"| {name} | {time.perf_counter() - start:.1f} |")
        print(lines[-1], flush=True)
        return result

    def summed() -> FeatureStatistics:
        parts = [FeatureStatistics.of(own[i : i + 500]) for i in range(0, _NUM, 500)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    statistics = timed("sums, in batches of 500", summed)
    reference = FeatureStatistics.of(real)
    ours = timed("Fréchet distance", lambda: frechet_distance(statistics, reference))
    timed("KID, 100 subsets of 1,000", lambda: kernel_distance(own, real, seed=0))
    timed("precision and recall", lambda: precision_recall(real, own))

    def by_square_root() -> float:
        root = scipy.linalg.sqrtm(statistics.covariance @ reference.covariance)
        means = np.square(statistics.mean - reference.mean).sum()
        traces = np.trace(statistics.covariance) + np.trace(reference.covariance)
        return float(means + traces - 2 * np.trace(root).real)

    theirs = timed("the same distance by scipy's sqrtm", by_square_root)
    text = "\n".join(
        [
            "# Features and bookkeeping of an FID",
            "",
            *lines,
            "",
            f"The two distances differ by {abs(ours - theirs) / theirs:.1e} relatively.",
            f"Measured on: {machine.describe()}.",
            "Command: `python benchmarks/inception.py --write`.",
            "",
        ]
    )
    print(text)
    if write:
        write_whole(ROOT / "benchmarks" / "results" / "inception.md", text.encode())


if __name__ == "__main__":
    entry.run(lambda argv: main() or 0)
