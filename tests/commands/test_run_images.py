"""The images that binaries open are those of the run, wherever the binary is started."""

import os
import pathlib
import shutil

import pytest

from cascaded_diffusion import evaluate, sample
from cascaded_diffusion.commands import run_images
from cascaded_diffusion.data.sources import load_splits
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_data import RunData, write_run_data
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.data.photos import CLASSES, photo, photo_config, write_tree


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_tree(tmp_path / "photos", split, per_class=4)
    return tmp_path / "photos"


def _config(path="photos", **more):
    return photo_config(
        pathlib.Path(path), data__train_split="train", data__eval_split="test", **more
    )


def _run(tmp_path, config, name="run"):
    """A run folder as `main` leaves it, but for checkpoints."""
    folder = RunFolder(tmp_path / name)
    whole = run_images.with_absolute_paths(config)
    splits = load_splits(whole.data, ["train", "test"], whole.stage)
    folder.write_config(whole)
    write_run_data(folder, RunData(splits=splits, path=whole.data.path, path_as_given="photos"))
    return folder


def _open(folder, data_path=None):
    config = folder.read_config()
    return run_images.open_splits(folder, config, ["train", "test"], data_path=data_path)


def test_paths_are_stored_absolute_with_the_original_beside(photos, tmp_path):
    folder = _run(tmp_path, _config())
    assert folder.read_config().data.path == str(photos)
    assert '"path_as_given": "photos"' in folder.data_path.read_text()


def test_another_folder_of_the_same_name_is_not_taken(photos, tmp_path, monkeypatch):
    folder = _run(tmp_path, _config())
    elsewhere = tmp_path / "elsewhere"
    for split in ("train", "test"):
        write_tree(elsewhere / "photos", split, per_class=5)
    monkeypatch.chdir(elsewhere)
    assert [len(source) for source in _open(folder).values()] == [12, 12]
    with pytest.raises(UserError, match="was started with"):
        _open(folder, data_path="photos")


def test_replaced_images_are_noticed(photos, tmp_path):
    folder = _run(tmp_path, _config())
    victim = photos / "test" / CLASSES[0] / "0.jpg"
    victim = victim if victim.exists() else sorted(photos.rglob("test/*/*.jpg"))[0]
    victim.write_bytes(photo(999, size=(90, 90)))
    with pytest.raises(UserError, match="split 'test' is .* was started with"):
        _open(folder)


def test_moved_images_are_given_anew_and_compared(photos, tmp_path, capsys):
    folder = _run(tmp_path, _config())
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))
    shutil.rmtree(photos)
    with pytest.raises(UserError, match="photos.*no such folder"):
        _open(folder)
    assert len(_open(folder, data_path="copy")["train"]) == 12
    assert "other times of modification" in capsys.readouterr().out
    # Bytes changed, size and name not.
    victim = sorted((tmp_path / "copy" / "train").rglob("*.jpg"))[0]
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(UserError, match="other contents"):
        _open(folder, data_path="copy")


def test_touched_images_want_to_be_given_anew(photos, tmp_path):
    folder = _run(tmp_path, _config())
    os.utime(sorted(photos.rglob("train/*/*.jpg"))[0], (1e9, 1e9))
    with pytest.raises(UserError, match=f"were modified since .* --data_path={photos}"):
        _open(folder)
    assert len(_open(folder, data_path=str(photos))["train"]) == 12


def test_data_that_comes_with_the_package_cannot_be_moved():
    config = _config(data__name="shapes", data__path=None)
    with pytest.raises(UserError, match="--data_path=x: .* come with the package"):
        run_images.with_absolute_paths(config, "x")


def test_splits_with_other_classes_are_refused(photos, tmp_path):
    (photos / "test" / CLASSES[0]).rename(photos / "test" / "zebra")
    config = run_images.with_absolute_paths(_config())
    with pytest.raises(UserError, match=f"'zebra'.*'{CLASSES[0]}'|'{CLASSES[0]}'.*'zebra'"):
        load_splits(config.data, ["train", "test"], config.stage)


def test_stages_of_a_cascade_have_the_same_classes(photos, tmp_path):
    first = _run(tmp_path, _config(), "base")
    for split in ("train", "test"):
        (photos / split / CLASSES[0]).rename(photos / split / "zebra")
    second = _run(tmp_path, _config(), "sr")
    run_images.check_same_run_classes([first, first])
    with pytest.raises(UserError, match="'zebra'"):
        run_images.check_same_run_classes([first, second])


@pytest.mark.parametrize("path", ["ftp://bucket/run", "run[1]", "what?"])
@pytest.mark.parametrize("flag", ["workdir", "samples", "data_path"])
def test_paths_that_cannot_work_are_refused_at_once(path, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--{flag}="):
        evaluate.main(["evaluate", f"--{flag}={path}"])
    if flag != "samples":
        with pytest.raises(UserError, match=f"--{flag}="):
            sample.main(["sample", "--workdir=x", f"--{flag}={path}"])
    assert not list(tmp_path.iterdir())
