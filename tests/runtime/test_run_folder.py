import json
import os
import subprocess
import sys

import numpy as np
import pytest

from cascaded_diffusion.config.schema import to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.metric_writer import MetricWriter
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import tiny_sr


def test_config_survives_the_folder(tmp_path):
    config = tiny_sr()
    RunFolder(tmp_path).write_config(config)
    assert RunFolder(tmp_path).read_config() == config
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == json.loads(
        json.dumps(to_dict(config)["stage"])
    )


def test_missing_and_broken_runs_are_named(tmp_path):
    with pytest.raises(UserError, match=f"--workdir={tmp_path}: no run there"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: config.stage is missing"):
        RunFolder(tmp_path).read_config()


def test_unwritable_folder_is_found_out_without_a_trace(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file is not a folder"):
        RunFolder(tmp_path / "file" / "run").check_writable()
    RunFolder(tmp_path / "new" / "run").check_writable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    with pytest.raises(UserError, match="--workdir=/proc/run: cannot write to /proc"):
        RunFolder("/proc/run").check_writable()


def test_one_writer_of_a_kind(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.writer_lock("train"):
        other = RunFolder(tmp_path).writer_lock("train")
        with pytest.raises(UserError, match=f"another train process .pid {os.getpid()}."), other:
            pass
        with folder.writer_lock("eval"):
            pass
    with folder.writer_lock("train"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, os, signal\n"
        "from cascaded_diffusion.runtime.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).writer_lock('train'):\n"
        "  os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert result.returncode == -9
    with RunFolder(tmp_path).writer_lock("train"):
        pass


def test_what_was_logged_after_the_resumed_step_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    writer = MetricWriter(folder)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": step / 3})
    writer.close()
    writer = MetricWriter(folder, resume_step=2)
    writer.write_scalars(3, {"loss": 0.5})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_lines(folder.metrics_path)] == [
        (1, 1 / 3),
        (2, 2 / 3),
        (3, 0.5),
    ]
    # Interrupted before its first checkpoint, a run begins again at 0.
    MetricWriter(folder, resume_step=0).close()
    assert read_lines(folder.metrics_path) == []


def test_progress_without_a_terminal_is_plain_lines(capsys):
    progress = Progress(10, unit="steps", label="sr32", line_secs=0.0)
    progress.update(4, loss="0.1", data_wait="3 %")
    progress.update(10)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sr32: 4/10 steps, loss 0.1, data wait 3 %, 0:00 gone, 0:00 left")
    assert lines[1].startswith("sr32: 10/10 steps")


def test_an_early_stop_yields_to_more_patience(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.asked_to_stop(3)
    folder.ask_to_stop(3)
    assert folder.asked_to_stop(2)
    assert folder.asked_to_stop(3)
    assert not folder.asked_to_stop(4)
    folder.early_stop_path.write_text("enough\n")  # a user's own
    assert folder.asked_to_stop(99)


def test_a_broken_best_json_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.eval.mkdir()
    for text in ("{}", "{", "[]"):
        folder.best_path.write_text(text)
        with pytest.raises(UserError, match="best.json: (not a record|cannot be read)"):
            folder.chosen()


def test_grid_puts_images_in_reading_order(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    picture = pictures.grid(images, columns=4, gap=1)
    assert picture.shape == (7, 13, 3)
    assert picture[1, 1, 0] == 0
    assert picture[1, 4, 0] == 1
    assert picture[4, 4, 0] == 5
    assert picture[4, 7, 0] == 64  # no image there
    pictures.save_png(tmp_path / "x.png", picture, scale=2)
    from PIL import Image

    assert Image.open(tmp_path / "x.png").size == (26, 14)
