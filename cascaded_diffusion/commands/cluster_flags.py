"""The flags that say which processes make up one job, and what those processes compare."""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
from typing import Any

from absl import flags

from cascaded_diffusion.config.schema import to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.cluster import MODES, Cluster, find_cluster, meet


def define_cluster(flag_values: flags.FlagValues) -> None:
    """Adds the flags that say which processes make one job."""
    flags.DEFINE_enum(
        "distributed",
        "auto",
        MODES,
        "where the job's processes are named: auto (what the environment of Slurm or a TPU says),"
        " slurm, tpu (asks the metadata server), none",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, instead", flag_values=flag_values
    )
    flags.DEFINE_integer("num_processes", None, "of the job", flag_values=flag_values)
    flags.DEFINE_integer("process_id", None, "this one, from 0", flag_values=flag_values)
    flags.DEFINE_float(
        "coordinator_timeout_secs",
        300.0,
        "how long to wait for the other processes",
        lower_bound=0.1,
        flag_values=flag_values,
    )


def join_cluster(flag_values: flags.FlagValues, config: Any, *folders: str) -> Cluster | None:
    """Meets the job's other processes, if there are any, before JAX is set up.

    Args:
      flag_values: with those of `define_cluster`.
      config: a config dataclass, which all must have alike.
      folders: names of flags whose folders must be the same, too.

    Returns:
      What `set_up_jax` is to be given.

    Raises:
      UserError: they do not come, cannot be reached, or are configured differently.
    """
    cluster = _cluster(flag_values)
    if cluster is not None:
        facts = {**_flat("config", to_dict(config)), **_versions(), "our code": _code_digest()}
        for name in folders:
            given = flag_values[name].value
            facts[f"--{name}"] = None if given is None else str(pathlib.Path(given).resolve())
        meet(cluster, facts, timeout_secs=flag_values.coordinator_timeout_secs)
    return cluster


def refuse_cluster(flag_values: flags.FlagValues) -> None:
    """Raises UserError if this is one of several processes, for binaries that are one.

    With the flags of `define_cluster`, so that all binaries can be started alike.
    """
    cluster = _cluster(flag_values)
    if cluster is not None and cluster.num_processes > 1:
        raise UserError(
            f"evaluate is one process, not {cluster.num_processes}: have `sample` make the samples"
            " on all hosts and measure them by `evaluate --samples`, or start it on one host with"
            " --distributed=none"
        )


def _cluster(flag_values: flags.FlagValues) -> Cluster | None:
    return find_cluster(
        flag_values.distributed,
        os.environ,
        coordinator=flag_values.coordinator,
        num_processes=flag_values.num_processes,
        process_id=flag_values.process_id,
    )


def _code_digest() -> str:
    """Of the package's own files: another commit is another program."""
    digest = hashlib.sha256()
    package = pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(f"{prefix}.{key}", part).items()}


def _versions() -> dict[str, str]:
    """Of what decides how a program is computed and stored."""
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    # And of what decides about the pixels.
    packages += ("grain", "opencv-python-headless", "pillow", "simplejpeg", "tensorflow-datasets")
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python, **{f"package {name}": version(name) for name in packages}}
