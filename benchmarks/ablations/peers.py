"""Samples of diffusers' network, which another Python trains by `peer_torch.py`."""

from __future__ import annotations

import pathlib
import subprocess
import tempfile

import numpy as np
from real_images import Samples
from tables import Budget, Row

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import write_npz_whole


def check_python(torch_python: str | None) -> str:
    """The Python that peers need. Raises UserError if none is given."""
    if torch_python is None:
        expected = "expected a Python with PyTorch and diffusers, for the table's peers"
        raise UserError(f"--torch_python is not given: {expected}")
    return torch_python


def samples_of_peer(
    row: Row, budget: Budget, train: np.ndarray, *, torch_python: str | None, seed: int, count: int
) -> Samples:
    """Trains a row's peer on images uint8 [n, H, W, 3] and samples it.

    Raises UserError if there is no `torch_python`, or it fails.
    """
    torch_python = check_python(torch_python)
    with tempfile.TemporaryDirectory() as temporary:
        images, output = (pathlib.Path(temporary, n) for n in ("images.npz", "samples.npz"))
        write_npz_whole(images, {"arr_0": train})
        flags = {
            "images": images,
            "output": output,
            "widths": ",".join(map(str, row.peer_widths)),
            "seconds": budget.seconds,
            "seed": seed,
            "num_samples": count,
            "num_steps": budget.peer_steps,
        }
        script = str(pathlib.Path(__file__).with_name("peer_torch.py"))
        command = [torch_python, script, *(f"--{k}={v}" for k, v in flags.items())]
        print(f"training {row.label['trained']}, {budget.seconds:g} s", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"--torch_python={torch_python}: {lines[-1]}")
        print(f"  {done.stdout.strip()}", flush=True)
        return Samples(read_arrays(output)["arr_0"], None, budget.peer_steps)
