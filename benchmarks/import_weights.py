"""Time and memory of importing a file of ADM's 64 px size.

    python benchmarks/import_weights.py

Random weights in the names and shapes of `64x64_diffusion.pt`, 1.2 GB, are written to a temporary
folder and imported by the binary.
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import machine
import numpy as np

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.interchange import names
from cascaded_diffusion.library.configs import load_config
from tests.interchange.files import write_pt

ROOT = pathlib.Path(__file__).resolve().parents[1]


def write_weights(path: pathlib.Path) -> int:
    """Writes the file; returns the number of parameters."""
    stage, rng = load_config(ROOT / "configs" / "adm_base64.py").stage, np.random.default_rng(0)
    shapes = build_stage(stage).shapes()[0]
    tensors = {
        name: rng.standard_normal(x.their_shape, np.float32) * np.float32(0.02)
        for x in names.translations(names.GUIDED_DIFFUSION, stage, shapes)
        for name in x.names
    }
    write_pt(path, tensors)
    return names.number_of_parameters(tensors)


def main() -> None:
    """Prints a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "64x64_diffusion.pt")
        count, start = write_weights(path), time.monotonic()
        command = [sys.executable, "-m", "cascaded_diffusion.import_weights"]
        command += ["--source=guided_diffusion", "--model=imagenet64", str(path)]
        subprocess.run([*command, f"--workdir={folder}/run"], check=True, cwd=ROOT)
        seconds = time.monotonic() - start
        # Of the largest child so far, in KiB.
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print("\n| parameters | file | seconds | largest resident memory |\n|---|---|---|---|")
        size = path.stat().st_size
        print(f"| {count:,} | {size / 1e9:.2f} GB | {seconds:.1f} | {memory / 1e9:.2f} GB |")
    print(f"\nMeasured on: {machine.describe()}.")


if __name__ == "__main__":
    main()
