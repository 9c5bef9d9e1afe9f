"""An evaluation by several processes gives the record of one, to the last bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.sample_store import SampleStore
from cascaded_diffusion.evaluation.team import Order, Team, features_in, with_features
from cascaded_diffusion.files.json_files import read_lines, write_json
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.evaluation.stubs import Extractor
from tests.tiny import ROOT, smallest_base
from tests.training.test_distributed import _free_address
from tests.training.test_training import _train
from tests.xla import NO_OPTIMIZATION

CONFIG = smallest_base(
    train__train_steps=4,
    train__warmup_steps=1,
    checkpoint__save_every_steps=2,
    checkpoint__max_to_keep=5,
    eval__num_samples=70,
    eval__batch_size=10,
    eval__patience_evals=100,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_layer):
    folder = RunFolder(tmp_path_factory.mktemp("team") / "runs" / "base16")
    _train(CONFIG, folder.path)
    return folder


def _start(folder, count):
    """As many processes of one device, and where they print."""
    address, env = _free_address(), {**os.environ, "XLA_FLAGS": NO_OPTIMIZATION}
    processes = []
    for i in range(count):
        command = [sys.executable, "-m", "tests.evaluation.team_job", str(folder.path)]
        log = folder.path.with_name(f"{count}.{i}.log")
        with log.open("w") as f:
            command += [address, str(count), str(i)]
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=f)
        processes.append((process, log))
    return processes


def _wait(processes):
    codes = [p.wait(timeout=300) for p, _ in processes]
    texts = [log.read_text() for _, log in processes]
    assert codes == [0] * len(codes), "\n".join(texts)
    return [text.count("made a batch") for text in texts]


def _outcome(folder):
    """All that an evaluation leaves."""
    (path,) = folder.eval.glob("final_*.json")
    arrays = read_arrays(path.with_suffix(".npz"))
    return (
        read_lines(folder.results_path),
        json.loads(folder.best_path.read_text()),
        json.loads(path.read_text()),
        {name: x.tobytes() for name, x in arrays.items()},
        read_lines(folder.path.parent / "sweep" / "base16.jsonl"),
    )


def _copy(trained, name):
    copied = shutil.copytree(trained.path.parent, trained.path.parent.with_name(name))
    return RunFolder(copied / trained.path.name)


def test_two_processes_and_four_after_a_kill_give_the_record_of_one(trained):
    alone = _copy(trained, "alone")
    (batches,) = _wait(_start(alone, 1))
    # Two checkpoints of 70 samples, the final 50, two settings of 30.
    assert batches == 2 * 7 + 5 + 2 * 3
    expected = _outcome(alone)
    assert len(expected[0]) > 2
    assert len(expected[-1]) == 2

    together = _copy(trained, "together")
    assert _wait(_start(together, 2)) == [4 + 4 + 3 + 2 + 2, 3 + 3 + 2 + 1 + 1]
    assert _outcome(together) == expected
    assert not any(together.samples.iterdir())

    killed = _copy(trained, "killed")
    processes = _start(killed, 2)
    while not list(killed.samples.rglob("0*.npz")):
        assert all(p.poll() is None for p, _ in processes)
    for process, _ in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    made = len(list(killed.samples.rglob("0*.npz")))
    assert sum(_wait(_start(killed, 4))) == batches - made
    assert _outcome(killed) == expected


def test_features_come_with_the_images():
    def make(indices):
        return {"images": np.full((len(indices), 8, 8, 1), 7, np.uint8), "labels": indices}

    extractor = Extractor(spatial=True)
    arrays = with_features(make, extractor)(np.arange(3))
    assert set(arrays) == {
        *("images", "labels", "features_pooled", "features_logits", "features_spatial")
    }
    found, expected = features_in(arrays), extractor(arrays["images"])
    for name in ("pooled", "logits", "spatial"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert features_in(with_features(make, Extractor())(np.arange(3))).spatial is None


@pytest.fixture
def team(tmp_path, monkeypatch):
    """Process 0 of two, which reads no collective."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("cascaded_diffusion.runtime.mesh.broadcast_from_process_0", list)
    monkeypatch.setattr("cascaded_diffusion.runtime.mesh.check_shared", lambda *a: None)
    return Team(RunFolder(tmp_path / "run"))


def _store(folder):
    return SampleStore(folder / "samples", {"of": "these"}, num_samples=4, batch_size=2)


def _make(indices):
    return {"images": np.zeros((len(indices), 2, 2, 1), np.uint8)}


def test_an_order_that_comes_while_others_prepare_is_not_lost(team, tmp_path):
    store = _store(tmp_path)
    record = {"job": team._job, "number": 2, "kind": "samples", "store": store.number}
    write_json(tmp_path / "run/eval/work.json", record)
    team.await_ready()
    assert next(team._orders()) == record


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ({"samples": True, "error": "a sample is not finite"}, ValueError),
        ({"samples": False, "error": "process 1: no space left"}, OSError),
    ],
)
def test_who_leads_learns_why_another_cannot_go_on(team, tmp_path, failure, error):
    store = _store(tmp_path)

    def make(indices):
        write_json(store.failed, failure)
        return _make(indices)

    with team.leading(), pytest.raises(error, match=failure["error"]):
        team.fill(store, make, {}, label="")
    assert json.loads((tmp_path / "run/eval/work.json").read_text())["kind"] == "end"


def _orders(team, store, *more):
    return [{"job": team._job, "number": 1, "kind": "samples", "store": store.number}, *more]


def test_orders_are_carried_out_once_until_the_end(team, tmp_path, monkeypatch):
    store, work = _store(tmp_path), pathlib.Path(tmp_path / "run/eval/work.json")
    stale = {"job": team._job + 1, "number": 9, "kind": "samples", "store": store.number}
    write_json(work, stale)
    orders = iter(_orders(team, store, {"job": team._job, "number": 2, "kind": "end"}))
    monkeypatch.setattr("time.sleep", lambda secs: write_json(work, next(orders)))
    understood = []

    def understand(record):
        understood.append(record["number"])
        return Order(store, _make)

    team.help(understand)
    assert understood == [1]
    assert store.missing() == [1]  # the other process makes it


def test_other_samples_than_those_of_process_0_end_a_process(team, tmp_path):
    store = _store(tmp_path)
    (record,) = _orders(team, store)
    other = SampleStore(tmp_path / "samples", {"of": "others"}, num_samples=4, batch_size=2)
    with pytest.raises(UserError, match="other samples to make than process 0, as other check"):
        team._carry_out(record, lambda record: Order(other, _make))


def test_when_who_leads_fails_the_others_do(team, tmp_path):
    with pytest.raises(RuntimeError), team.leading():
        raise RuntimeError
    team._number = 0
    with pytest.raises(UserError, match="process 0 failed, see what it printed"):
        team.help(lambda record: None)


def test_who_helps_says_what_is_wrong(team, tmp_path, monkeypatch):
    store = _store(tmp_path)
    (record,) = _orders(team, store)
    for error, samples in ((ValueError, True), (UserError, False), (OSError, False)):

        def fails(indices, error=error):
            raise error("it is broken")

        team._carry_out(record, lambda record, make=fails: Order(store, make))
        said = json.loads(store.failed.read_text())
        about = "it is broken" if samples else "process 0: it is broken"
        assert said == {"samples": samples, "error": about}

    def full(path, value):
        raise OSError("no space left")

    monkeypatch.setattr("cascaded_diffusion.evaluation.team.write_json", full)
    with pytest.raises(OSError, match="it is broken"):
        team._carry_out(record, lambda record: Order(store, fails))
