"""The processes of a job meet and compare how they are configured, before JAX connects them.

Process 0 waits at the coordinator's address, each process reports its configuration, and all
continue only if all have come and agree. If a process is late or differs, every process exits with
one line naming it. JAX by itself ends a process whose peers do not come with a stack of C++
frames, and processes with different configs hang in the first collective.

Messages are lines of JSON of limited length. Process 0 listens on the coordinator's address only,
and only while it waits.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.cluster import Cluster

_GREETING = "cascaded_diffusion cluster 1"
_MAX_LINE = 1 << 20
_RETRY_SECS = 0.2
# After a problem was found: how long to wait for the other processes, to tell them as well.
_GRACE_SECS = 5.0


def meet(cluster: Cluster, facts: Mapping[str, Any], *, timeout_secs: float) -> None:
    """Returns when all processes have come to the coordinator's address and agree.

    Args:
      cluster: this process.
      facts: what must be equal in all processes; JSON values.
      timeout_secs: how long to wait for the others.

    Raises:
      UserError: the address cannot be reached, or a process is late or has other facts. Every
        process that came raises the same error.
    """
    if cluster.num_processes == 1:
        return
    facts = json.loads(json.dumps(dict(facts)))
    if cluster.process_id == 0:
        _wait_for_others(cluster, facts, time.monotonic() + timeout_secs, timeout_secs)
    else:
        _report(cluster, facts, time.monotonic() + timeout_secs, timeout_secs)


def _wait_for_others(
    cluster: Cluster, facts: Mapping[str, Any], deadline: float, timeout_secs: float
) -> None:
    others = range(1, cluster.num_processes)
    came: dict[int, socket.socket] = {}
    problem = None
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listening(cluster))
        waiting: dict[socket.socket, bytes] = {}
        while len(came) < len(others):
            left = deadline - time.monotonic()
            if left <= 0 and problem is not None:
                break
            if left <= 0:
                absent = [str(i) for i in others if i not in came]
                problem = (
                    f"process {', '.join(absent)} of {cluster.num_processes} did not come to"
                    f" {cluster.coordinator} within {timeout_secs:g} s; see what is printed there,"
                    " or wait longer with --coordinator_timeout_secs"
                )
                break
            ready, _, _ = select.select([server, *waiting], [], [], min(left, 1.0))
            for connection in ready:
                if connection is server:
                    new, _ = server.accept()
                    new.setblocking(False)
                    waiting[stack.enter_context(new)] = b""
                    continue
                text = _received(connection, waiting)
                if text is None:
                    continue
                del waiting[connection]
                message = _message(text)
                if message is None:  # somebody else knocked
                    connection.close()
                    continue
                if problem is None:
                    problem = _problem_with(message, cluster, facts, came)
                    if problem is not None:
                        deadline = min(deadline, time.monotonic() + _GRACE_SECS)
                # A second process of the same number is told as well.
                place = message["process_id"]
                came[place if place not in came else -len(came)] = connection
        answer = json.dumps({"greeting": _GREETING, "problem": problem}).encode() + b"\n"
        for connection in came.values():
            with contextlib.suppress(OSError):
                connection.setblocking(True)
                connection.sendall(answer)
    if problem is not None:
        raise UserError(problem)


def _listening(cluster: Cluster) -> socket.socket:
    host, port = cluster.address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((host, port), family=family, backlog=1024)
        server.setblocking(False)
        return server
    except OSError as e:
        raise UserError(
            f"--coordinator={cluster.coordinator}: process 0 cannot listen there"
            f" ({e.strerror or e}); give an address of its own machine and a free port, and"
            " --process_id=0 to one process alone"
        ) from e


def _received(connection: socket.socket, waiting: dict[socket.socket, bytes]) -> bytes | None:
    """A whole line, or what there is of it at the end; None if more is to come."""
    try:
        data = connection.recv(1 << 16)
    except BlockingIOError:
        return None
    except OSError:
        return b"\n"
    waiting[connection] += data
    text = waiting[connection]
    if not data or b"\n" in text or len(text) > _MAX_LINE:
        return text
    return None


def _message(text: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(text)
        whole = (
            message["greeting"] == _GREETING
            and isinstance(message["process_id"], int)
            and isinstance(message["num_processes"], int)
            and isinstance(message["facts"], dict)
        )
    except (ValueError, KeyError, TypeError):
        return None
    return message if whole else None


def _differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """How the facts of another process differ from those of process 0, a few words each."""
    return [
        f"{name} is {other.get(name)!r} there and {mine.get(name)!r} in process 0"
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name) != other.get(name)
    ]


def _problem_with(
    message: Mapping[str, Any],
    cluster: Cluster,
    facts: Mapping[str, Any],
    came: Mapping[int, socket.socket],
) -> str | None:
    other = message["process_id"]
    if message["num_processes"] != cluster.num_processes:
        return (
            f"process {other} was started with --num_processes={message['num_processes']},"
            f" process 0 with {cluster.num_processes}"
        )
    if other in came or not 0 < other < cluster.num_processes:
        return f"two processes came with --process_id={other}; give each its own, from 0"
    found = _differences(facts, message["facts"])
    if not found:
        return None
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"process {other} differs from process 0: {'; '.join(found[:3])}{more}; start all with the"
        " same command and versions"
    )


def _report(
    cluster: Cluster, facts: Mapping[str, Any], deadline: float, timeout_secs: float
) -> None:
    message = {
        "greeting": _GREETING,
        "process_id": cluster.process_id,
        "num_processes": cluster.num_processes,
        "facts": facts,
    }
    reason = "no answer"
    while time.monotonic() < deadline:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection(cluster.address, timeout=max(left, 0.1)) as connection:
                connection.sendall(json.dumps(message).encode() + b"\n")
                # Process 0 says when others are late; it is given a moment to do so.
                connection.settimeout(max(deadline - time.monotonic(), 0.1) + 5.0)
                answer = json.loads(connection.makefile("rb").readline(_MAX_LINE) or b"{}")
            if answer.get("greeting") == _GREETING:
                if answer["problem"] is not None:
                    raise UserError(answer["problem"])
                return
            reason = "another program answers there"
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        time.sleep(_RETRY_SECS)
    raise UserError(
        f"--coordinator={cluster.coordinator}: cannot be reached within {timeout_secs:g} s"
        f" ({reason}); is process 0 running, and the port open? --coordinator_timeout_secs waits"
        " longer"
    )
