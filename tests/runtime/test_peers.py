"""Processes that watch each other, as threads with pairs of sockets."""

import queue
import socket
import threading
import time

import pytest

from cascaded_diffusion.runtime import peers
from cascaded_diffusion.runtime.peers import Peer, PeerWatch


@pytest.fixture
def job(monkeypatch):
    """Makes the watches of process 0 and of so many others, and what each of them ended with."""
    monkeypatch.setattr(peers, "_BEAT_SECS", 0.1)
    monkeypatch.setattr(peers, "_GRACE_SECS", 0.1)
    watches = []

    def make(others, timeout_secs=20.0):
        pairs = [socket.socketpair() for _ in range(others)]
        ends = [queue.Queue() for _ in range(others + 1)]
        lists = [[Peer(i + 1, f"host{i + 1}", pairs[i][0]) for i in range(others)]]
        lists += [[Peer(0, "host0", pair[1])] for pair in pairs]
        for mine, end in zip(lists, ends, strict=True):
            watch = PeerWatch(
                mine, timeout_secs=timeout_secs, end=lambda *told, end=end: end.put(told)
            )
            watches.append(watch)
        return watches, ends

    yield make
    for watch in watches:
        watch.farewell()


def test_who_leaves_with_a_farewell_is_not_missed(job):
    watches, ends = job(2)
    watches[1].farewell()
    watches[0].farewell()
    time.sleep(0.3)
    assert all(end.empty() for end in ends)
    watches[2].await_verdict()


def test_all_end_when_a_connection_closes(job):
    watches, ends = job(3)
    watches[2]._leaving.set()  # its thread says nothing any more
    watches[2]._thread.join()
    watches[2]._peers[0].connection.close()
    for i in (0, 1, 3):
        line, code = ends[i].get(timeout=10)
        assert line == (
            "process 2 on host2 is gone: it was killed, or its host was; the job cannot go on"
            " without it; run the same command again"
        )
        assert code == 75
    assert ends[2].empty()


def test_silence_is_a_loss(job):
    watches, ends = job(2, timeout_secs=1.0)
    watches[1]._leaving.set()
    line, code = ends[0].get(timeout=10)
    assert line.startswith("process 1 on host1 has not answered for 1 s: it hangs, was stopped")
    assert code == 75
    assert ends[2].get(timeout=10) == (line, code)


def test_who_fails_says_why(job):
    watches, ends = job(2)
    watches[1].farewell("config.train.seed = -1: expected more")
    said = ("process 1 on host1 failed: config.train.seed = -1: expected more", 2)
    assert ends[0].get(timeout=10) == said
    assert ends[2].get(timeout=10) == said


def test_all_wait_for_the_last_to_come_to_its_end(job):
    watches, ends = job(2)
    waiting = [threading.Thread(target=watches[i].await_others) for i in (0, 1)]
    for thread in waiting:
        thread.start()
    time.sleep(0.4)
    assert all(thread.is_alive() for thread in waiting)
    watches[2].await_others()
    for thread in waiting:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert all(end.empty() for end in ends)


@pytest.mark.parametrize("noise", [b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b"x" * 200_000])
def test_noise_is_no_loss(job, noise):
    watches, ends = job(1)
    watches[1]._peers[0].connection.setblocking(True)
    watches[1]._peers[0].connection.sendall(noise)
    time.sleep(0.4)
    assert all(end.empty() for end in ends)
    assert watches[0]._thread.is_alive()
