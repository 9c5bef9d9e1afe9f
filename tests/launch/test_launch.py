"""What all launch scripts have in common."""

import shutil
import subprocess

import pytest

from tests.launch.stubs import ROOT

SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing_in_these_scripts():
    # The three older scripts source a file by a path from the repository's root.
    paths = [str(p.relative_to(ROOT)) for p in SCRIPTS]
    found = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR:.", "--exclude=SC2010", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


# What is run by hand or by another script; the others are sourced.
COMMANDS = ("evaluate_vm", "gke", "on_host", "slurm", "slurm_job", "tensorboard", "tpu")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_manual(stubs, name):
    result = stubs.run(f"{name}.sh", "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"{name}.sh" in result.stdout
    assert "set -euo" not in result.stdout
    assert stubs.calls() == []
