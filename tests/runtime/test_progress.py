from cascaded_diffusion.runtime import progress as progress_lib


def test_progress_without_a_terminal_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress_lib, "_LINE_SECS", 0.0)
    progress = progress_lib.Progress(10, unit="steps", label="sr32")
    progress.update(4, loss="0.1", data_wait="3 %")
    progress.update(10)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sr32: 4/10 steps, loss 0.1, data wait 3 %, 0:00 gone, 0:00 left")
    assert lines[1].startswith("sr32: 10/10 steps")
