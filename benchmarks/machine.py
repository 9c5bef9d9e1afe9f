"""What a measured figure must name: machine, versions, commit."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
from importlib.metadata import version

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def _git(*args: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(_ROOT), *args], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def commit() -> str:
    """The commit, marked where files that matter differ from it."""
    name = _git("rev-parse", "--short", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--", "cascaded_diffusion", "configs", "benchmarks/*.py"):
        name += " + uncommitted changes"
    return name


def processor() -> str:
    """The processor's name."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return cpu


def describe() -> str:
    """One line: processor, cores, Python, JAX and the commit."""
    return (
        f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()},"
        f" jax {version('jax')}, jaxlib {version('jaxlib')}; commit {commit()}"
    )
