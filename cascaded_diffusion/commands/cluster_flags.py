"""The flags that name the processes of one job, and the facts that those processes compare."""

import hashlib
import os
import pathlib
import sys

from absl import flags

from cascaded_diffusion.config.convert import flattened
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.runtime.cluster import MODES, Cluster, find_cluster
from cascaded_diffusion.runtime.meeting import meet
from cascaded_diffusion.runtime.peers import JOB


def define_cluster(fv: flags.FlagValues) -> None:
    """Adds the flags that name the processes of one job."""
    text = (
        "how to find the processes of the job: auto (from the environment of Slurm or a TPU),"
        " slurm, tpu (from the metadata server), none"
    )
    flags.DEFINE_enum("distributed", "auto", MODES, text, flag_values=fv)
    text = "HOST:PORT of process 0, instead of --distributed"
    flags.DEFINE_string("coordinator", None, text, flag_values=fv)
    flags.DEFINE_integer("num_processes", None, "number of processes of the job", flag_values=fv)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", flag_values=fv)
    name, text = "coordinator_timeout_secs", "how long to wait for the other processes"
    flags.DEFINE_float(name, 300.0, text, lower_bound=0.1, flag_values=fv)
    name, text = "peer_timeout_secs", "silence after which another process counts as lost"
    flags.DEFINE_float(name, 12.0, text, lower_bound=2.0, flag_values=fv)


def join_cluster(
    fv: flags.FlagValues, config: RunConfig | CascadeConfig, *folders: str
) -> Cluster | None:
    """Meets the other processes of the job, if there are any, before JAX is set up.

    From then on this process ends when one of the others does not live any more (`peers`).
    The config and the folders of the flags that `folders` names must be the same in all processes.
    Returns the argument of `set_up_jax`. Raises UserError if a process is late, cannot be reached,
    or is configured differently.
    """
    cluster = _cluster(fv)
    if cluster is not None:
        facts = {**flattened(to_dict(config), "config."), **_versions(), "our code": _code_digest()}
        for name in folders:
            given = fv[name].value
            facts[f"--{name}"] = None if given is None else str(path_of(given).resolve())
        peers = meet(cluster, facts, timeout_secs=fv.coordinator_timeout_secs)
        JOB.watch(peers, timeout_secs=fv.peer_timeout_secs)
    return cluster


def refuse_cluster(fv: flags.FlagValues, mode: str) -> None:
    """Raises UserError if this is one of several processes, in a mode that is for one."""
    cluster = _cluster(fv)
    if cluster is not None and cluster.num_processes > 1:
        raise UserError(
            f"`evaluate {mode}` is one process, not {cluster.num_processes}: start it on one host"
            " with --distributed=none; `evaluate` of checkpoints, `final` and `sweep` take several"
        )


def _cluster(fv: flags.FlagValues) -> Cluster | None:
    cluster = find_cluster(
        fv.distributed,
        os.environ,
        coordinator=fv.coordinator,
        num_processes=fv.num_processes,
        process_id=fv.process_id,
    )
    # One alone has nobody to meet, and JAX would crash if it could not listen at the address.
    return None if cluster is not None and cluster.num_processes == 1 else cluster


def _code_digest() -> str:
    """A digest of the package's own files, which differ between commits."""
    digest = hashlib.sha256()
    package = pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    """The versions of everything that changes how a program computes and stores."""
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    # These decide about the pixels.
    packages += ("grain", "opencv-python-headless", "pillow", "simplejpeg", "tensorflow-datasets")
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python, **{f"package {name}": version(name) for name in packages}}
