from cascaded_diffusion.runtime.progress import Progress


def test_progress_without_a_terminal_is_plain_lines(capsys):
    progress = Progress(10, unit="steps", label="sr32", line_secs=0.0)
    progress.update(4, loss="0.1", data_wait="3 %")
    progress.update(10)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sr32: 4/10 steps, loss 0.1, data wait 3 %, 0:00 gone, 0:00 left")
    assert lines[1].startswith("sr32: 10/10 steps")
