"""Whether the processes of a job are all still there.

Every process holds a connection to process 0, on which both say every second that they live, and
farewell when they end. Whoever is gone without a farewell was killed; whoever is silent for long
hangs, was stopped, or is on a host that cannot be reached any more. Then every process ends at once
with one line that names the host, so that a launch script can start all of them again: in a
collective, they would wait for each other. A process that fails by itself tells why.

Messages are lines of JSON. JAX has heartbeats of its own, which end a process with a stack of C++
frames, after a minute and a half.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from cascaded_diffusion.errors import EXIT_BAD_INPUT, EXIT_TRY_AGAIN

_BEAT_SECS = 1.0
# A process whose collective fails, since a peer is gone, learns within this time that it is so.
_VERDICT_SECS = 1.5
# Others may fail at the same moment and for the same reason; they end by themselves.
_GRACE_SECS = 0.3
# For the others to end before process 0 does, whose end JAX answers with a stack of C++ frames.
_LAST_SECS = 1.0
_MAX_MESSAGE = 1 << 16


@dataclasses.dataclass
class Peer:
    """Another process of the job, and this process's connection to it."""

    process_id: int
    host: str
    connection: socket.socket
    heard: float = 0.0  # when it last said something, by the monotonic clock
    received: bytes = b""  # the beginning of a message

    @property
    def name(self) -> str:
        return f"process {self.process_id} on {self.host}"


def _end(line: str, code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.write(2, f"error: {line}\n".encode(errors="backslashreplace"))
    os._exit(code)


class PeerWatch:
    """Ends this process if one of its peers does not live any more.

    Process 0 watches all others, the others watch process 0, which tells them. `end` is called in
    a thread, with a line and an exit code.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        *,
        timeout_secs: float,
        end: Callable[[str, int], None] = _end,
    ):
        self._peers, self._timeout_secs, self._end = list(peers), timeout_secs, end
        self._is_first = all(peer.process_id for peer in self._peers)
        self._leaving, self._closed = threading.Event(), False
        self._finishing, self._done, self._all_done = False, set[int](), threading.Event()
        now = time.monotonic()
        self._selector = selectors.DefaultSelector()
        for peer in self._peers:
            peer.heard = now
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def farewell(self, failure: str | None = None) -> None:
        """Says that this process ends, and why if it has failed. Nothing is watched any more."""
        if self._closed:
            return
        self._closed = True
        self._leaving.set()
        self._thread.join()
        if failure is not None and self._is_first:
            failure = f"process 0 on {socket.gethostname()} failed: {failure}"
        self._tell_all({"left": True} if failure is None else {"failed": failure})
        if failure is not None and self._is_first:
            time.sleep(_LAST_SECS)
        for peer in self._peers:
            peer.connection.close()
        self._selector.close()

    def await_others(self) -> None:
        """Waits for the others to come to their end, too; they may still fail or be lost."""
        self._finishing = True
        if not self._is_first:
            self._tell_all({"done": True})
        while not self._all_done.wait(_BEAT_SECS):
            if self._leaving.is_set() or not self._peers:
                return

    def await_verdict(self) -> None:
        """Waits a moment, in which this process ends if its error comes from a peer's end."""
        if self._peers:
            self._leaving.wait(_VERDICT_SECS)

    def _run(self) -> None:
        next_beat = time.monotonic()
        while not self._leaving.is_set() and self._peers:
            for key, _ in self._selector.select(timeout=_BEAT_SECS / 4):
                self._receive(key.data)
            others = {peer.process_id for peer in self._peers}
            if self._finishing and self._is_first and others <= self._done:
                self._finishing = False
                self._tell_all({"all_done": True})
                self._all_done.set()
            now = time.monotonic()
            if now >= next_beat:
                self._tell_all({"alive": True})
                next_beat = now + _BEAT_SECS
            silent = [peer for peer in self._peers if now - peer.heard > self._timeout_secs]
            if silent and not self._leaving.is_set():
                self._lose(
                    f"{silent[0].name} has not answered for {now - silent[0].heard:.0f} s: it"
                    " hangs, was stopped, or its host cannot be reached (--peer_timeout_secs)"
                )

    def _receive(self, peer: Peer) -> None:
        try:
            received = peer.connection.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._lose(f"{peer.name} is gone: it was killed, or its host was")
            return
        peer.heard = time.monotonic()
        *lines, peer.received = (peer.received + received).split(b"\n")
        peer.received = peer.received[-_MAX_MESSAGE:]
        for line in lines:
            with contextlib.suppress(ValueError):
                self._heed(peer, json.loads(line))

    def _heed(self, peer: Peer, message: object) -> None:
        if not isinstance(message, dict):
            return
        if "lost" in message:
            self._lose(str(message["lost"]))
        elif "left" in message:
            self._forget(peer)
        elif "done" in message:
            self._done.add(peer.process_id)
        elif "all_done" in message:
            self._all_done.set()
        elif "failed" in message:
            line = str(message["failed"])
            if peer.process_id:  # those that process 0 tells know who has failed
                line = f"{peer.name} failed: {line}"
            self._tell_all({"failed": line})
            grace = _LAST_SECS if self._is_first else _GRACE_SECS
            self._forget(peer)
            if not self._leaving.wait(grace):
                self._end(line, EXIT_BAD_INPUT)

    def _lose(self, line: str) -> None:
        self._tell_all({"lost": line})
        ending = "the job cannot go on without it; run the same command again"
        self._end(line if ending in line else f"{line}; {ending}", EXIT_TRY_AGAIN)
        self._leaving.set()

    def _forget(self, peer: Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.remove(peer)

    def _tell_all(self, message: dict[str, object]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for peer in self._peers:
            # Whoever is gone is noticed by its silence.
            with contextlib.suppress(OSError):
                peer.connection.sendall(line)


@dataclasses.dataclass
class Job:
    """The job that this process belongs to, if it has several processes."""

    _watch: PeerWatch | None = None

    @property
    def has_peers(self) -> bool:
        """Whether other processes are watched."""
        return self._watch is not None

    def watch(self, peers: Sequence[Peer], *, timeout_secs: float) -> None:
        """Watches the peers until this process ends. JAX must connect the processes later."""
        if peers:
            self._watch = PeerWatch(peers, timeout_secs=timeout_secs)
            # What is registered first is called last: JAX's processes wait for each other before.
            atexit.register(self.farewell)

    def connected_by_jax(self) -> None:
        """Called when JAX has connected the processes, which it has wait for each other at the end.

        While they do, nothing else of Python runs. So they first wait here.
        """
        if self._watch is not None:
            atexit.register(self._watch.await_others)

    def await_verdict(self) -> None:
        """See `PeerWatch.await_verdict`."""
        if self._watch is not None:
            self._watch.await_verdict()

    def farewell(self, failure: str | None = None) -> None:
        """See `PeerWatch.farewell`."""
        if self._watch is not None:
            self._watch.farewell(failure)


JOB = Job()
