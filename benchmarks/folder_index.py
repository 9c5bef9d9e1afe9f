"""How long a large folder of images takes to list, and what memory it needs.

    python benchmarks/folder_index.py [--images=100000] [--write]

Makes a tree of 1,000 class folders (links to one JPEG, on a disk that is fast and a cache
that is warm), and lists it in a process of its own. With --write the table goes to
benchmarks/results/folder_index.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time

import machine
from PIL import Image

from cascaded_diffusion.commands import entry
from cascaded_diffusion.files.whole import write_whole

ROOT = pathlib.Path(__file__).resolve().parents[1]
_CLASSES = 1000
_LIMIT_MB = 1000
_MAX_LINKS = 30_000


def _peak_mb() -> float:
    # Not getrusage: its peak survives exec, so a child starts with its parent's.
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = [x for x in status.splitlines() if x.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def make_tree(folder: pathlib.Path, count: int) -> None:
    """Class folders as ImageNet's, of hard links."""
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    for i in range(count):
        if i % _MAX_LINKS == 0:
            original = folder / f"original{i}"
            original.write_bytes(jpeg.getvalue())
        path = folder / "train" / f"n{i % _CLASSES:08d}"
        if i < _CLASSES:
            path.mkdir(parents=True)
        os.link(original, path / f"n{i % _CLASSES:08d}_{i // _CLASSES:05d}.JPEG")


def child(folder: str) -> None:
    """Lists; prints one line of JSON."""
    from cascaded_diffusion.data.folder import load_folder

    before = _peak_mb()
    start = time.monotonic()
    source = load_folder(folder, "train", classes="folder")
    secs = time.monotonic() - start
    print(
        json.dumps(
            {
                "images": len(source),
                "secs": secs,
                "before_mb": before,
                "peak_mb": _peak_mb(),
                "pickled_mb": len(pickle.dumps(source)) / 1e6,
            }
        )
    )


def main() -> None:
    """Measures, prints, and with --write stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--child", help="for itself")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_tree(pathlib.Path(folder), args.images)
        result = subprocess.run(
            [sys.executable, __file__, f"--child={folder}"],
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(result.stdout)
    met = "below" if found["peak_mb"] < _LIMIT_MB else "NOT below"
    text = "\n".join(
        [
            "# Listing a folder of images",
            "",
            f"{found['images']:,} files in {_CLASSES:,} class folders: {found['secs']:.2f} s"
            " with a warm cache (they were made just before); peak memory of the process"
            f" {found['peak_mb']:.0f} MB ({found['before_mb']:.0f} MB before it began), {met}"
            f" {_LIMIT_MB} MB. What is kept, and sent to each process that reads:"
            f" {found['pickled_mb']:.1f} MB.",
            f"Measured on: {machine.describe()}.",
            "Command: `python benchmarks/folder_index.py --write`.",
            "",
        ]
    )
    print(text)
    if args.write:
        write_whole(ROOT / "benchmarks" / "results" / "folder_index.md", text.encode())


if __name__ == "__main__":
    entry.run(lambda argv: main() or 0)
