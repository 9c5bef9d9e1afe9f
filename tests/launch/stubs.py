"""Executables that stand in for gcloud, kubectl, ssh and the like, and remember their calls."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Every call becomes a file, arguments ended by NUL, so that no argument can be mistaken for two.
# Then the answers of the test are sourced: a bash file that sees the arguments.
_STUB = """#!/bin/bash
calls={calls}
shopt -s nullglob
n=("$calls"/*)
n=${{#n[@]}}
until ( set -o noclobber; printf '%s\\0' {name} "$@" >"$calls/$(printf %05d $n)" ) 2>/dev/null; do
  n=$((n + 1))
done
next() {{ # next FILE: its first line, which is then gone unless it is the last
  head -n 1 "$1"
  if (($(wc -l <"$1") > 1)); then sed -i 1d "$1"; fi
}}
source {answers}
"""

# What a machine does with a remote command: its login shell gets the one string.
REMOTE = """
for argument in "$@"; do
  case $argument in
    --command=*) (cd "$MACHINE" && HOME=$MACHINE exec bash -c "${argument#--command=}"); exit $? ;;
  esac
done
"""


HOSTILE = (
    "plain",
    "two words",
    "it's",
    'say "no"',
    "$(touch PWNED)",
    "`touch PWNED`",
    "a;touch PWNED",
    "a\nb",
    "--leading=dash",
    "-x",
    "*?[a-z]{1,2}~",
    "\\backslash\\",
    "größe 像 🙂",
    "& && ! #",
    "$HOME ${x}",
    "",
)
POD = ("--name=pod-1", "--zone=us-west4-a", "--project=my-project")
PLACE = ["--zone=us-west4-a", "--project=my-project", "--quiet"]
SSH_FLAGS = ["--ssh-flag=-oConnectTimeout=60", "--ssh-flag=-oServerAliveInterval=60"]
SLICE = ("--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite")
ON_HOST = ["bash", "cascaded_diffusion/src/launch/on_host.sh"]


class Stubs:
    """A folder of stubs that comes first on PATH, and what was called."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.machine = folder / "machine"  # the home folder on the other machine
        self._calls = folder / "calls"
        for made in (self.bin, self._calls, self.machine):
            made.mkdir(parents=True)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "MACHINE": str(self.machine),
            "LC_ALL": "C.UTF-8",
        }

    def add(self, name: str, answers: str = "") -> None:
        """An executable that records its arguments and then runs `answers`, bash."""
        source = self.folder / f"answers_{name}"
        source.write_text(answers)
        path = self.bin / name
        path.write_text(
            _STUB.format(
                name=name,
                calls=shlex.quote(str(self._calls)),
                answers=shlex.quote(str(source)),
            )
        )
        path.chmod(0o755)

    def lines(self, name: str, *lines: str) -> str:
        """A file for `next`; returns its path, quoted."""
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return shlex.quote(str(path))

    def calls(self, name: str | None = None) -> list[list[str]]:
        """The calls so far, in order, each with its name first."""
        found = [
            path.read_bytes().decode().split("\0")[:-1] for path in sorted(self._calls.iterdir())
        ]
        return [c for c in found if name is None or c[0] == name]

    def run(
        self, script: str, *args: str, cwd: pathlib.Path = ROOT, timeout: float = 50, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script of launch/."""
        return subprocess.run(
            [str(ROOT / "launch" / script), *args],
            cwd=cwd,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def flag(call: Sequence[str], name: str) -> str:
    """The value of a call's only --name=VALUE."""
    (value,) = [a.partition("=")[2] for a in call if a.startswith(f"--{name}=")]
    return value


def remote_argv(call: Sequence[str]) -> list[str]:
    """What arrives on the other machine: the remote string, split by a real shell."""
    out = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {flag(call, 'command')}"],
        capture_output=True,
        check=True,
    )
    return out.stdout.decode().split("\0")[:-1]


def bad_input(result, *words):
    """Refused in one line that names what is wrong, with exit code 2 and nothing on stdout."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    return True


def gcloud_ssh(worker="all", where=PLACE):
    head = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod-1", *where]
    return [*head, f"--worker={worker}", *SSH_FLAGS]
