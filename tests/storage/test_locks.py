"""Locks in a bucket: one writer, whoever sleeps or dies."""

import json
import subprocess
import sys
import time
from http import HTTPStatus

import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files import locks
from cascaded_diffusion.files.locks import Lease, held_lock

_HOLD = """
import sys, time
from cascaded_diffusion.files.bucket import BucketPath
from cascaded_diffusion.files.locks import held_lock
with held_lock(BucketPath(sys.argv[1]), "train", "workdir"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECS", 1.5)
    monkeypatch.setattr(locks, "_BEAT_SECS", 0.2)
    monkeypatch.setattr(locks, "_POLL_SECS", 0.1)


@pytest.fixture
def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_refused_within_five_seconds(folder, holder):
    start = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"another train process \(host .*, pid {holder.pid}\)"),
        held_lock(folder, "train", "workdir"),
    ):
        pass
    assert time.monotonic() - start < 5
    with held_lock(folder, "eval", "workdir") as lock:
        assert not lock.is_lost()


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(folder, holder):
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with held_lock(folder, "train", "workdir") as lock:
        assert not lock.is_lost()
        assert time.monotonic() - start < 2
    assert not folder.exists()


@pytest.mark.parametrize("data", [b'{"host": "other", "pid": 1, "sees": "x"}', b"nonsense", b"[]"])
def test_the_lock_of_a_machine_that_is_gone_is_taken_over(folder, quick, capsys, data):
    (folder / ".train.lock").write_bytes(data)
    start = time.monotonic()
    with held_lock(folder, "train", "workdir") as lock:
        assert not lock.is_lost()
    assert 1.4 < time.monotonic() - start < 5
    assert "waiting up to 2 s to see whether that process is alive" in capsys.readouterr().err


def test_the_lock_of_another_machine_that_lives_is_not(folder, quick):
    about = {"host": "other", "pid": 1, "sees": "x"}
    with Lease(folder / ".train.lock") as lease:
        lease._about = about
        lease._beat()
        with (
            pytest.raises(UserError, match=r"another train process \(host other, pid 1\)"),
            held_lock(folder, "train", "workdir"),
        ):
            pass


def test_who_slept_too_long_has_lost_the_lock(folder, quick):
    with held_lock(folder, "train", "workdir") as lock:
        lock._end.set()  # as a stopped process does not beat
        lock._thread.join()
        with held_lock(folder, "train", "workdir") as other:
            assert lock.is_lost()
            assert not other.is_lost()
        # Gone or not, it is not this process's any more.
        assert lock.is_lost()


def test_who_slept_and_was_not_replaced_goes_on(folder, quick):
    with held_lock(folder, "train", "workdir") as lock:
        lock._end.set()
        lock._thread.join()
        time.sleep(1.0)
        assert not lock.is_lost()


def test_of_two_who_take_over_one_succeeds(folder, quick):
    path = folder / ".train.lock"
    path.write_bytes(b"nonsense")
    _, generation = path.read_versioned()
    with Lease(path, expected=generation), pytest.raises(OSError, match="by another process"):
        Lease(path, expected=generation).__enter__()


def test_what_a_lock_says_is_no_secret_and_names_the_holder(folder):
    with held_lock(folder, "train", "workdir"):
        about = json.loads((folder / ".train.lock").read_bytes())
    assert about.keys() == {"host", "pid", "sees", "token", "beats"}


def test_a_beat_that_landed_unanswered_is_its_own(folder):
    with held_lock(folder, "train", "workdir") as lock:
        with lock._lock:
            # As a write that was carried out after this process had given it up.
            about = {**lock._about, "beats": 99}
            (folder / ".train.lock").write_bytes(json.dumps(about).encode())
        lock._beat()
        lock._beat()
        assert not lock.is_lost()
    assert not folder.exists()


def test_an_outage_is_waited_for_and_loses_no_lock(folder, quick, server):
    with held_lock(folder, "train", "workdir") as lock:
        start = time.monotonic()

        def refuse(method, url):
            return HTTPStatus.SERVICE_UNAVAILABLE if time.monotonic() < start + 2.5 else None

        server.intercept = refuse
        time.sleep(1.2)
        assert not lock.is_lost()
        assert time.monotonic() - start > 2
        server.intercept = lambda *_: None
    assert not folder.exists()
