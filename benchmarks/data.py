"""How fast data comes: JPEG files and prepared records, beside tf.data and PyTorch.

    python benchmarks/data.py [--tf_python=PY] [--torch_python=PY] [--rounds=5] [--write]

Made-up photos of 400 x 350 px in class folders are cropped to their centred square, shrunk
to 64 px by area, flipped at random and batched by 64, shuffled anew each epoch, all on the
same files:

- ours from the JPEGs, by threads and by processes; and from what `prepare` made of them
- tf.data, with TensorFlow's default decoder and with the one that gives the same pixels but
  for rounding
- a PyTorch DataLoader with Pillow, whose "box" resize is near to an area average

Neither TensorFlow nor PyTorch belongs to this package: their lines need the interpreter of
an environment that has them, and Pillow. Each way runs in a process of its own, all of them in
turn, round after round; ratios are medians of the ratios within a round. With --write the table
goes to benchmarks/results/data.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import data_cpu
import machine
import numpy as np
from PIL import Image

from cascaded_diffusion import prepare
from cascaded_diffusion.commands import config_flags, entry
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.data.loader import build_stream, iterate
from cascaded_diffusion.data.sources import load_source
from cascaded_diffusion.files.whole import write_whole

ROOT = pathlib.Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, SIZE, BATCH = 400, 350, 64, 64
NUM_CLASSES = 10
# Names of each photo: shuffling costs what it costs for a data set of real size.
COPIES = 20
# name -> (read_threads, read_workers, prepared)
OURS = {
    "ours, JPEG, 2 threads": (2, 0, False),
    "ours, JPEG, 2 processes": (1, 2, False),
    "ours, prepared, 1 thread": (1, 0, True),
    "ours, prepared, 2 threads": (2, 0, True),
    "ours, prepared, 2 processes": (1, 2, True),
}
TFDATA = {
    "tf.data, JPEG": "default",
    "tf.data, JPEG, same pixels but for rounding": "INTEGER_ACCURATE",
}
TORCH = "PyTorch DataLoader, JPEG, 2 workers"
REFERENCE = "tf.data, JPEG"


def make_photos(folder: pathlib.Path, count: int) -> float:
    """Writes class folders of JPEGs, smooth shapes under fine grain. Returns their mean bytes."""
    total = 0
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (12, 14, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.BICUBIC))
        grain = rng.normal(0, 20, (HEIGHT, WIDTH, 1)) + rng.normal(0, 6, (HEIGHT, WIDTH, 3))
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=95)
        path = folder / "train" / f"class{i % NUM_CLASSES}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
        for copy in range(1, COPIES):
            os.link(path, path.with_name(f"{i:06d}_{copy}.jpg"))
        total += len(data.getvalue())
    return total / count


def config_of(folder: pathlib.Path, threads: int, workers: int, prepared: bool) -> object:
    """The run config that reads the photos."""
    values = config_flags.load_config_file(ROOT / "configs", "cifar10_base16.py")
    values["data"].update(
        name="folder",
        path=str(folder),
        prepared_dir=str(folder / "prepared") if prepared else None,
        train_split="train",
        eval_split="train",
        resolution=SIZE,
        read_threads=threads,
        read_workers=workers,
    )
    return run_config_from(values)


def child(name: str, folder: pathlib.Path, secs: float) -> None:
    """Measures one of ours; prints one line of JSON."""
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    config = config_of(folder, *OURS[name])
    source = load_source(config.data, "train", config.stage)
    stream = build_stream(source, config.data, global_batch_size=BATCH)
    start = time.monotonic()
    batches = iterate(stream, source, config.data, start_step=0)
    next(batches)
    first = time.monotonic() - start
    for _ in range(10):
        next(batches)
    begun = data_cpu.seconds()
    start, images = time.monotonic(), 0
    while time.monotonic() - start < secs:
        images += len(next(batches)["image"])
    rate, cpu = images / (time.monotonic() - start), data_cpu.seconds() - begun
    batches.close()
    found = {"images_per_sec": rate, "cpu_ms": 1000 * cpu / images, "first_batch_secs": first}
    print(json.dumps(found))


def exact_area_weights(size_in: int, size_out: int) -> np.ndarray:
    """float64 [size_out, size_in]: by whole numbers, and nothing of the package's."""
    # In units of 1 / size_out input pixels all edges are whole.
    low = np.arange(size_out)[:, None] * size_in
    pixel = np.arange(size_in)[None, :] * size_out
    overlap = np.minimum(low + size_in, pixel + size_out) - np.maximum(low, pixel)
    return np.maximum(overlap, 0) / size_in


