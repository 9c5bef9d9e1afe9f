"""The processes of a job meet and compare how they are configured, before JAX connects them.

Process 0 waits at the coordinator's address, each process reports its configuration, and all
continue only if all have come and agree. If a process is late or differs, every process exits with
one line naming it. JAX by itself ends a process whose peers do not come with a stack of C++
frames, and processes with different configs hang in the first collective.

Messages are lines of JSON of limited length. Process 0 listens on the coordinator's address only,
and only while it waits. The connections stay for the `peers` to be watched.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Collection, Mapping

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.runtime.cluster import Cluster
from cascaded_diffusion.runtime.peers import Peer

_GREETING = "cascaded_diffusion cluster 2"
_MAX_LINE = 1 << 20
_RETRY_SECS = 0.2
# After a problem was found: how long to wait for the other processes, to tell them as well.
_GRACE_SECS = 5.0


def meet(cluster: Cluster, facts: Mapping[str, object], *, timeout_secs: float) -> list[Peer]:
    """Returns when all processes have come to the coordinator and agree on the facts (JSON values).

    The result are the open connections: of process 0 to all others, of the others to process 0.

    Raises UserError in every process that came if one is late or has other facts, and if the
    address cannot be reached.
    """
    if cluster.num_processes == 1:
        return []
    facts = json.loads(json.dumps(dict(facts)))
    if cluster.process_id == 0:
        return asyncio.run(_gather_all(cluster, facts, timeout_secs))
    return [_report(cluster, facts, timeout_secs)]


async def _gather_all(
    cluster: Cluster, facts: Mapping[str, object], timeout_secs: float
) -> list[Peer]:
    """Process 0: waits for the others, and tells them of a problem, which it raises."""
    arrivals: asyncio.Queue[tuple[Record, asyncio.StreamWriter]] = asyncio.Queue()
    connections: list[asyncio.StreamWriter] = []

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            message = _message(await reader.readline())
        except (OSError, ValueError):  # the connection is gone, or the line is too long
            message = None
        if message is None:  # somebody else knocked
            writer.close()
        else:
            arrivals.put_nowait((message, writer))

    others = range(1, cluster.num_processes)
    came: dict[int, asyncio.StreamWriter] = {}
    hosts: dict[int, str] = {}
    problem = None
    server = await asyncio.start_server(receive, sock=_listening(cluster), limit=_MAX_LINE)
    try:
        async with asyncio.timeout(timeout_secs) as limit:
            while len(came) < len(others):
                message, writer = await arrivals.get()
                if problem is None:
                    problem = _problem_with(message, cluster, facts, came)
                    if problem is not None:
                        grace_ends = asyncio.get_running_loop().time() + _GRACE_SECS
                        limit.reschedule(min(limit.when(), grace_ends))
                # A second process of the same number is told as well.
                place = message["process_id"]
                came[place if place not in came else -len(came)] = writer
                hosts[place] = message["host"]
    except TimeoutError:
        if problem is None:
            absent = ", ".join(str(i) for i in others if i not in came)
            problem = (
                f"process {absent} of {cluster.num_processes} did not come to"
                f" {cluster.coordinator} within {timeout_secs:g} s; see what is printed there,"
                " or wait longer with --coordinator_timeout_secs"
            )
    server.close()
    for writer in came.values():
        writer.write(_line(problem=problem, host=socket.gethostname()))
    await asyncio.gather(*(w.drain() for w in came.values()), return_exceptions=True)
    kept = []
    if problem is None:
        # asyncio closes its own sockets at the end.
        kept = [Peer(i, hosts[i], _duplicate(writer)) for i, writer in sorted(came.items())]
    # Also those that came too late, or have said nothing yet.
    for writer in connections:
        writer.close()
    await asyncio.gather(*(w.wait_closed() for w in connections), return_exceptions=True)
    if problem is not None:
        raise UserError(problem)
    return kept


def _duplicate(writer: asyncio.StreamWriter) -> socket.socket:
    return socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))


def _listening(cluster: Cluster) -> socket.socket:
    host, port = cluster.address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        raise UserError(
            f"--coordinator={cluster.coordinator}: process 0 cannot listen there"
            f" ({e.strerror or e}); give an address of its own machine and a free port, and"
            " --process_id=0 to one process alone"
        ) from e


def _line(**values: object) -> bytes:
    return json.dumps({"greeting": _GREETING, **values}).encode() + b"\n"


def _message(text: bytes) -> Record | None:
    types = {"process_id": int, "num_processes": int, "facts": dict, "host": str}
    try:
        message = json.loads(text)
        whole = all(isinstance(message[name], kind) for name, kind in types.items())
        return message if whole and message["greeting"] == _GREETING else None
    except (ValueError, KeyError, TypeError):
        return None


def _problem_with(
    message: Record, cluster: Cluster, facts: Mapping[str, object], came: Collection[int]
) -> str | None:
    other, theirs = message["process_id"], message["facts"]
    if message["num_processes"] != cluster.num_processes:
        return (
            f"process {other} was started with --num_processes={message['num_processes']},"
            f" process 0 with {cluster.num_processes}"
        )
    if other in came or not 0 < other < cluster.num_processes:
        return f"two processes came with --process_id={other}; give each its own, from 0"
    found = [
        f"{name} is {theirs.get(name)!r} there and {facts.get(name)!r} in process 0"
        for name in sorted(facts.keys() | theirs.keys())
        if facts.get(name) != theirs.get(name)
    ]
    if not found:
        return None
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"process {other} differs from process 0: {'; '.join(found[:3])}{more}; start all with the"
        " same command and versions"
    )


def _report(cluster: Cluster, facts: Mapping[str, object], timeout_secs: float) -> Peer:
    """The other processes: report to process 0, and raise the problem that it finds."""
    about = {"process_id": cluster.process_id, "num_processes": cluster.num_processes}
    report = _line(**about, facts=facts, host=socket.gethostname())
    deadline = time.monotonic() + timeout_secs
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as stack:
                connection = socket.create_connection(cluster.address, timeout=max(left, 0.1))
                stack.enter_context(connection)
                connection.sendall(report)
                # Process 0 says when others are late; it is given a moment to do so.
                connection.settimeout(max(deadline - time.monotonic(), 0.1) + 5.0)
                # Without a buffer, which would take what is said later with it.
                line = connection.makefile("rb", buffering=0).readline(_MAX_LINE)
                answer = json.loads(line or b"{}")
                if answer.get("greeting") == _GREETING:
                    if answer["problem"] is not None:
                        raise UserError(answer["problem"])
                    stack.pop_all()
                    return Peer(0, str(answer["host"]), connection)
            reason = "another program answers there"
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        time.sleep(_RETRY_SECS)
    raise UserError(
        f"--coordinator={cluster.coordinator}: cannot be reached within {timeout_secs:g} s"
        f" ({reason}); is process 0 running, and the port open? --coordinator_timeout_secs waits"
        " longer"
    )
