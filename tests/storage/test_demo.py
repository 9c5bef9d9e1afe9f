"""The demo at `:smoke` size, wholly in a bucket: every number and pixel is that on a disk."""

import numpy as np
import pytest

from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import files_below
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.binaries import Binaries

_STAGES = ("base16", "sr32")


@pytest.fixture(scope="module")
def binaries(bucket_server):
    bucket_server.intercept = lambda *_: None
    made = Binaries()
    yield made
    made.close()


def _demo(binaries, root):
    """Trains, scores, samples and reports below a folder. Returns what was printed."""
    printed = []

    def run(binary, *flags):
        result = binaries.run(binary, *flags)
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
        assert "Traceback" not in result.stderr
        printed.append(result.stdout)

    for stage in _STAGES:
        config = f"--config=configs/mnist_{stage}.py:smoke"
        run("main", config, f"--workdir={root}/{stage}", "--config.train.sample_every_steps=None")
    run("evaluate", f"--workdir={root}/base16")
    run("evaluate", f"--workdir={root}/sr32", f"--low_res_run={root}/base16")
    cascade = "--config=configs/mnist_cascade32.py:smoke"
    run("sample", cascade, f"--workdir={root}", "--png")
    run("evaluate", "final", cascade, f"--workdir={root}")
    run("report", f"--workdir={root}")
    return printed


def _numbers(path):
    """The records of a file of lines, without what differs from call to call."""
    return [
        {k: v for k, v in record.items() if k in ("step", "loss", "grad_norm", "metric", "value")}
        for record in read_lines(path)
    ]


def test_the_demo_in_a_bucket_is_that_on_a_disk(binaries, folder, tmp_path):
    _demo(binaries, tmp_path / "RUN")
    _demo(binaries, folder)
    local = path_of(tmp_path / "RUN")
    for stage in _STAGES:
        for name in ("metrics.jsonl", "eval/results.jsonl"):
            found = _numbers(folder / stage / name)
            assert found == _numbers(local / stage / name)
            assert found
        a, b = (RunFolder(root / stage) for root in (local, folder))
        assert (a.best()["step"], a.best()["value"]) == (b.best()["step"], b.best()["value"])
    for name in ("base16.npz", "samples.npz"):
        a, b = (read_arrays(root / "samples" / name) for root in (local, folder))
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)
    here, there = (set(files_below(root / "samples")) for root in (local, folder))
    assert here - {".sample.lock"} == there
    for name in ("samples.png", "classes.png", "png/000003.png"):
        path = f"samples/{name}"
        assert (folder / path).read_bytes() == (local / path).read_bytes()
    page = (folder / "report.html").read_bytes()
    assert page.startswith(b"<!doctype html>")
    assert abs(len(page) - len((local / "report.html").read_bytes())) < 0.1 * len(page)
    assert not list(files_below(folder / "base16" / "eval" / "samples"))
