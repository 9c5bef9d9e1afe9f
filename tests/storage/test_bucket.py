"""Paths in a bucket: what they hold, and what is said of a storage that refuses."""

import contextlib
import re
import time
from http import HTTPStatus

import numpy as np
import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files import bucket, json_files, line_parts
from cascaded_diffusion.files.bucket import ABSENT, BucketPath, OverwrittenError, path_of
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.paths import check_path, check_writable
from cascaded_diffusion.files.whole import (
    files_below,
    move,
    remove_tree,
    sha256_of,
    whole_file,
    write_npz_whole,
)
from cascaded_diffusion.runtime.run_folder import RunFolder


def test_names_are_those_of_pathlib():
    path = BucketPath("gs://bucket/runs/base16/eval/final_3.json")
    assert (path.name, path.stem, path.suffix) == ("final_3.json", "final_3", ".json")
    assert str(path.parent) == "gs://bucket/runs/base16/eval"
    assert str(path.with_suffix(".md")) == "gs://bucket/runs/base16/eval/final_3.md"
    assert path.relative_to(BucketPath("gs://bucket/runs")).parts[0] == "base16"
    assert str(BucketPath("gs://bucket/runs/") / "a" / "b") == "gs://bucket/runs/a/b"
    assert path_of("runs/base16").name == "base16"
    assert path_of(path) == path


def test_a_folder_is_what_names_begin_with(folder):
    for name in ("a/b.txt", "a.txt", "a-b.txt", "c/d/e.npz"):
        (folder / name).write_bytes(name.encode())
    assert [path.name for path in folder.iterdir()] == ["a", "a-b.txt", "a.txt", "c"]
    assert [(folder / name).is_dir() for name in ("a", "a.txt", "b")] == [True, False, False]
    assert [(folder / name).is_file() for name in ("a", "a.txt", "b")] == [False, True, False]
    assert [(folder / name).exists() for name in ("a", "a.txt", "b")] == [True, True, False]
    assert [str(p) for p in folder.glob("*/*.txt")] == [f"{folder}/a/b.txt"]
    assert list(files_below(folder)) == ["a-b.txt", "a.txt", "a/b.txt", "c/d/e.npz"]
    assert list((folder / "nothing").iterdir()) == []
    assert (folder / "a.txt").stat().st_size == 5
    move(folder / "c", folder / "moved")
    move(folder / "a.txt", folder / "b.txt")
    assert (folder / "moved" / "d" / "e.npz").read_bytes() == b"c/d/e.npz"
    assert (folder / "b.txt").read_text() == "a.txt"
    assert not (folder / "a.txt").exists()
    assert not (folder / "c").exists()
    remove_tree(folder)
    assert not folder.exists()


def test_what_is_missing_is_named(folder):
    for read in (lambda p: p.read_bytes(), lambda p: p.unlink(), lambda p: p.stat()):
        with pytest.raises(FileNotFoundError):
            read(folder / "no.txt")
    (folder / "no.txt").unlink(missing_ok=True)


def test_a_write_that_fails_leaves_what_was_there(folder):
    path = folder / "a.npz"
    write_npz_whole(path, {"x": np.arange(5)})
    digest = sha256_of(path)
    with pytest.raises(ZeroDivisionError), whole_file(path) as f:
        f.write(b"half of it")
        1 / 0  # noqa: B018
    assert sha256_of(path) == digest
    assert read_arrays(path)["x"].tolist() == [0, 1, 2, 3, 4]


def test_of_two_who_expect_the_same_generation_one_writes(folder):
    path = folder / "best.json"
    first = path.write_versioned(b"1", ABSENT)
    with pytest.raises(OverwrittenError, match=r"best\.json: was written or removed by another"):
        path.write_versioned(b"2", ABSENT)
    second = path.write_versioned(b"2", first)
    for data in (b"3", None):
        with pytest.raises(OverwrittenError):
            path.write_versioned(data, first)
    assert path.read_versioned() == (b"2", second)
    assert path.write_versioned(None, second) == ABSENT
    assert path.read_versioned() == (None, ABSENT)


def test_a_write_whose_answer_was_lost_counts(folder, server):
    path, failed = folder / "lock", []

    def lose_the_first_answer(method, url):
        if method == "POST" and "lock" in url and not failed:
            failed.append(url)
            # As if the request had been carried out.
            server.storage.create_file(
                "bucket", str(path).removeprefix("gs://bucket/"), b"me", {"name": "lock"}
            )
            name = str(path).removeprefix("gs://bucket/")
            server.storage.objects["bucket"][name] |= {"name": name, "crc32c": "", "md5Hash": ""}
            return HTTPStatus.SERVICE_UNAVAILABLE
        return None

    server.intercept = lose_the_first_answer
    generation = path.write_versioned(b"me", ABSENT)
    assert failed
    assert path.read_versioned() == (b"me", generation)


