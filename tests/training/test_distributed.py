"""Real processes that talk to each other: they train what one process trains."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import ROOT
from tests.xla import NO_OPTIMIZATION

STEPS, DEVICES = 80, 4


def _free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


class Job:
    """The processes of one training, `DEVICES` simulated devices in all."""

    def __init__(self, folder: pathlib.Path, count: int, steps: int = STEPS):
        address, self._folder = _free_address(), RunFolder(folder)
        flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
        env = {**os.environ, "XLA_FLAGS": f"{flags} {NO_OPTIMIZATION}"}
        self._logs = [folder.with_name(f"{folder.name}.{count}.{i}.log") for i in range(count)]
        self.processes = []
        for i, log in enumerate(self._logs):
            command = [sys.executable, "-m", "tests.training.distributed_job", str(folder)]
            command += [f"{folder}.ids", address, str(count), str(i), str(steps)]
            with log.open("w") as f:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=f)
                )

    def wait_for_steps(self, count):
        """Returns when so many steps are logged."""
        deadline = time.monotonic() + 240
        while len(_curve(self._folder)) < count:
            time.sleep(0.05)
            assert all(p.poll() is None for p in self.processes), self.wait()[1]
            assert time.monotonic() < deadline, self.wait(1)[1]

    def wait_for_text(self, text):
        """Returns when the first process has printed a text."""
        deadline = time.monotonic() + 240
        while text not in self._logs[0].read_text():
            time.sleep(0.05)
            assert all(p.poll() is None for p in self.processes), self.wait()[1]
            assert time.monotonic() < deadline, self.wait(1)[1]

    def wait(self, secs=300):
        """Exit codes, and what was printed."""
        try:
            codes = [p.wait(timeout=secs) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()
        return codes, "\n".join(log.read_text() for log in self._logs)


def _curve(folder):
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_lines(folder.metrics_path)}


def _ids(folder, count):
    """step -> the ids of the global batch, as the last process that ran the step read them."""
    parts = []
    for i in range(count):
        path = pathlib.Path(f"{folder.path}.{i}-of-{count}")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        parts.append({step: ids for step, ids in lines})
    steps = sorted(set.intersection(*(set(p) for p in parts)))
    return {step: [row for p in parts for row in p[step]] for step in steps}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("distributed") / "alone")
    codes, text = Job(folder.path, 1).wait()
    assert codes == [0], text
    return folder


def test_stopped_as_two_processes_and_ended_as_four_it_is_the_same_training(alone, tmp_path):
    folder = RunFolder(tmp_path / "spread")
    job = Job(folder.path, 2)
    job.wait_for_steps(4)
    # A signal to one of them stops all, at the same step, with a checkpoint.
    job.processes[1].send_signal(signal.SIGTERM)
    codes, text = job.wait()
    assert codes == [75, 75], text
    ended = {line for line in text.splitlines() if line.startswith("ended: preempted")}
    assert len(ended) == 1, text
    saved = int(ended.pop().split()[-1])
    assert 4 <= saved < STEPS
    assert (folder.checkpoints / str(saved) / "manifest.json").exists()

    codes, text = Job(folder.path, 4).wait()
    assert codes == [0] * 4, text
    assert f"resuming from step {saved}" in text
    # One of them speaks and writes for all.
    assert text.count("train step compiled") == 1
    expected, found = _curve(alone), _curve(folder)
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        np.testing.assert_allclose(found[step], values, rtol=1e-5)
    ids = _ids(alone, 1)
    two, four = _ids(folder, 2), _ids(folder, 4)
    assert set(range(saved)) <= set(two)
    assert set(range(saved, STEPS)) <= set(four)
    for spread in (two, four):
        assert all(ids[step] == rows for step, rows in spread.items() if step in ids)


@pytest.mark.parametrize(
    ("number", "lost", "said"),
    [
        (signal.SIGKILL, 0, "process 0 on {host} is gone: it was killed"),
        (signal.SIGKILL, 1, "process 1 on {host} is gone: it was killed"),
        (signal.SIGSTOP, 1, "process 1 on {host} has not answered for 4 s: it hangs, was stopped"),
    ],
)
def test_whoever_loses_a_peer_ends_with_one_line_and_the_code_to_run_again(
    number, lost, said, tmp_path
):
    folder = RunFolder(tmp_path / "run")
    job = Job(folder.path, 2, steps=100_000)
    job.wait_for_steps(3)
    start = time.monotonic()
    job.processes[lost].send_signal(number)
    survivor = job.processes[1 - lost]
    try:
        assert survivor.wait(timeout=60) == 75
        took = time.monotonic() - start
        assert took < 15
    finally:
        for p in job.processes:
            p.kill()
        _, text = job.wait()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    host = socket.gethostname()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {said.format(host=host)}"), text
    assert errors[0].endswith("; the job cannot go on without it; run the same command again")
    assert "***" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("fails", [0, 1])
def test_when_one_process_fails_alone_all_end_with_its_error(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILING_PROCESS", str(fails))
    job = Job(tmp_path / "run", 2)
    start = time.monotonic()
    codes, text = job.wait(60)
    assert time.monotonic() - start < 40
    assert codes == [2, 2], text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    told = f"error: process {fails} on {socket.gethostname()} failed: its disk is gone"
    assert sorted(errors) == sorted(["error: its disk is gone", told])
    assert "***" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_while_the_step_compiles_ends_all_at_once(count, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW_COMPILATION", "1")
    job = Job(tmp_path / "run", count)
    job.wait_for_text("compiling the training step")
    start = time.monotonic()
    job.processes[-1].send_signal(signal.SIGTERM)
    codes, text = job.wait(30)
    assert time.monotonic() - start < 5
    assert codes == [75] * count, text
    assert "stopped by a signal before a step was done; run it again\n" in text
    assert "Traceback" not in text


def test_early_stop_is_seen_by_all_processes_at_the_same_step(tmp_path):
    folder = RunFolder(tmp_path / "stopped")
    folder.path.mkdir()
    folder.early_stop_path.write_text("enough\n")
    codes, text = Job(folder.path, 2).wait()
    assert codes == [0, 0], text
    assert text.count("ended: early_stop at 0") == 2, text
