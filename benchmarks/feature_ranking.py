"""Whether features that need no labels rank damaged images as a classifier's features do.

    python benchmarks/feature_ranking.py [--npz=PATH] [--write]

Held-out real images are damaged in seven ways at six strengths, from none on, and their Fréchet
distance to the training images is measured by `fd_classifier` (trained on labels) and by
`fd_rotation` (trained without). Spearman's rank correlation of the two says whether the one can
stand in for the other; beside it stand that of a classifier of another seed, which is as well
as two classifiers agree, and that of a network that was never trained.

The digits that come with the package, and CIFAR-10 where --npz (by default
../shared/data/cifar10.npz) is: JPEG files one after the other in `train_jpeg` and `test_jpeg`,
with `_offsets` and `_labels`. With --write the tables go to benchmarks/results/feature_ranking.md.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import machine
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from cascaded_diffusion.commands import entry, jax_setup
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import write_whole

ROOT = pathlib.Path(__file__).resolve().parents[1]
_NUM_TRAIN, _NUM_TEST = 4000, 1000
_RANDOM = 0


def read_jpegs(path: pathlib.Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images chosen at random of a file of JPEGs: uint8 [count, H, W, 3], int32 labels [count]."""
    stored = read_arrays(path, [f"{split}_{name}" for name in ("jpeg", "offsets", "labels")])
    data, offsets, labels = stored.values()
    rows = np.random.default_rng(_RANDOM).permutation(len(labels))[:count]
    images = [
        Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        for i in rows
    ]
    return np.stack([np.asarray(x) for x in images]), labels[rows].astype(np.int32)


def _rounded(images: np.ndarray) -> np.ndarray:
    return images.round().clip(0, 255).astype(np.uint8)