def test_lines_are_appended_to_parts_and_read_as_one(folder, server, monkeypatch):
    path = folder / "metrics.jsonl"
    assert json_files.read_lines(path) == []
    monkeypatch.setattr(line_parts, "_MIN_SECS", 0.0)
    monkeypatch.setattr(line_parts, "_MAX_BYTES", 40)
    for step in range(8):
        json_files.append_line(path, {"step": step})
    assert [record["step"] for record in json_files.read_lines(path)] == list(range(8))
    assert len(list(path.iterdir())) == 3  # of 13 bytes each, three to a part
    json_files.write_lines(path, [{"step": 0}, {"step": 1}])
    assert [part.name for part in path.iterdir()] == ["0001.000000.jsonl"]
    json_files.append_line(path, {"step": 2})
    assert [record["step"] for record in json_files.read_lines(path)] == [0, 1, 2]
    # Another process does not know the last part's generation, and begins one of its own.
    line_parts._TAILS.clear()
    json_files.append_line(path, {"step": 3})
    assert [record["step"] for record in json_files.read_lines(path)] == [0, 1, 2, 3]


def test_appending_twice_a_second_begins_a_part(folder):
    path = folder / "metrics.jsonl"
    for step in range(3):
        json_files.append_line(path, {"step": step})
    assert len(list(path.iterdir())) > 1


def test_lines_that_another_process_appends_are_not_overwritten(folder, monkeypatch):
    path = folder / "results.jsonl"
    monkeypatch.setattr(line_parts, "_MIN_SECS", 0.0)
    json_files.append_line(path, {"step": 1})
    (part,) = path.iterdir()
    part.write_bytes(part.read_bytes() + b'{"step": 2}\n')
    with pytest.raises(OverwrittenError):
        json_files.append_line(path, {"step": 3})
    assert [record["step"] for record in json_files.read_lines(path)] == [1, 2]


def test_lines_of_a_copied_run_come_first(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    json_files.append_line(path, {"step": 3})
    assert [record["step"] for record in json_files.read_lines(path)] == [1, 2, 3]
    json_files.write_lines(path, [{"step": 1}])
    assert [record["step"] for record in json_files.read_lines(path)] == [1]
    assert not path.is_file()


def test_a_rewrite_that_is_cut_off_leaves_the_old_or_the_new_lines(folder, server, monkeypatch):
    path = folder / "metrics.jsonl"
    monkeypatch.setattr(line_parts, "_MAX_BYTES", 1)
    for step in range(4):
        json_files.append_line(path, {"step": step})
    for allowed in range(6):
        writes = []

        def refuse(method, url, allowed=allowed, writes=writes):
            if method in ("POST", "DELETE"):
                writes.append(url)
                return HTTPStatus.FORBIDDEN if len(writes) > allowed else None
            return None

        server.intercept = refuse
        with contextlib.suppress(OSError):
            json_files.write_lines(path, [{"step": 0}])
        server.intercept = lambda *_: None
        steps = [record["step"] for record in json_files.read_lines(path)]
        assert steps == ([0, 1, 2, 3] if allowed == 0 else [0])


def _refuse(*methods, status=HTTPStatus.FORBIDDEN):
    return lambda method, url: status if not methods or method in methods else None


@pytest.mark.parametrize("methods", [(), ("POST",), ("DELETE",)])
def test_denied_access_names_the_role_that_is_missing(folder, server, methods):
    server.intercept = _refuse(*methods)
    with pytest.raises(UserError) as e:
        check_writable(folder, "workdir")
    assert str(e.value).startswith(f"--workdir={folder}: cannot be ")
    assert "roles/storage.objectUser on gs://bucket" in str(e.value)
    assert "\n" not in str(e.value)


def test_denied_listing_names_the_role(folder, server):
    server.intercept = lambda method, url: (
        HTTPStatus.FORBIDDEN if "/o?" in url and method == "GET" else None
    )
    with pytest.raises(UserError, match=r"cannot be listed.*roles/storage\.objectUser"):
        check_writable(folder, "workdir")


def test_a_bucket_that_is_not_there(server):
    with pytest.raises(UserError, match=r"--workdir=gs://nope/run: .*there is no such bucket"):
        check_writable(BucketPath("gs://nope/run"), "workdir")
    with pytest.raises(OSError, match=r"gs://nope/run: cannot be listed: there is no such bucket"):
        list(BucketPath("gs://nope/run").iterdir())


def test_a_storage_that_does_not_answer_is_not_waited_for_long(folder, server, monkeypatch):
    monkeypatch.setattr(bucket, "_REACHED", set())
    server.intercept = _refuse(status=HTTPStatus.SERVICE_UNAVAILABLE)
    start = time.monotonic()
    with pytest.raises(UserError, match="503"):
        check_writable(folder, "workdir")
    assert time.monotonic() - start < 30


def test_a_folder_that_can_be_written_keeps_no_trace(folder, server, capsys):
    check_writable(folder, "workdir")
    assert not folder.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_a_clock_that_is_off_is_said(folder, server, capsys, monkeypatch, ahead):
    monkeypatch.setattr(server, "ahead_secs", -ahead)
    check_writable(folder, "workdir")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r": the clock of this machine is (3599|3600|3601) s ", line)
    assert f"--workdir={folder}: " in line
    assert ("ahead of" if ahead > 0 else "behind") in line
    assert "timedatectl" in line


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ftp://bucket/run", "or one that begins with gs://"),
        ("s3://bucket/run", "or one that begins with gs://"),
        ("gs://bucket", "expected gs://BUCKET/FOLDER"),
        ("gs://bucket/", "expected gs://BUCKET/FOLDER"),
        ("gs:///run", "expected gs://BUCKET/FOLDER"),
        ("gs://bucket//run", "expected gs://BUCKET/FOLDER"),
        ("gs://bucket/../run", "expected gs://BUCKET/FOLDER"),
        ("gs://Bucket/run", "expected gs://BUCKET/FOLDER"),
        ("gs:/bucket/run", "or one that begins with gs://"),
        ("gs://bucket/run*", "contains"),
    ],
)
def test_addresses_that_name_nothing(text, wanted):
    with pytest.raises(UserError) as e:
        check_path(text, "--workdir")
    assert str(e.value).startswith(f"--workdir={text}: ")
    assert wanted in str(e.value)


