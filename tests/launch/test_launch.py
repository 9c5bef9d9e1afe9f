"""What all launch scripts have in common."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.stubs import ROOT, bad_input

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
COMMANDS = (
    "demo",
    "smoke",
    "test",
    "evaluate_vm",
    "gke",
    "on_host",
    "slurm",
    "slurm_job",
    "tensorboard",
    "tpu",
)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("demo.sh", "RUN", "cifar10"), "RUN cifar10: expected [mnist or cifar10] [a folder on th"),
        (("demo.sh", "--data=cifar10"), "--data=cifar10: expected"),
        (("demo.sh", "cifar10", "gs://b/RUN"), "gs://b/RUN: expected"),
        (("smoke.sh", "-x"), "-x: expected at most a folder"),
        (("smoke.sh", "a", "b"), "a b: expected at most a folder"),
    ],
)
def test_what_no_demo_understands_is_refused_before_anything_is_made(stubs, arguments, problem):
    assert bad_input(stubs.run(*arguments), problem)


def test_an_environment_that_failed_half_way_is_made_again(stubs, tmp_path):
    """As where Debian has no python3-venv: .venv has a Python, and nothing to activate."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "setup.py").touch()
    mine = tmp_path / ".venv" / "mine"
    mine.touch()
    script = f"source {ROOT}/launch/environment.sh; python() {{ :; }}; ensure_environment test"
    for name, code in ((sys.executable, 2), ("nopy", 2), (sys.executable, 0)):
        command = ["bash", "-euo", "pipefail", "-c", script]
        made = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHON": name},
            capture_output=True,
            text=True,
        )
        assert made.returncode == code, made.stderr
        if mine.exists():  # of another program, as conda
            assert "error: .venv is there, but not as Python's venv makes it" in made.stderr
            mine.unlink()
            (tmp_path / ".venv" / "pyvenv.cfg").touch()
        else:
            assert "nopy: no such program; Python 3.11" in made.stderr or code == 0
    assert (tmp_path / ".venv" / "bin" / "activate").exists()


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
