"""Several processes as one job: who belongs to it, whether all are there, and agree.

Where a job's processes find each other is given (`--coordinator`, `--num_processes`,
`--process_id`), or read from what Slurm or a Cloud TPU tells its processes. Then, before JAX
is asked to connect them, they meet at the coordinator's address: process 0 waits for the
others, each says how it is configured, and all go on only if all came and agree. JAX by
itself ends a process whose peers do not come with a stack of C++ frames, and
processes with different configs hang in the first collective.

Messages are lines of JSON, of limited length. Process 0 listens on the coordinator's address
alone, and for as long as it waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import select
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from cascaded_diffusion.errors import UserError

# Where a job's processes may be named: how to find them.
MODES = ("auto", "none", "slurm", "tpu")
_TPU_PORT = 8476
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_GREETING = "cascaded_diffusion cluster 1"
_MAX_LINE = 1 << 20
_RETRY_SECS = 0.2
_METADATA_SECS = 10.0
# When something is wrong already: how long to wait for the rest, to tell them as well.
_GRACE_SECS = 5.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process of a job.

    Attributes:
      coordinator: "host:port" of process 0.
      num_processes: of the job.
      process_id: this one, from 0.
      local_device_ids: the devices of this process, where a host has several processes.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_cluster(
    mode: str,
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    metadata: Callable[[str], str] | None = None,
) -> Cluster | None:
    """The job that this process belongs to; None if it is on its own.

    Args:
      mode: of `MODES`. "auto" looks for what is there; it asks no metadata server.
      environ: the environment.
      coordinator: "host:port", with the next two: they go before everything else.
      num_processes: of the job.
      process_id: of this process.
      metadata: a Cloud TPU's attribute by name; default: asks its server.

    Raises:
      UserError: a part is missing or makes no sense.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        return _explicit(given)
    if mode == "none":
        return None
    if mode == "slurm" or (mode == "auto" and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1):
        return _slurm(environ)
    hosts = [h for h in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) > 1 and "TPU_WORKER_ID" in environ:
        return _checked(
            Cluster(f"{hosts[0]}:{_TPU_PORT}", len(hosts), int(environ["TPU_WORKER_ID"]))
        )
    if mode == "tpu":
        return _cloud_tpu(metadata or _metadata)
    return None


def _explicit(given: Mapping[str, Any]) -> Cluster:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(
            f"--{missing[0]} is missing: expected --coordinator=HOST:PORT, --num_processes and"
            " --process_id together"
        )
    return _checked(Cluster(**given))


def _checked(cluster: Cluster) -> Cluster:
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={cluster.coordinator}: expected HOST:PORT")
    if cluster.num_processes < 1:
        raise UserError(f"--num_processes={cluster.num_processes}: expected at least 1")
    if not 0 <= cluster.process_id < cluster.num_processes:
        raise UserError(
            f"--process_id={cluster.process_id}: expected 0 to {cluster.num_processes - 1}, since"
            f" --num_processes={cluster.num_processes}"
        )
    return cluster


def _slurm(environ: Mapping[str, str]) -> Cluster:
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID")
    # With a task per GPU, each has the one of its number on its node; unless it sees one alone.
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(
            f"--distributed=slurm: {missing[0]} is not set; start the processes with srun"
        )
    nodes, tasks, process_id, job = (environ[name] for name in names)
    # Any free port does; jobs of one node have different ones.
    port = 61440 + int(job) % 4096
    local = environ.get("SLURM_LOCALID")
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_NTASKS_PER_NODE", "1"))
    sees_one = re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")) is not None
    several = not sees_one and any(int(n) > 1 for n in re.findall(r"(?:^|,)(\d+)", per_node))
    return _checked(
        Cluster(
            f"{first_host(nodes)}:{port}",
            int(tasks),
            int(process_id),
            (int(local),) if several and local is not None else None,
        )
    )


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `gpu[007-010,12],cpu1` -> `gpu007`."""
    found = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: expected names of nodes")
    prefix, numbers, suffix = found.groups()
    if numbers is None:
        return prefix
    return prefix + re.split("[-,]", numbers)[0] + suffix


def _cloud_tpu(metadata: Callable[[str], str]) -> Cluster | None:
    workers = metadata("worker-network-endpoints").split(",")
    process_id = metadata("agent-worker-number").strip()
    try:
        hosts = [worker.split(":")[2] for worker in workers]
        return _checked(Cluster(f"{hosts[0]}:{_TPU_PORT}", len(hosts), int(process_id)))
    except (IndexError, ValueError) as e:
        raise UserError(
            f"--distributed=tpu: the metadata server says workers {','.join(workers)!r}, this one"
            f" {process_id!r}; expected NAME:NAME:ADDRESS of each, and a number"
        ) from e


def _metadata(name: str) -> str:
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECS) as answer:
            return answer.read(_MAX_LINE).decode()
    except (urllib.error.URLError, OSError, TimeoutError) as e:
        raise UserError(
            f"--distributed=tpu: the metadata server does not answer ({e}); this is for Cloud TPU"
            " machines, elsewhere give --coordinator, --num_processes and --process_id"
        ) from e


def differences(mine: Mapping[str, Any], other: Mapping[str, Any], other_id: int) -> list[str]:
    """What process `other_id` has otherwise than process 0, a few words each."""
    return [
        f"{name} is {other.get(name)!r} there and {mine.get(name)!r} in process 0"
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name) != other.get(name)
    ]


def meet(cluster: Cluster, facts: Mapping[str, Any], *, timeout_secs: float) -> None:
    """Returns when all processes have come to the coordinator's address and agree.

    Args:
      cluster: this process.
      facts: what all must have alike; values as JSON keeps them.
      timeout_secs: how long to wait for the others.

    Raises:
      UserError: the address cannot be reached, a process did not come in time, or has
        other facts. All processes that came are told.
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
                # A second one of a number is told as well.
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
    """What came so far: a whole line, an empty one at the end, or None if there is more."""
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
    found = differences(facts, message["facts"], other)
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
