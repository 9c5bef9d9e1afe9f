import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.paths import check_local_path


@pytest.mark.parametrize("text", ["run", "/tmp/a b/ä", "../up", "C", "a:b"])
def test_ordinary_paths_are_returned_as_given(text):
    assert str(check_local_path(text, "--workdir")) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ftp://host/run", "or one that begins with gs://"),
        ("s3://bucket/run", "or one that begins with gs://"),
        ("gs:/bucket/run", "or one that begins with gs://"),
        ("run[1]", r"contains '\['"),
        ("run]", r"contains '\]'"),
        ("a*", r"contains '\*'"),
        ("what?", r"contains '\?'"),
        ("", "expected the path"),
        ("a\0b", "expected the path"),
    ],
)
def test_paths_that_cannot_work_are_refused_by_name(text, problem):
    with pytest.raises(UserError, match=problem) as e:
        check_local_path(text, "--workdir")
    assert "--workdir=" in str(e.value)


def test_the_folders_above_a_relative_path_count(tmp_path, monkeypatch):
    folder = tmp_path / "[2024] exp"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"contains '\['"):
        check_local_path("run", "--workdir")