def check_pixels(folder: pathlib.Path) -> str:
    """Compares ours with Pillow's decoding and exact area averages; and prepared with not."""
    plain, prepared = (
        load_source(config.data, "train", config.stage)
        for config in (config_of(folder, 1, 0, flag) for flag in (False, True))
    )
    worst = 0.0
    weights = exact_area_weights(HEIGHT, SIZE)
    left = (WIDTH - HEIGHT) // 2
    for index in range(0, len(plain), max(1, len(plain) // 20)):
        ours = plain[index]["image"]
        np.testing.assert_array_equal(ours, prepared[index]["image"])
        photo = np.asarray(Image.open(plain.describe(index)), np.float64)
        crop = photo[:, left : left + HEIGHT]
        # Without `optimize` numpy sums over both axes at once: seconds for each image.
        exact = np.einsum("ih,hwc,jw->ijc", weights, crop, weights, optimize=True)
        worst = max(worst, float(np.abs(exact - ours).max()))
    assert worst < 0.501, worst
    return f"Ours is the exact area average, rounded: at most {worst:.4f} grey levels from it."


def measured(command: list[str]) -> dict[str, Any]:
    """Runs one way: `images_per_sec`, `cpu_ms` per image, and the `library` if it is not ours."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode:
        raise RuntimeError(f"{command}:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def commands(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, list[str]]:
    """How each way is run, by its name."""
    here = ROOT / "benchmarks"
    numbers = [f"--photos={folder}", f"--secs={args.secs}"]
    found = {
        name: [sys.executable, str(here / "data.py"), f"--child={name}", *numbers] for name in OURS
    }
    if args.tf_python:
        for name, dct in TFDATA.items():
            found[name] = [
                args.tf_python, str(here / "data_tfdata.py"), f"--dct={dct}", *numbers
            ]  # fmt: skip
    if args.torch_python:
        found[TORCH] = [args.torch_python, str(here / "data_torch.py"), *numbers]
    return found


def main() -> None:
    """Measures, prints, and with --write stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secs", type=float, default=6.0)
    parser.add_argument("--tf_python")
    parser.add_argument("--torch_python")
    parser.add_argument("--photos", type=pathlib.Path, help="folder to make them in, empty")
    parser.add_argument("--child", help="for itself")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.photos, args.secs)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.photos or pathlib.Path(temporary)
        size = make_photos(folder, args.images)
        prepare.main(
            [
                "prepare",
                f"--config={ROOT}/configs/cifar10_base16.py",
                "--config.data.name=folder",
                "--config.data.eval_split=train",
                f"--config.data.path={folder}",
                f"--config.data.prepared_dir={folder}/prepared",
                f"--config.data.resolution={SIZE}",
            ]
        )
        exact = check_pixels(folder)
        rates: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        libraries: set[str] = set()
        for number in range(args.rounds):
            for name, command in commands(args, folder).items():
                found = measured(command)
                if "library" in found:
                    libraries.add(found["library"])
                rates.setdefault(name, []).append(found["images_per_sec"])
                cpu.setdefault(name, []).append(found["cpu_ms"])
                print(f"round {number + 1}: {name}: {rates[name][-1]:,.0f} images/s", flush=True)

    def ratio(name: str, to: str) -> str:
        if to not in rates:
            return "not measured"
        pairs = zip(rates[name], rates[to], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    lines = [
        f"| way | images/s (median of {args.rounds}) | least to most | to tf.data | CPU ms/image |",
        "|---|---|---|---|---|",
    ]
    for name, found in rates.items():
        lines.append(
            f"| {name} | {statistics.median(found):,.0f} | {min(found):,.0f} to"
            f" {max(found):,.0f} | {ratio(name, REFERENCE)} | {statistics.median(cpu[name]):.2f} |"
        )
    missing = [name for name in (*TFDATA, TORCH) if name not in rates]
    if missing:
        lines += ["", f"Not measured, no interpreter was given: {'; '.join(missing)}."]
    jpeg, fast = "ours, JPEG, 2 threads", "ours, prepared, 1 thread"
    text = "\n".join(
        [
            "# Speed of the data",
            "",
            *lines,
            "",
            f"Prepared records (1 thread) to JPEGs (2 threads): {ratio(fast, jpeg)}; both by 2"
            f" processes: {ratio('ours, prepared, 2 processes', 'ours, JPEG, 2 processes')}.",
            f"{args.images:,} JPEGs of {WIDTH} x {HEIGHT} px, {size / 1000:.0f} kB each, under"
            f" {COPIES} names each; batch {BATCH} at {SIZE} px; {args.secs:g} s per measurement;"
            " files in the page cache.",
            exact,
            f"Measured on: {machine.describe()}; {', '.join(sorted(libraries))}.",
            "Command: `python benchmarks/data.py --tf_python=PY --torch_python=PY --write`.",
            "",
        ]
    )
    print(text)
    if args.write:
        write_whole(ROOT / "benchmarks" / "results" / "data.md", text.encode())


if __name__ == "__main__":
    entry.run(lambda argv: main() or 0)
