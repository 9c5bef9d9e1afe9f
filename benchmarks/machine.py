"""What a measured figure must name: machine, versions, commit.

Who imports this measures the package of this tree, whichever is installed.
"""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import sys
from importlib.metadata import version

_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))


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


def versions() -> str:
    """Python, JAX and jaxlib."""
    jax = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib"))
    return f"Python {platform.python_version()}, {jax}"


def describe() -> str:
    """One line: processor, cores, versions and the commit."""
    return f"{processor()}, {os.cpu_count()} cores; {versions()}; commit {commit()}"
