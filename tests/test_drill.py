"""The drill in its short form, and that it finds what it looks for."""

import json
import shutil
import subprocess

import pytest

from cascaded_diffusion import drill
from cascaded_diffusion.drilling import faults, training
from cascaded_diffusion.drilling.bench import Bench, Result, Row, table
from cascaded_diffusion.drilling.children import Ended
from cascaded_diffusion.drilling.faults import Point
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import manifest
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.binaries import command, environment
from tests.tiny import ROOT


def test_sixty_kills_and_damaged_checkpoints_change_nothing(tmp_path):
    output = tmp_path / "found.json"
    flags = ["--short", "--kills=12", f"--output={output}"]
    result = subprocess.run(
        command("drill", *flags),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(output.read_text())
    assert (found["silent_errors"], found["repairs"]) == (0, 0)
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["SIGKILL at random moments"]["tries"] == 12
    at_points = rows["SIGKILL at every point where a file appears"]
    assert at_points["tries"] >= 40
    assert at_points["notes"] == []
    assert rows["a bit of the newest checkpoint flipped"]["tries"] == 50
    phases = [row for what, row in rows.items() if what.startswith("SIGTERM in ")]
    assert len(phases) == 5
    assert all(0 < row["secs"] < 60 for row in phases), phases  # 5 s where nothing else runs
    assert "| SIGKILL at random moments | 12 | 0 | 0 |" in result.stdout


@pytest.fixture
def bench(tmp_path):
    """A bench whose undisturbed run has two checkpoints."""
    made = Bench(tmp_path, "no config", seed=0, say=lambda text: None)
    folder = made.folder("undisturbed")
    for step in (25, 50):
        path = folder.checkpoints / str(step)
        (path / "d").mkdir(parents=True)
        (path / "d" / "numbers").write_bytes(bytes(range(step)))
        (path / "names").write_text("what they are")
        manifest.write_manifest(path, step)
    return made


def test_damage_is_found_and_without_checksums_it_would_be_silent(bench, monkeypatch):
    rows = training.damages(bench, flips=8)
    assert [row.silent for row in rows] == [0] * 5
    assert [row.tries for row in rows] == [8, 5, 5, 1, 1]
    monkeypatch.setattr(manifest, "damage", lambda folder: None)
    rows = training.damages(bench, flips=8)
    assert [row.silent for row in rows] == [8, 5, 5, 1, 1]
    assert rows[0].notes[0].startswith("resumes from 50, and says []")


class _Finished:
    def __init__(self, code):
        self._code = code

    def wait(self):
        return Ended(self._code, 1.0, "error: no such thing")


def test_another_result_is_a_silent_error_and_a_failure_a_repair(bench, monkeypatch):
    good, other = ({1: ("0x1p-1", "0x1p-2")}, "abc"), ({1: ("0x1p-1", "0x1p-2")}, "abd")
    monkeypatch.setattr(bench, "result", lambda folder, steps: Result(*good))
    row = Row("a fault")
    for code, expected in ((0, good), (0, other), (2, good)):
        bench.check_ended(row, _Finished(code), bench.folder("run"), Result(*expected))
    assert (row.silent, row.repairs) == (1, 1)
    assert row.notes[1] == "code 2: error: no such thing"
    assert table([row]).splitlines()[-1] == "| a fault | 0 | 1 | 1 |  |  |"


def test_points_are_before_and_after_what_makes_files_appear(tmp_path):
    seen = tmp_path / "seen"
    code = f"""
import pathlib
from cascaded_diffusion.drilling import faults
from cascaded_diffusion.drilling.faults import Point
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.files.json_files import append_line
root = pathlib.Path({str(tmp_path / "run")!r})
kill_at = Point("before", "replace", "checkpoints/N/manifest.json")
faults.install(root, kill_at=kill_at, seen=pathlib.Path({str(seen)!r}))
write_whole(root / "config.json", b"1")
append_line(root / "metrics.jsonl", {{}})
write_whole(pathlib.Path({str(tmp_path)!r}) / "elsewhere", b"1")
write_whole(root / "checkpoints" / "7" / "manifest.json", b"1")
"""
    result = subprocess.run([*command("")[:1], "-c", code], cwd=ROOT, env=environment(), timeout=60)
    assert result.returncode == -9
    assert (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "checkpoints" / "7" / "manifest.json").exists()
    assert faults.read_points(seen) == [
        Point("before", "replace", "config.json"),
        Point("after", "replace", "config.json"),
        Point("before", "fsync", "metrics.jsonl"),
        Point("after", "fsync", "metrics.jsonl"),
    ]


def test_a_folder_that_is_there_and_a_negative_number_are_refused(tmp_path):
    with pytest.raises(UserError, match="is there already; name a new folder"):
        drill.main(["drill", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="kills"):
        drill.main(["drill", "--kills=-1"])


def test_steps_that_are_done_again_are_counted(bench):
    folder = RunFolder(shutil.copytree(bench.folder("undisturbed").path, bench.root / "run"))
    folder.metrics_path.write_text('{"step": 57, "loss": 1.0, "grad_norm": 1.0}\n')
    row = Row("a fault")
    bench.note_redone(row, folder)
    assert row.redone == 7
