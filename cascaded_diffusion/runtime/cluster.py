"""Several processes as one job: which processes belong to it.

The addresses are given (`--coordinator`, `--num_processes`, `--process_id`), or read from the
environment of Slurm or GKE, or from the metadata server of a Cloud TPU. JAX detects the same
clusters in `jax._src.clusters`, a private module that can only be used once JAX is imported; here
the job is known, and mistakes end in one line, before that (see `runtime.meeting`).
"""

import dataclasses
import re
import urllib.request
from collections.abc import Callable, Mapping

from cascaded_diffusion.errors import UserError

# How to find the processes of a job.
MODES = ("auto", "none", "slurm", "tpu")
_TPU_PORT = 8476
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process of a job. Raises UserError for values that make no sense."""

    coordinator: str  # "host:port" of process 0
    num_processes: int
    process_id: int  # from 0
    local_device_ids: tuple[int, ...] | None = None  # where a host has several processes

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator={self.coordinator}: expected HOST:PORT")
        if self.num_processes < 1:
            raise UserError(f"--num_processes={self.num_processes}: expected at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id}: expected 0 to {self.num_processes - 1}, since"
                f" --num_processes={self.num_processes}"
            )

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

    The mode "auto" reads the environment alone. The three parts of `Cluster`, given together, take
    precedence. `metadata` returns a Cloud TPU's attribute by name, by default from its metadata
    server. Raises UserError if a part is missing or makes no sense.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"--{missing[0]} is missing: expected --coordinator=HOST:PORT, --num_processes and"
            " --process_id together"
        )
    if not missing:
        return Cluster(coordinator, num_processes, process_id)
    if mode == "none":
        return None
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else 1
    if mode == "slurm" or (mode == "auto" and tasks > 1):
        return _slurm(environ)
    hosts = [h for h in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) > 1 and "TPU_WORKER_ID" in environ:
        return Cluster(f"{hosts[0]}:{_TPU_PORT}", len(hosts), _number(environ, "TPU_WORKER_ID"))
    if mode == "tpu":
        return _cloud_tpu(metadata or _metadata)
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    """A variable of the environment that must be a number from 0 on."""
    text = environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text!r} in the environment: expected a number")
    return int(text)


def _slurm(environ: Mapping[str, str]) -> Cluster:
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID")
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(
            f"--distributed=slurm: {missing[0]} is not set; start the processes with srun"
        )
    nodes, (tasks, process_id, job) = environ[names[0]], (_number(environ, n) for n in names[1:])
    # Any free port will do; it differs between the jobs on one node.
    port = 61440 + job % 4096
    local = environ.get("SLURM_LOCALID")
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_NTASKS_PER_NODE", "1"))
    # With several tasks on a node, each takes the GPU of its local number, unless it sees only one.
    sees_one = re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")) is not None
    several = not sees_one and any(int(n) > 1 for n in re.findall(r"(?:^|,)(\d+)", per_node))
    devices = (_number(environ, "SLURM_LOCALID"),) if several and local is not None else None
    return Cluster(f"{first_host(nodes)}:{port}", tasks, process_id, devices)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `gpu[007-010,12],cpu1` -> `gpu007`."""
    found = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: expected names of nodes")
    prefix, numbers, suffix = found.groups()
    return prefix if numbers is None else prefix + re.split("[-,]", numbers)[0] + suffix


def _cloud_tpu(metadata: Callable[[str], str]) -> Cluster | None:
    workers = metadata("worker-network-endpoints").split(",")
    process_id = metadata("agent-worker-number").strip()
    try:
        hosts = [worker.split(":")[2] for worker in workers]
        return Cluster(f"{hosts[0]}:{_TPU_PORT}", len(hosts), int(process_id))
    except (IndexError, ValueError) as e:
        raise UserError(
            f"--distributed=tpu: the metadata server says workers {','.join(workers)!r}, this one"
            f" {process_id!r}; expected NAME:NAME:ADDRESS of each, and a number"
        ) from e


def _metadata(name: str) -> str:
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10.0) as answer:
            return answer.read(1 << 20).decode()
    except OSError as e:
        raise UserError(
            f"--distributed=tpu: the metadata server does not answer ({e}); this is for Cloud TPU"
            " machines, elsewhere give --coordinator, --num_processes and --process_id"
        ) from e
