"""Runs in a bucket are those on a disk, to the bit, whatever kills them on the way."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from http import HTTPStatus

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import BucketPath
from cascaded_diffusion.files.whole import files_below
from cascaded_diffusion.runtime import checkpoint, manifest
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.binaries import command, environment
from tests.tiny import ROOT, tiny_base

STEPS = 40
_FLAGS = [
    "--config=configs/mnist_base16.py:smoke",
    f"--config.train.train_steps={STEPS}",
    "--config.train.batch_size=8",
    "--config.train.log_every_steps=2",
    "--config.train.sample_every_steps=20",
    "--config.checkpoint.save_every_steps=8",
    "--config.checkpoint.max_to_keep=2",
]
_WRITES = ("POST", "PUT", "DELETE", "PATCH")


def _train(workdir, folder, *more):
    """How often a training was killed, its exit code, and what the last process printed."""
    folder.mkdir()
    job = [sys.executable, "-m", "tests.storage.killed_training", str(folder)]
    result = subprocess.run(
        [*job, *_FLAGS, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    return *json.loads(result.stdout), (folder / "log").read_text()


def _result(folder):
    curve = {r["step"]: (r["loss"].hex(), r["grad_norm"].hex()) for r in folder.metrics()}
    return curve, checkpoint.state_digest(folder, STEPS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The result of the same training on a disk."""
    path = tmp_path_factory.mktemp("disk")
    assert _train(path / "run", path / "job")[:2] == (0, 0)
    return _result(RunFolder(path / "run"))


def test_a_run_in_a_bucket_is_that_on_a_disk(folder, expected, tmp_path):
    kills, code, text = _train(folder, tmp_path / "job")
    assert (kills, code) == (0, 0), text
    finished = RunFolder(folder)
    assert _result(finished) == expected
    assert manifest.finished_steps(finished) == [32, 40]
    names = set(files_below(finished.path))
    assert {"config.json", "data.json", "saved.json", "TRAIN_COMPLETE"} <= names
    assert not [name for name in names if "lock" in name or "probe" in name or "deleting" in name]
    # TensorBoard reads the parts of the events, one after the other.
    for part in finished.path.glob("events.out.tfevents.*"):
        (tmp_path / part.name).write_bytes(part.read_bytes())
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(2, STEPS + 1, 2))
    assert [e.step for e in events.Images("ema_samples")] == [20, 40]
    # A damaged checkpoint is found, and the one before it used.
    path = next(p for p in (finished.checkpoints / "40").files() if "/d/" in str(p))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    said = []
    assert manifest.newest_intact(finished, start_over=False, say=said.append) == 32
    assert "has changed since it was written" in said[0]
    assert manifest.steps_on_disk(finished) == [32]
    assert (finished.damaged / "40" / "manifest.json").is_file()


def test_a_first_save_that_was_killed_is_no_obstacle(folder):
    # Orbax deletes it, and with it all that there is of the folder.
    left = folder / "checkpoints" / "2.orbax-checkpoint-tmp-1" / "state" / "manifest.ocdbt"
    left.write_bytes(b"half")
    writer = checkpoint.CheckpointWriter(RunFolder(folder), tiny_base().checkpoint)
    assert writer.newest_step() is None
    writer.close()


def test_twelve_kills_in_the_middle_of_uploads_change_nothing(folder, tmp_path, expected, server):
    rng, writes, killed, job = random.Random(0), [0], [], tmp_path / "job"
    # A save takes some 30 requests that write, the start of a run 10.
    left = [1, 2, 4, *rng.sample(range(5, 45), 9)]

    def kill(method, url):
        if method not in _WRITES or not left:
            return None
        writes[0] += 1
        if writes[0] < left[0]:
            return None
        while not (pid := job / "pid").exists() or not pid.read_text():
            time.sleep(0.01)
        os.kill(int(pid.read_text()), signal.SIGKILL)
        killed.append(url)
        left.pop(0)
        writes[0] = 0
        # Half of the requests are carried out all the same, without anybody to hear of it.
        return HTTPStatus.SERVICE_UNAVAILABLE if len(killed) % 2 else None

    server.intercept = kill
    kills, code, text = _train(folder, job)
    assert (kills, code) == (12, 0), text
    assert any("checkpoints" in url for url in killed)
    assert _result(RunFolder(folder)) == expected


