"""The drill with 200 kills at random moments, stored.

    python benchmarks/drill.py [--kills=200] [--write]

`--write` stores table and JSON in benchmarks/results.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import machine

from cascaded_diffusion.drilling.bench import Row, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Returns the drill's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    flags = parser.parse_args()
    measured = machine.describe()  # before anything is changed
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "drill.json")
        command = [sys.executable, "-m", "cascaded_diffusion.drill", f"--kills={flags.kills}"]
        code = subprocess.run([*command, f"--output={output}"], cwd=ROOT, check=False).returncode
        found = json.loads(output.read_text())
    if not flags.write:
        return code
    asked = f"python benchmarks/drill.py --kills={flags.kills} --write"
    about = {"command": asked, "machine": measured}
    (RESULTS / "drill.json").write_text(json.dumps({**about, **found}, indent=2) + "\n")
    lines = [
        "# The drill",
        "",
        table([Row(**row) for row in found["rows"]]),
        "",
        "Trainings of 150 steps with a checkpoint every 25, a step of a few milliseconds: a save",
        "that is under way when the process is killed is lost, and with it up to 25 steps more.",
        f"{found['kills']} kills in all, {found['minutes']} minutes. State of every run that went",
        f"to its end, SHA-256: `{found['state_sha256']}`.",
        "",
        f"Measured on: {measured}. Command: `{asked}`.",
        "",
    ]
    (RESULTS / "drill.md").write_text("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
