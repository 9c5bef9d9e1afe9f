"""What all launch scripts have in common."""

import re
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


def test_every_command_of_the_manual_is_understood(stubs):
    """The launch lines of its code blocks, with --dry_run, in the order that they have there."""
    text = (ROOT / "docs/launch.md").read_text().replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    arrays = re.findall(r"^\w+=\([^)]*\)$|^data=.*$", blocks, re.MULTILINE)
    lines = re.findall(r"^ *\./launch/(.*?)(?: \|\| break| +#.*)?$", blocks, re.MULTILINE)
    assert len(arrays) >= 4 and len(lines) >= 20
    # --dry_run goes behind the command, or is the first flag of a script without commands.
    dry = [
        re.sub(r"^([a-z_]+\.sh)((?: [a-z]+)?)", r'"$launch"/\1\2 --dry_run', line) for line in lines
    ]
    dry = [line.replace("slurm.sh", "slurm.sh --python=bash") for line in dry]
    script = "\n".join(["set -euo pipefail", "stage=base32", *arrays, *dry])
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=stubs.folder,
        env={**stubs.env, "launch": str(ROOT / "launch")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--node-id=cdm-pod" in result.stdout and "kubectl" in result.stdout
