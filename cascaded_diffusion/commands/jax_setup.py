"""JAX with this project's settings.

No other module imports JAX before the flags and the config have been checked, so that a
mistake is answered within a second. `jax.config` and environment variables are changed here
only.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from typing import Any

from absl import flags
from absl import logging as absl_logging

from cascaded_diffusion.commands.interrupts import INTERRUPTS
from cascaded_diffusion.errors import SingleProcessError, UserError
from cascaded_diffusion.runtime.cluster import Cluster

# With XLA's YNN fusions on, a training step of convolutions is slower (see README,
# "Performance"). The flag is known to these jaxlib versions; an unknown flag would be
# fatal, so others do without. Vectors of 512 bits (--xla_cpu_prefer_vector_width=512) would be
# a little faster yet, but with them XLA's arctan, which the time of a network is made of, is off
# by up to 2.5 (jaxlib 0.10.2).
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type="


CPU_FLAG_VERSIONS = ((0, 10), (0, 12))


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def _compilation_cache() -> pathlib.Path:
    """The default folder of compiled programs, one for each number of CPUs.

    A program for the CPU is cut for as many threads as there are at its compilation, and JAX's
    cache does not tell those apart: compiled on one CPU, it would leave the others idle for good.
    """
    try:
        cpus = int(os.environ["NPROC"])  # Which XLA goes by, too.
    except (KeyError, ValueError):
        schedulable = getattr(os, "sched_getaffinity", None)  # Linux only.
        cpus = len(schedulable(0)) if schedulable else os.cpu_count() or 1
    return pathlib.Path.home() / ".cache" / "cascaded_diffusion" / "xla" / f"{cpus}cpus"


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed; elsewhere, or under GLIBC_TUNABLES, nothing.

    A step on a CPU allocates and frees hundreds of MB. Given back, each of their pages would be
    cleared anew by the kernel in the next step: a fifth of its time. Threads other than the main
    one still give back what is over 64 MB.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def set_up_jax(cluster: Cluster | None = None, *, platform: str | None = None) -> Any:
    """Imports JAX with this project's settings and returns it.

    With a `cluster`, of whose processes each calls this, it is one JAX over all of them. With a
    `platform`, as "cpu", it is of that one, and any other is left alone.

    - On a CPU, XLA's slower convolution path is switched off, and on one CPU device steps run
      in the thread that calls them, so that only one step's hundreds of MB are allocated at a
      time, and malloc keeps and reuses them. What `XLA_FLAGS`, `JAX_CPU_ENABLE_ASYNC_DISPATCH`
      and `GLIBC_TUNABLES` already say stays.
    - Numbers are of 32 bits, whatever `JAX_ENABLE_X64` says.
    - Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR`, by default
      `~/.cache/cascaded_diffusion/xla/<N>cpus`: the second start of a run is quick.

    Raises:
      UserError: there is no device of the kind that `JAX_PLATFORMS` asks for.
    """
    from importlib.metadata import version

    jaxlib = tuple(int(x) for x in version("jaxlib").split(".")[:2])
    flags_now = os.environ.get("XLA_FLAGS", "")
    name = CPU_FLAG.partition("=")[0]
    if CPU_FLAG_VERSIONS[0] <= jaxlib <= CPU_FLAG_VERSIONS[1] and name not in flags_now:
        os.environ["XLA_FLAGS"] = f"{flags_now} {CPU_FLAG}".strip()
    absl_logging.set_verbosity(absl_logging.WARNING)
    # grain reads absl's own flags; a binary that parses none must say that it is done.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    import jax

    # Whatever JAX_ENABLE_X64 says: checkpoints, and what was tested, are of float32.
    jax.config.update("jax_enable_x64", False)
    if platform is not None:
        jax.config.update("jax_platforms", platform)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(_compilation_cache()))
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if cluster is not None:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.num_processes,
            process_id=cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            # On that address alone: JAX's default is every one that the machine has.
            coordinator_bind_address=cluster.coordinator,
        )
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as e:  # the latter of CUDA without a GPU, with no text
        asked = jax.config.jax_platforms or ""
        reason = (str(e).splitlines() or ["JAX finds no such device"])[0].strip()
        error = f"JAX_PLATFORMS={asked}: {reason}; here there is {_platforms_here(jax)}"
        raise (UserError if cluster is None else SingleProcessError)(error) from e
    if backend == "cpu":
        _keep_freed_memory()
    INTERRUPTS.at_once = False
    return jax


def _platforms_here(jax: Any) -> str:
    """The platforms that JAX finds if it may choose, for a message."""
    jax.config.update("jax_platforms", "")
    try:
        return " and ".join(sorted({"cpu", jax.default_backend()}))
    except (RuntimeError, AssertionError):
        return "none that works"