def test_without_gcsfs_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(bucket.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        check_path("gs://bucket/run", "--workdir")


def test_a_storage_that_fails_says_nothing_about_a_file(folder, server):
    path = folder / "best.json"
    path.write_bytes(b'{"step": 1, "ema_decay": 0.9}')
    run = RunFolder(folder.parent / folder.name)
    run.best_path.write_bytes(path.read_bytes())
    server.intercept = _refuse("GET")
    for read in (run.best_step, lambda: json_files.readable_record(path), run.read_config):
        with pytest.raises(OSError, match="access was denied"):
            read()
    server.intercept = lambda *_: None
    assert run.best_step() == 1


def test_empty_objects_in_the_place_of_folders_are_no_files(folder, server):
    (folder / "a" / "b").write_bytes(b"1")
    name = f"{folder}/a/".removeprefix("gs://bucket/")
    server.storage.create_file("bucket", name, b"", {"name": name, "bucket": "bucket"})
    assert [path.name for path in (folder / "a").iterdir()] == ["b"]
    assert list(files_below(folder)) == ["a/b"]
    remove_tree(folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a" * 100, "a..b", "a.-b", "ab"])
def test_names_that_no_bucket_has(name):
    with pytest.raises(UserError, match="expected gs://BUCKET/FOLDER"):
        check_path(f"gs://{name}/run", "--workdir")


@pytest.mark.parametrize("status", [403, 500])
def test_what_gcsfs_meets_with_is_one_line(folder, server, status, monkeypatch):
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", _no_sleep)
    (folder / "a").write_bytes(b"1")
    server.intercept = _refuse(status=HTTPStatus(status))
    for look in ((folder / "a").stat, folder.details):
        with pytest.raises(OSError, match=r"gs://bucket/.*cannot be") as e:
            look()
        assert "\n" not in str(e.value)


async def _no_sleep(secs):
    pass


def test_lines_that_were_copied_to_a_disk_are_read_and_become_one_file(folder, tmp_path):
    there, here = folder / "metrics.jsonl", tmp_path / "metrics.jsonl"
    for step in range(3):
        json_files.append_line(there, {"step": step})
    for part in there.iterdir():
        (here / part.name).parent.mkdir(exist_ok=True)
        (here / part.name).write_bytes(part.read_bytes())
    assert [record["step"] for record in json_files.read_lines(here)] == [0, 1, 2]
    assert here.is_dir()
    json_files.append_line(here, {"step": 3})
    assert here.is_file()
    assert [record["step"] for record in json_files.read_lines(here)] == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("below", ["config.json", "config.json/run"])
def test_a_file_is_no_folder(folder, below):
    (folder / "config.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"--workdir=.*: gs://.*/config\.json is no folder"):
        check_writable(folder / below, "workdir")


@pytest.mark.parametrize("name", ["we ird", "a%20b", "a#b", "größe", "a+b&c"])
def test_names_of_any_kind_are_names(folder, name):
    check_writable(folder / name, "workdir")
    (folder / name / "x").write_bytes(b"1")
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name / "x").read_bytes() == b"1"
