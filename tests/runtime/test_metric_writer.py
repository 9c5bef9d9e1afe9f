import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime.metric_writer import MetricWriter
from cascaded_diffusion.runtime.run_folder import RunFolder


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


def test_a_full_disk_is_said_once(tmp_path, monkeypatch):
    writer = MetricWriter(RunFolder(tmp_path))

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"metrics cannot be written \(No space left on device\);"):
        writer.write_scalars(1, {"loss": 1.0})
    monkeypatch.undo()
    writer.close()
