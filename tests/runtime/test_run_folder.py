import json
import os
import subprocess
import sys

import pytest

from cascaded_diffusion.config.schema import to_dict
from cascaded_diffusion.errors import UserError
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
