from cascaded_diffusion.files.json_files import append_line, read_lines


def test_a_line_cut_off_by_a_crash_spoils_only_itself(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"value": 0.1})
    with path.open("a") as f:
        f.write('{"value": 0.')
    append_line(path, {"value": 1 / 3})
    assert read_lines(path) == [{"value": 0.1}, {"value": 1 / 3}]  # floats exact