def _by_pillow(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    changed = [np.asarray(change(Image.fromarray(x.squeeze()))) for x in images]
    return np.stack(changed).reshape(images.shape)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def _low_res(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.BOX).resize(image.size, Image.BICUBIC)


def damaged(images: np.ndarray, labels: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Sets of damaged images by the kind of damage, the least damaged first."""
    random = np.random.default_rng(_RANDOM)
    noise = random.normal(size=images.shape)
    tint = np.asarray([1.0, -0.5, -1.0] if images.shape[-1] == 3 else [1.0])
    count, num_classes = len(images), labels.max() + 1

    def repeated(rows: np.ndarray) -> np.ndarray:
        return images[rows[np.arange(count) % len(rows)]]

    kinds = {
        "noise": [_rounded(images + s * noise) for s in (4, 8, 16, 32, 64)],
        "blur": [
            _rounded(gaussian_filter(images.astype(float), (0, s, s, 0)))
            for s in (0.4, 0.6, 0.8, 1.2, 2.0)
        ],
        "JPEG": [_by_pillow(images, lambda x, q=q: _jpeg(x, q)) for q in (70, 45, 25, 12, 5)],
        "low resolution, enlarged": [
            _by_pillow(images, lambda x, s=s: _low_res(x, s)) for s in (24, 20, 16, 12, 8)
        ],
        "colour shift": [_rounded(images + s * tint) for s in (6, 12, 24, 48, 80)],
        "fewer classes": [
            repeated(np.flatnonzero(labels < num_classes * part // 10)) for part in (9, 7, 5, 3, 1)
        ],
        "duplicates": [
            repeated(random.permutation(count)[: count // part]) for part in (2, 5, 10, 20, 50)
        ],
    }
    return {kind: [images, *sets] for kind, sets in kinds.items()}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing theirs."""

    def centred(values: Sequence[float]) -> np.ndarray:
        x = np.asarray(values)
        ranks = (x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2
        return ranks - ranks.mean()

    x, y = centred(a), centred(b)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def table(name: str, train: tuple, test: tuple, folder: pathlib.Path) -> list[str]:
    """One data set's measurements, as lines of a page.

    Args:
      name: of the data set.
      train: images and labels to train on and to compare with.
      test: images and labels to damage.
      folder: where the classifiers are kept.
    """
    import jax

    from cascaded_diffusion.config.schema import MeshConfig
    from cascaded_diffusion.evaluation.features.classifier_extractor import (
        Classifier,
        load_or_train,
    )
    from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages, Task
    from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
    from cascaded_diffusion.networks import classifier as networks
    from cascaded_diffusion.runtime.mesh import build_mesh

    real, held_out = LabelledImages(*train), LabelledImages(*test)
    num_classes = int(real.labels.max()) + 1

    mesh = build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])

    def trained(network: str, seed: int) -> Classifier:
        task = Task(network=network, num_classes=num_classes, seed=seed, mesh=mesh)
        return load_or_train(folder / f"{name}_{network}_{seed}.npz", task, real, held_out)

    classifier, rotation = trained("small", 0), trained("rotation", 0)
    task = classifier.task
    untrained = networks.init_classifier(task.module, jax.random.key(0), real.images.shape)
    extractors = {
        "fd_classifier": classifier,
        "fd_rotation": rotation,
        "another seed": trained("small", 1),
        "untrained": Classifier(task, untrained),
    }
    sets = damaged(*test)
    found: dict[str, dict[str, list[float]]] = {}
    for which, extractor in extractors.items():
        reference = FeatureStatistics.of(extractor(real.images).pooled)
        found[which] = {
            kind: [
                frechet_distance(FeatureStatistics.of(extractor(x).pooled), reference)
                for x in images
            ]
            for kind, images in sets.items()
        }
        print(f"{name}: {which} measured", flush=True)

    others = ("fd_rotation", "another seed", "untrained")
    lines = [
        f"## {name}",
        "",
        f"{len(real.labels):,} training images, {len(held_out.labels):,} held-out ones. The"
        f" classifier recognises {100 * classifier.accuracy:.1f} % of the latter, the other network"
        f" tells the rotation of {100 * rotation.accuracy:.1f} %.",
        "",
        "| damage | fd_classifier, none to strongest | fd_rotation | with fd_classifier:"
        f" {' | '.join(others)} | with strength: fd_classifier | fd_rotation |",
        f"|{'---|' * (5 + len(others))}",
    ]
    own, rotations = found["fd_classifier"], found["fd_rotation"]
    for kind in sets:
        strengths = range(len(sets[kind]))
        cells = [" ".join(f"{x:.3g}" for x in own[kind])]
        cells.append(" ".join(f"{x:.3g}" for x in rotations[kind]))
        cells += [f"{rank_correlation(found[o][kind], own[kind]):.2f}" for o in others]
        cells += [f"{rank_correlation(x[kind], strengths):.2f}" for x in (own, rotations)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")

    def together(which: str) -> list[float]:
        # The undamaged set once.
        kinds = list(found[which].values())
        return [kinds[0][0], *(x for values in kinds for x in values[1:])]

    cells = [f"{rank_correlation(together(o), together('fd_classifier')):.3f}" for o in others]
    lines += [f"| all {len(together(others[0]))} sets | | | {' | '.join(cells)} | | |", ""]
    return lines


def main(argv: Sequence[str]) -> int:
    """Measures, prints, and with --write stores. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--npz", type=pathlib.Path, default=ROOT.parent / "shared" / "data" / "cifar10.npz"
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folder", type=pathlib.Path, help="where trained networks are kept")
    flags = parser.parse_args(argv[1:])
    jax_setup.set_up_jax()

    from cascaded_diffusion.data.arrays import load_mnist

    data = {"MNIST": (load_mnist("train"), load_mnist("test"))}
    if flags.npz.exists():
        data["CIFAR-10"] = (
            read_jpegs(flags.npz, "train", _NUM_TRAIN),
            read_jpegs(flags.npz, "test", _NUM_TEST),
        )
    else:
        print(f"{flags.npz}: not there; the digits alone are measured", flush=True)
    lines = ["# fd_rotation beside fd_classifier: ranks of damaged real images", ""]
    with tempfile.TemporaryDirectory() as temporary:
        for name, (train, test) in data.items():
            lines += table(name, train, test, flags.folder or pathlib.Path(temporary))
    text = "\n".join(
        [
            *lines,
            "Distances are to the training images. The last five columns are Spearman's rank"
            " correlations: three of other features with fd_classifier, two of a distance with the"
            " strength of the damage.",
            f"Measured on: {machine.describe()}.",
            "Command: `python benchmarks/feature_ranking.py --write`.",
            "",
        ]
    )
    print(text)
    if flags.write:
        write_whole(ROOT / "benchmarks" / "results" / "feature_ranking.md", text.encode())
    return 0


if __name__ == "__main__":
    entry.run(main)
