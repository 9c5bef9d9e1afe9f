"""JAX with this project's settings.

No other module imports JAX before the flags and the config have been checked, so that a
mistake is answered within a second. `jax.config` and environment variables are changed here
only.
"""

import collections
import ctypes
import os
import pathlib
import sys
import types

from absl import flags
from absl import logging as absl_logging

from cascaded_diffusion.commands.interrupts import INTERRUPTS
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.cluster import Cluster
from cascaded_diffusion.runtime.peers import JOB
from cascaded_diffusion.runtime.signals import START_SIGNALS

# XLA's YNN fusions slow down a training step of convolutions (see docs/performance.md). These
# jaxlib versions know the flag; other versions run without it, since an unknown flag is fatal.
# Vectors of 512 bits (--xla_cpu_prefer_vector_width=512) would be slightly faster still, but with
# them XLA's arctan, from which the networks compute their time embedding, is off by up to 2.5
# (jaxlib 0.10.2).
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
CPU_FLAG_VERSIONS = ((0, 10), (0, 12))
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def _compilation_cache() -> pathlib.Path:
    """The default folder of compiled programs, one for each number of CPUs.

    XLA compiles a program for the number of threads that it finds, and JAX's cache does not
    distinguish them: a program compiled on one CPU would leave all other CPUs idle.
    """
    try:
        cpus = int(os.environ["NPROC"])  # XLA reads it, too.
    except (KeyError, ValueError):
        schedulable = getattr(os, "sched_getaffinity", None)  # exists on Linux only
        cpus = len(schedulable(0)) if schedulable else os.cpu_count() or 1
    return pathlib.Path.home() / ".cache" / "cascaded_diffusion" / "xla" / f"{cpus}cpus"


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory, unless GLIBC_TUNABLES is set.

    A step on a CPU allocates and frees hundreds of MB. If malloc returned them, the kernel would
    clear each page again in the next step, which takes a fifth of its time. Threads other than
    the main one still return what exceeds 64 MB.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def set_up_jax(cluster: Cluster | None = None, *, platform: str | None = None) -> types.ModuleType:
    """Imports JAX with this project's settings and returns it.

    - On a CPU, XLA's slower convolution path is switched off. Steps run in the thread that calls
      them, so that only one step's memory is allocated at a time, and malloc reuses it.
      `XLA_FLAGS`, `JAX_CPU_ENABLE_ASYNC_DISPATCH` and `GLIBC_TUNABLES` take precedence.
    - Numbers have 32 bits, whatever `JAX_ENABLE_X64` says.
    - Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR`, by default
      `~/.cache/cascaded_diffusion/xla/<N>cpus`, so that a run starts faster the second time.

    Each process of a `cluster` calls this function. If a `platform`, such as "cpu", is given,
    devices of others are not touched. Raises UserError if there is no device of the platform that
    `JAX_PLATFORMS` names.
    """
    from importlib.metadata import version

    jaxlib = tuple(int(x) for x in version("jaxlib").split(".")[:2])
    flags_now = os.environ.get("XLA_FLAGS", "")
    name = CPU_FLAG.partition("=")[0]
    if CPU_FLAG_VERSIONS[0] <= jaxlib <= CPU_FLAG_VERSIONS[1] and name not in flags_now:
        os.environ["XLA_FLAGS"] = f"{flags_now} {CPU_FLAG}".strip()
    absl_logging.set_verbosity(absl_logging.WARNING)
    # grain reads absl's global flags, which the binaries do not use.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    import jax

    # Checkpoints hold float32, and everything is tested with it.
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
            # JAX would listen on every address of the machine.
            coordinator_bind_address=cluster.coordinator,
        )
        START_SIGNALS.set_aside_handler_of_jax()
        JOB.connected_by_jax()
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as e:  # CUDA without a GPU asserts, without text
        asked = jax.config.jax_platforms or ""
        reason = (str(e).splitlines() or ["JAX finds no such device"])[0].strip()
        error = f"JAX_PLATFORMS={asked}: {reason}; here there is {_platforms_here(jax)}"
        raise UserError(error) from e
    _check_devices_of_processes(jax)
    if backend == "cpu":
        _keep_freed_memory()
    INTERRUPTS.at_once = False
    return jax


def _check_devices_of_processes(jax: types.ModuleType) -> None:
    """Raises UserError, in every process, if one has other numbers of devices than the others."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        found = ", ".join(f"process {i} has {n}" for i, n in sorted(counts.items())[:16])
        raise UserError(
            f"the processes have different numbers of devices: {found}; expected equally many, see"
            " XLA_FLAGS, CUDA_VISIBLE_DEVICES and the state of the hosts' devices"
        )


def _platforms_here(jax: types.ModuleType) -> str:
    """The platforms that JAX finds when it may choose, for an error message."""
    jax.config.update("jax_platforms", "")
    try:
        return " and ".join(sorted({"cpu", jax.default_backend()}))
    except (RuntimeError, AssertionError):
        return "none that works"