def test_a_second_trainer_is_refused_and_the_first_is_not_disturbed(folder, tmp_path, server):
    waiting, flags = tmp_path / "log", [*_FLAGS, f"--workdir={folder}", "--config.train.seed=0"]
    long = "--config.train.train_steps=100000"
    with waiting.open("w") as log:
        first = subprocess.Popen(
            command("main", *flags, long), cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    try:
        while not RunFolder(folder).metrics():
            assert first.poll() is None, waiting.read_text()
            time.sleep(0.1)
        with (
            pytest.raises(UserError, match=rf"another train process \(host .*, pid {first.pid}\)"),
            RunFolder(folder).writer_lock("train"),
        ):
            pass
        second = subprocess.run(
            command("main", *flags, long),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 2
        (line,) = [x for x in second.stderr.splitlines() if x.startswith("error: ")]
        assert f"--workdir={folder}: another train process" in line
        assert first.poll() is None
    finally:
        first.terminate()
        assert first.wait(timeout=30) == 75, waiting.read_text()
    assert not (folder / ".train.lock").exists()


def test_a_checkpoint_that_is_read_is_not_deleted(folder, monkeypatch):
    run = RunFolder(folder)
    for step in (1, 2, 3):
        (run.checkpoints / str(step) / "x").write_bytes(b"1")
        manifest.write_manifest(run.checkpoints / str(step), step)
    with manifest.pinned(run, 2) as is_there, manifest.deletable(run, [1, 2]) as free:
        assert is_there
        assert free == {1}
        # What is announced cannot be pinned any more.
        with manifest.pinned(run, 1) as is_there:
            assert not is_there
    with manifest.deletable(run, [1, 2]) as free:
        assert free == {1, 2}
    # The pin of a reader that was killed is taken for alive until it has not changed for long.
    monkeypatch.setattr(manifest, "LEASE_SECS", 3.0)
    pin = run.reading / f"2.77.{'0' * 32}"
    pin.write_bytes(b"1")
    for secs, expected in ((0.0, {1}), (0.0, {1}), (3.1, {1, 2})):
        time.sleep(secs)
        with manifest.deletable(run, [1, 2]) as free:
            assert free == expected
    assert not pin.exists()


def test_best_is_not_written_over_what_another_evaluation_chose(folder):
    from cascaded_diffusion.files.json_files import write_json
    from cascaded_diffusion.files.whole import generation_of

    run = RunFolder(folder)
    seen = generation_of(run.best_path)
    write_json(run.best_path, {"step": 1, "ema_decay": 0.9})
    with pytest.raises(OSError, match=r"best\.json: was written or removed by another process"):
        write_json(run.best_path, {"step": 2, "ema_decay": 0.9}, expected=seen)
    assert run.best()["step"] == 1


def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(folder):
    run = RunFolder(folder)
    (folder / "saved.json").write_bytes(b'{"step": 8}')
    with pytest.raises(UserError, match=r"saved\.json says that one was.*--start_over"):
        manifest.newest_intact(run, start_over=False, say=print)
    assert manifest.newest_intact(run, start_over=True, say=print) is None
    assert (folder / "lost_run_1" / "saved.json").is_file()


def test_a_path_on_this_machine_is_none_in_a_bucket(tmp_path):
    assert isinstance(RunFolder(tmp_path).path, pathlib.Path)
    assert isinstance(RunFolder("gs://bucket/run").path, BucketPath)


def test_a_trace_goes_to_the_bucket_when_it_is_complete(folder):
    import jax
    import jax.numpy as jnp

    from cascaded_diffusion.runtime.monitor import StepProfiler

    profiler = StepProfiler(folder / "profile", (1, 2))
    for step in (1, 2):
        profiler.before(step)
        result = jax.jit(lambda x: x + 1)(jnp.zeros(3))
        said = profiler.after(step, result)
    assert f"{folder}/profile" in said
    assert [n for n in files_below(folder / "profile") if n.endswith(".xplane.pb")]
