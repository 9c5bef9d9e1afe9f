"""Processes that meet before JAX connects them, and those that do not."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import meeting
from cascaded_diffusion.runtime.cluster import Cluster
from cascaded_diffusion.runtime.meeting import meet
from tests.tiny import ROOT


@pytest.fixture
def address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def _meet_all(address, facts, timeout_secs=20.0, ids=None, num_processes=None):
    """What each process is told: None, or the text of its error."""
    ids = range(len(facts)) if ids is None else ids
    found = {}

    def run(place, i, facts):
        try:
            cluster = Cluster(address, num_processes or len(ids), i)
            for peer in meet(cluster, facts, timeout_secs=timeout_secs):
                peer.connection.close()
            found[place] = None
        except UserError as e:
            found[place] = str(e)

    threads = [
        threading.Thread(target=run, args=(n, i, f))
        for n, (i, f) in enumerate(zip(ids, facts, strict=True))
    ]
    for t in reversed(threads):  # process 0 comes last
        t.start()
        time.sleep(0.05)
    for t in threads:
        t.join()
    return [found[n] for n in range(len(threads))]


def test_all_go_on_when_all_have_come(address):
    assert _meet_all(address, [{"config.seed": 1}] * 4) == [None] * 4
    # The port is free again, for JAX.
    assert _meet_all(address, [{"config.seed": 1}] * 2) == [None] * 2


def test_a_difference_is_named_to_all(address):
    facts = [{"config.train.seed": 0, "package jax": "1"} for _ in range(3)]
    facts[2] = {"config.train.seed": 7, "package jax": "1"}
    for text in _meet_all(address, facts):
        assert text == (
            "process 2 differs from process 0: config.train.seed is 7 there and 0 in process 0;"
            " start all with the same command and versions"
        )


def test_one_that_does_not_come_is_named(address):
    start = time.monotonic()
    told = _meet_all(address, [{}] * 2, timeout_secs=1.5, num_processes=4)
    assert time.monotonic() - start < 15
    for text in told:
        assert text.startswith(f"process 2, 3 of 4 did not come to {address} within 1.5 s")


def test_a_coordinator_that_is_not_there_is_named_in_the_stated_time(address):
    start = time.monotonic()
    with pytest.raises(UserError, match=f"--coordinator={address}: cannot be reached within 1 s"):
        meet(Cluster(address, 2, 1), {}, timeout_secs=1.0)
    assert time.monotonic() - start < 5


def test_two_with_one_number_and_other_counts_are_refused(address):
    told = _meet_all(address, [{}] * 3, ids=[0, 1, 1], num_processes=3)
    assert "two processes came with --process_id=1" in told[0]


def test_a_busy_port_and_another_program_are_said(address):
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:
        with pytest.raises(UserError, match="process 0 cannot listen there"):
            meet(Cluster(address, 2, 0), {}, timeout_secs=1.0)

        def answer():
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="cannot be reached within 1 s"):
            meet(Cluster(address, 2, 1), {}, timeout_secs=1.0)


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4000, b"[1, 2]\n", b'{"greeting": 1}\n', b""],
)
def test_strangers_at_the_door_change_nothing(address, noise):
    host, port = address.split(":")
    done = threading.Event()

    def knock():
        while not done.is_set():
            try:
                with socket.create_connection((host, int(port)), timeout=1) as s:
                    s.sendall(noise)
                    s.settimeout(0.2)
                    s.recv(10)
            except OSError:
                pass
            time.sleep(0.01)

    knocker = threading.Thread(target=knock, daemon=True)
    knocker.start()
    try:
        assert _meet_all(address, [{"a": 1}] * 3) == [None] * 3
    finally:
        done.set()
        knocker.join()


def test_main_ends_with_one_line_when_nobody_is_there(address):
    command = [sys.executable, "-m", "cascaded_diffusion.main", "--workdir=/tmp/not_made"]
    command += ["--config=configs/mnist_base16.py:smoke", f"--coordinator={address}"]
    command += ["--num_processes=2", "--process_id=1", "--coordinator_timeout_secs=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --coordinator={address}: cannot be reached within 1 s")
    assert len(result.stderr.splitlines()) == 1


def test_differences_of_configs_reach_the_user(address):
    command = [sys.executable, "-m", "cascaded_diffusion.main", "--workdir=/tmp/not_made"]
    command += ["--config=configs/mnist_base16.py:smoke", f"--coordinator={address}"]
    command += ["--num_processes=2", "--coordinator_timeout_secs=60"]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}", f"--config.train.seed={5 + i}"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for p in processes:
        _, err = p.communicate(timeout=120)
        assert p.returncode == 2
        assert err == (
            "error: process 1 differs from process 0: config.train.seed is 6 there and 5 in"
            " process 0; start all with the same command and versions\n"
        )


def test_messages_are_json_and_short():
    assert meeting._message(b"x" * 10) is None
    whole = {"greeting": meeting._GREETING, "process_id": 1, "num_processes": 2, "facts": {}}
    whole["host"] = "here"
    assert meeting._message(json.dumps(whole).encode()) == whole
    assert meeting._message(json.dumps({**whole, "process_id": "1"}).encode()) is None
