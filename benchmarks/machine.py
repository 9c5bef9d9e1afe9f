"""What a measured figure must name: machine, versions, commit."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
from importlib.metadata import version


def describe() -> str:
    """One line: processor, cores, Python, JAX and the commit, marked where files differ."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    root = pathlib.Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--", "cascaded_diffusion", "configs", "benchmarks/*.py"):
        commit += " + uncommitted changes"
    return (
        f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, jax {version('jax')},"
        f" jaxlib {version('jaxlib')}; commit {commit}"
    )
