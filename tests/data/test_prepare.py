import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import cascaded_diffusion
from cascaded_diffusion import prepare
from cascaded_diffusion.commands import entry
from cascaded_diffusion.config.schema import to_dict
from cascaded_diffusion.data import write_prepared
from cascaded_diffusion.data.manifests import digest_of_json
from cascaded_diffusion.data.sources import load_source, load_splits
from cascaded_diffusion.data.write_prepared import verify_splits
from cascaded_diffusion.errors import UserError
from tests.data.one_thread import prepare_in_a_thread
from tests.data.photos import photo, photo_config, write_tree
from tests.tiny import ROOT, round_trip

_COMMAND = [
    f"--config={ROOT}/configs/cifar10_sr32.py:smoke",
    "--config.data.name=folder",
    "--config.data.resolution=32",
    "--config.data.eval_split=train",
    "--config.stage.num_classes=3",
    "--config.eval.num_samples=30",
    "--config.eval.final_num_samples=30",
]


def _args(root, *more):
    return [
        "prepare",
        *_COMMAND,
        f"--config.data.path={root}",
        f"--config.data.prepared_dir={root}/prepared",
        "--workers=2",
        *more,
    ]


def _config(root, **overrides):
    return photo_config(root, sr=True, **{"data__prepared_dir": f"{root}/prepared", **overrides})


def _source(config, split="train"):
    return load_source(config.data, split, config.stage)


@pytest.fixture(autouse=True)
def _a_thread_for_the_workers(monkeypatch):
    # Starting two processes takes seconds. Those of `prepared`, which is made before this, and
    # of the tests that start the binary are real.
    prepare_in_a_thread(monkeypatch)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = write_tree(tmp_path_factory.mktemp("data"), per_class=100)
    assert prepare.main(_args(root)) == 0
    return root


def _assert_same_records(a, b):
    assert len(a) == len(b)
    for i in range(len(a)):
        x, y = a[i], b[i]
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_prepared_records_are_those_of_the_photos(prepared):
    config = _config(prepared)
    source = _source(config)
    plain = _source(round_trip(config, data__prepared_dir=None))
    _assert_same_records(source, plain)
    assert (source.identity, source.times) == (plain.identity, plain.times)
    assert source.content_sample() == plain.content_sample() != ""
    assert source.class_names == plain.class_names
    assert source.image_shape == (32, 32, 3)
    assert "array_record, record 7" in source.describe(7)


def test_splits_are_prepared_and_verified_without_flags(tmp_path, capsys):
    config = _config(write_tree(tmp_path, per_class=2))
    cascaded_diffusion.prepare_splits(config.data, config.stage, ["train"])
    verify_splits(config.data, config.stage, ["train"])
    assert "train: the images are those that it was prepared from" in capsys.readouterr().out
    assert len(load_splits(config.data, ["train"], config.stage)["train"]) == 6


def test_the_manifest_says_what_is_there(prepared):
    folder = prepared / "prepared" / "folder" / "train_32px"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["num_examples"] == sum(s["count"] for s in manifest["shards"]) == 300
    assert len(manifest["shards"]) == 2
    assert manifest["class_counts"] == [100, 100, 100]
    assert manifest["skipped"] == []
    assert {len(shard["content"]) for shard in manifest["shards"]} == {64}
    assert manifest["path"] == os.path.realpath(prepared)


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_low_res_images_are_of_the_crop_too(tmp_path, encoding):
    root = write_tree(tmp_path, per_class=3)
    stored = ["--config.data.low_res=stored", f"--encoding={encoding}"]
    assert prepare.main(_args(root, *stored)) == 0
    config = _config(root, data__low_res="stored")
    source = _source(config)
    _assert_same_records(source, _source(round_trip(config, data__prepared_dir=None)))
    assert source.low_res_shape == (16, 16, 3)

    # What the device derives of the high-res image is the same but for the rounding of it.
    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float

    stage = build_stage(config.stage)
    for i in range(len(source)):
        record = source[i]
        derived = uint8_from_float(stage.low_res_from(float_from_uint8(record["image"][None])))
        difference = np.abs(np.asarray(derived)[0].astype(int) - record["low_res"])
        assert difference.max() <= 1
    # Of images that are not rounded between, they are equal: areas of areas.
    from cascaded_diffusion.data import transforms

    image = np.random.default_rng(0).uniform(0, 255, (60, 60, 3)).astype(np.float32)
    twice = transforms.area_resize(transforms.area_resize(image, 32), 16)
    np.testing.assert_allclose(twice, transforms.area_resize(image, 16), atol=1e-4)


def test_grey_images(tmp_path):
    root = write_tree(tmp_path, per_class=2)
    grey = ["--config.stage.channels=1", "--encoding=png"]
    assert prepare.main(_args(root, *grey)) == 0
    config = _config(root, stage__channels=1)
    assert _source(config)[1]["image"].shape == (32, 32, 1)
    _assert_same_records(_source(config), _source(round_trip(config, data__prepared_dir=None)))


def test_a_second_call_does_nothing(prepared, capsys):
    folder = prepared / "prepared" / "folder" / "train_32px"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record")}
    assert prepare.main(_args(prepared)) == 0
    assert "train: is prepared, 300 images at 32 px" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record")}


def test_dry_run_writes_nothing(tmp_path, capsys):
    root = write_tree(tmp_path, per_class=4)
    assert prepare.main(_args(root, "--dry_run")) == 0
    out = capsys.readouterr().out
    assert "train: 12 images" in out
    assert "36.9 kB as raw pixels" in out  # 12 x 32 x 32 x 3
    assert "with 2 workers" in out
    assert not (root / "prepared").exists()


def test_a_killed_prepare_goes_on(tmp_path):
    root = write_tree(tmp_path, per_class=400)
    folder = root / "prepared" / "folder" / "train_32px"
    command = [sys.executable, "-m", "cascaded_diffusion.prepare", *_args(root)[1:]]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob("reports/*.json")) and time.monotonic() < deadline:
        assert first.poll() is None, "it was done before it could be killed"
        time.sleep(0.002)
    first.kill()
    first.wait()
    # Its workers end with it.
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(first.pid, 0)
            time.sleep(0.05)
    assert not (folder / "manifest.json").exists()
    with pytest.raises(UserError, match=r"is not prepared in .*which has begun there and is not"):
        _source(_config(root))
    done = {p: p.stat().st_mtime_ns for p in folder.glob("*.array_record")}
    whole = {int(p.stem) for p in folder.glob("reports/*.json")}
    assert prepare.main(_args(root)) == 0
    after = {p: p.stat().st_mtime_ns for p in folder.glob("*.array_record")}
    assert len(after) == 5
    for path, mtime in done.items():
        if int(path.name[:5]) in whole:
            assert after[path] == mtime
    assert not list(folder.glob(".*.array_record.*"))
    config = _config(root)
    _assert_same_records(_source(config), _source(round_trip(config, data__prepared_dir=None)))


def _damage(root, how):
    shard = sorted((root / "prepared" / "folder" / "train_32px").glob("*.array_record"))[0]
    data = bytearray(shard.read_bytes())
    if how == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif how == "missing":
        shard.unlink()
    elif how == "bit":
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)


def test_damaged_shards_are_noticed_and_made_again(tmp_path, capsys):
    root = write_tree(tmp_path, per_class=100)
    manifest = root / "prepared" / "folder" / "train_32px" / "manifest.json"
    config = _config(root)
    for how in ("cut", "missing", "bit"):
        assert prepare.main(_args(root)) == 0
        _damage(root, how)
        if how == "bit":
            with pytest.raises(UserError, match=r"00000.array_record, record \d+: its shard is d"):
                source = _source(config)
                [source[i] for i in range(len(source))]
            expected = "its SHA-256 is not the manifest's: it is damaged; remove .*manifest.json"
        else:
            with pytest.raises(UserError, match=r"00000.array_record: (missing|\d+ bytes, exp)"):
                _source(config)
            expected = r"00000.array_record: (missing|\d+ bytes, expected)"
        with pytest.raises(UserError, match=expected):
            prepare.main(_args(root, "--verify"))
        manifest.unlink()
    capsys.readouterr()
    assert prepare.main(_args(root)) == 0
    assert "resuming, 1 of 2 shards are there" in capsys.readouterr().out
    assert prepare.main(_args(root, "--verify")) == 0


def test_an_edited_manifest_is_refused(tmp_path):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    path = root / "prepared" / "folder" / "train_32px" / "manifest.json"
    path.write_text(path.read_text().replace('"crop": "center"', '"crop": "none"'))
    with pytest.raises(UserError, match="manifest.json: has changed since it was written"):
        _source(_config(root))
    path.write_text("{")
    with pytest.raises(UserError, match="manifest.json: cannot be read"):
        _source(_config(root))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__crop": "none"}, r"config.data.crop = 'none': the data in .* with 'center'"),
        ({"data__resize": "bilinear"}, "config.data.resize = 'bilinear': .* with 'area'"),
        ({"stage__channels": 1}, "config.stage.channels = 1: .* with 3"),
        (
            {"data__resolution": 64},
            r"split 'train' is not prepared in .*train_64px \(there: train_32px\): run `python -m",
        ),
        ({"data__low_res": "stored"}, r"train_32px_low16px \(there: train_32px\)"),
        ({"data__train_split": "val"}, r"split 'val' is not prepared in .*val_32px"),
        ({"data__path": "/elsewhere"}, "config.data.path = '/elsewhere': .*prepared from .*; give"),
        ({"stage__num_classes": 2}, "config.stage.num_classes = 2: .* with 3"),
    ],
)
def test_data_prepared_in_another_way_is_refused(prepared, overrides, message):
    if overrides.get("stage__num_classes"):
        overrides |= {"eval__num_samples": 40, "eval__final_num_samples": 40}
    config = _config(prepared, **overrides)
    with pytest.raises(UserError, match=message):
        _source(config, config.data.train_split)


def test_data_that_has_moved_is_the_same(tmp_path):
    root = write_tree(tmp_path / "a", per_class=2)
    args = [arg for arg in _args(root) if "data.path" not in arg]
    assert prepare.main(_args(root)) == 0
    shutil.copytree(root, tmp_path / "b")  # other times, the same contents
    shutil.rmtree(root / "train")
    config = _config(root, data__path=str(tmp_path / "b"))
    assert len(_source(config)) == 6
    moved = [*args, f"--config.data.path={tmp_path}/b"]
    assert prepare.main(moved) == 0
    assert prepare.main([*moved, "--verify"]) == 0
    # Where the images are not there any more, what was prepared of them is enough.
    assert len(_source(_config(root))) == 6
    path = tmp_path / "b" / "train" / "bee" / "001.jpg"
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, (1e9, 1e9))  # times are compared in whole seconds
    with pytest.raises(UserError, match="was prepared of other images than are there now, with"):
        _source(config)
    path.unlink()
    with pytest.raises(UserError, match="was prepared of 'folder:train:6 .*not of 'folder:train:5"):
        _source(config)


def test_a_copy_that_says_where_it_is_from(tmp_path, capsys):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    for path in (root / "train").rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))
    assert prepare.main(_args(root)) == 0
    out = capsys.readouterr().out
    assert "train: is prepared, 6 images" in out
    assert "written at other times than those" in out
    assert "--verify compares all of them" in out


@pytest.mark.parametrize("times", ["new", "kept"])
def test_images_replaced_under_the_same_names_are_noticed(tmp_path, times, capsys):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    assert prepare.main(_args(root, "--verify")) == 0
    out = capsys.readouterr().out
    assert "every shard is as it was written" in out
    assert "train: the images are those that it was prepared from" in out
    path = root / "train" / "bee" / "001.jpg"
    status = path.stat()
    path.write_bytes(photo(7)[: status.st_size].ljust(status.st_size, b"\0"))
    if times == "kept":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(path, (1e9, 1e9))
        with pytest.raises(UserError, match="was prepared of other images than are there now"):
            prepare.main(_args(root))
    with pytest.raises(UserError, match="images are not those that it was prepared from|of other"):
        prepare.main(_args(root, "--verify"))
    # Other sizes are noticed by the identity.
    path.write_bytes(photo(7) + b"\0\0\0")
    with pytest.raises(UserError, match=r"was prepared of 'folder:train:6.*not of 'folder:train:6"):
        prepare.main(_args(root))


def test_replaced_images_are_prepared_anew_where_it_goes_on(tmp_path, capsys):
    root = write_tree(tmp_path, per_class=3)
    path = root / "train" / "bee" / "001.jpg"
    path.write_bytes(photo(1).ljust(5000, b"\0"))
    assert prepare.main(_args(root)) == 0
    (root / "prepared" / "folder" / "train_32px" / "manifest.json").unlink()
    path.write_bytes(photo(2).ljust(5000, b"\0"))
    os.utime(path, (1e9, 1e9))
    assert prepare.main(_args(root)) == 0
    assert "resuming" not in capsys.readouterr().out
    assert prepare.main(_args(root, "--verify")) == 0


def test_verify_without_the_images_says_what_was_compared(tmp_path, capsys):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    shutil.rmtree(root / "train")
    assert prepare.main(_args(root, "--verify")) == 0
    assert "train: only the shards were compared: what they were" in capsys.readouterr().out


def test_verify_needs_no_classes_in_the_config(tmp_path):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    without = [
        "--config.stage.num_classes=0",
        "--config.eval.features=rotation",
        "--config.stage.diffusion.label_dropout_prob=0",
        "--config.stage.sampler.guidance_scale=1",
    ]
    assert prepare.main(_args(root, "--verify", *without)) == 0
    assert prepare.main(_args(root, *without)) == 0


def test_splits_with_other_classes_are_not_prepared(tmp_path):
    root = write_tree(write_tree(tmp_path, per_class=2), "test", per_class=2)
    (root / "test" / "bee").rename(root / "test" / "yak")
    two = "--config.data.eval_split=test"
    with pytest.raises(UserError, match="'test' has no 'bee' and train_split 'train' has no 'yak"):
        prepare.main(_args(root, two))
    assert not (root / "prepared").exists()
    # One after the other, too; and whoever reads both is told.
    assert prepare.main(_args(root, two, "--splits=train")) == 0
    with pytest.raises(UserError, match="^eval_split 'test' has no 'bee'|and eval_split 'test'"):
        prepare.main(_args(root, two, "--splits=test"))
    (root / "prepared" / "folder" / "train_32px").rename(root / "aside")
    assert prepare.main(_args(root, two, "--splits=test")) == 0
    (root / "aside").rename(root / "prepared" / "folder" / "train_32px")
    config = _config(root, data__eval_split="test")
    with pytest.raises(UserError, match="eval_split 'test' has no 'bee'"):
        load_splits(config.data, ["train", "test"], config.stage)


def test_class_folders_that_are_not_utf_8_are_prepared(tmp_path):
    root = write_tree(tmp_path, per_class=2)
    os.rename(os.fsencode(root) + b"/train/ant", os.fsencode(root) + b"/train/caf\xe9")
    os.rename(root / "train" / "cow", root / "train" / "new\nline")
    assert prepare.main(_args(root)) == 0
    assert prepare.main(_args(root, "--verify")) == 0
    source = _source(_config(root))
    assert source.class_names == ("bee", "caf\udce9", "new\nline")
    _assert_same_records(source, _source(_config(root, data__prepared_dir=None)))


def test_small_photos_are_counted(tmp_path, capsys):
    root = write_tree(tmp_path, per_class=2)
    (root / "train" / "ant" / "000.jpg").write_bytes(photo(1, size=(9, 8)))
    (root / "train" / "ant" / "notes.txt").write_text("of ants")
    assert prepare.main(_args(root)) == 0
    captured = capsys.readouterr()
    assert "1 shards, 131 kB, 1 enlarged, in" in captured.out
    assert f"{root}/train: 1 other file passed over: 1 .txt" in captured.err.splitlines()


def _rewritten(root, change):
    """Changes a manifest and gives it the digest that it must have."""
    path = root / "prepared" / "folder" / "train_32px" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    path.write_text(json.dumps({**manifest, "digest": digest_of_json(manifest)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][0].update(file="../../x.array_record"), "'file' is '../../x.arr"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), "'file' is '/etc/passwd', expected"),
        (lambda m: m["shards"][0].update(file=3), "'file' is 3, expected text"),
        (lambda m: m["shards"][0].update(count=-1), "'count' is -1, expected a number from 0 on"),
        (lambda m: m["shards"][0].update(count=True), "'count' is a bool, expected a number"),
        (lambda m: m["shards"][0].update(count=5), "'num_examples' is not the sum"),
        (lambda m: m["shards"][0].pop("bytes"), "an element of 'shards' lacks 'bytes'"),
        (lambda m: m.update(shards=[7]), "an element of 'shards' is 7, expected an object"),
        (lambda m: m.update(shards={}), "'shards' is a dict, expected a list"),
        (lambda m: m.update(shards=[], num_examples=0), "'num_examples' is 0, expected images"),
        (lambda m: m.update(low_res_resolution="x"), "'low_res_resolution' is a str, expected"),
        (lambda m: m.update(class_names=["a"]), "of different numbers of classes"),
        (lambda m: m.update(class_names=[1, 2, 3]), "an element of 'class_names' is 1, expected t"),
        (lambda m: m.update(encoding="jpeg"), "'encoding' is 'jpeg', expected one of raw, png"),
        (lambda m: m.update(channels=7), "'channels' is 7, expected 1 or 3"),
        (lambda m: m.update(more=1), "has an unknown 'more'"),
        (lambda m: m.pop("identity"), "it lacks 'identity'"),
        (lambda m: m.update(format=1), "written by another version of this program"),
        (lambda m: m.update(converted={"CMYK": "x"}), "an element of 'converted' is a str"),
    ],
)
def test_a_manifest_is_checked_as_what_it_must_be(tmp_path, change, message):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    _rewritten(root, lambda m: None)
    _source(_config(root))
    _rewritten(root, change)
    for read in (lambda: _source(_config(root)), lambda: prepare.main(_args(root))):
        with pytest.raises(UserError, match=f"manifest.json: .*{message}") as e:
            read()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"7", b"null", b"\xff{}", b"", b"{}"]
)
def test_what_is_no_manifest_and_no_report_is_one_line(tmp_path, data):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    folder = root / "prepared" / "folder" / "train_32px"
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match="manifest.json: .*prepare the data anew") as e:
        _source(_config(root))
    assert "\n" not in str(e.value)
    # A report is there to go on by; where it cannot be read, its shard is made again.
    (folder / "manifest.json").unlink()
    (folder / "reports" / "00000.json").write_bytes(data)
    assert prepare.main(_args(root)) == 0
    assert len(_source(_config(root))) == 6


def test_a_report_that_leads_elsewhere_is_not_gone_by(tmp_path):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    folder = root / "prepared" / "folder" / "train_32px"
    path = folder / "reports" / "00000.json"
    report = json.loads(path.read_text())
    for change in ({"file": "../x"}, {"class_counts": []}, {"skipped": [1]}, {"count": 5}):
        (folder / "manifest.json").unlink()
        path.write_text(json.dumps({**report, **change}))
        assert prepare.main(_args(root)) == 0
        assert json.loads(path.read_text()) == report


def test_the_command_that_prepares_is_told_as_it_is_typed(tmp_path, monkeypatch):
    argv = ["main", *_args(tmp_path)[1:-2], "--workdir=x", "--config.data.train_split=a b"]
    monkeypatch.setattr(sys, "argv", argv)
    config = _config(tmp_path)
    with pytest.raises(UserError) as e:
        load_source(config.data, "train", config.stage)
    told = entry.one_line(e.value)
    command = re.search("run `python -m cascaded_diffusion.prepare (.*)` of this", told)[1]
    assert shlex.split(command) == [arg for arg in argv if arg.startswith("--config")]
    for name in ("cifar10", "imagenet2012"):
        config = photo_config(tmp_path, data__name=name)
        with pytest.raises(UserError, match=r"by `python .*prepare --config=...` of this config"):
            load_splits(config.data, ["train"], config.stage)


def test_a_changed_folder_is_not_what_was_prepared(tmp_path):
    root = write_tree(tmp_path, per_class=2)
    assert prepare.main(_args(root)) == 0
    (root / "train" / "ant" / "more.jpg").write_bytes(photo(1))
    with pytest.raises(UserError, match="was prepared of 'folder:train:6 images.*remove the fol"):
        prepare.main(_args(root))


def test_corrupt_photos_stop_it_or_are_left_out(tmp_path, capsys):
    root = write_tree(tmp_path, per_class=100)
    (root / "train" / "bee" / "007.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bee/007.jpg: cannot be read as JPEG.*on_corrupt=skip"):
        prepare.main(_args(root))
    skip = ["--config.data.on_corrupt=skip"]
    with pytest.raises(UserError, match="1 of 300 records are corrupt.*= 0.001 of them"):
        prepare.main(_args(root, *skip))
    skip += ["--config.data.max_corrupt_fraction=0.01"]
    assert prepare.main(_args(root, *skip)) == 0
    assert "299 images at 32 px" in (out := capsys.readouterr().out)
    assert "1 corrupt skipped" in out
    source = _source(_config(root))
    assert len(source) == 299
    assert source.identity.startswith("folder:train:300 images:")
    assert " but 1 corrupt:" in source.identity
    manifest = root / "prepared" / "folder" / "train_32px" / "manifest.json"
    (skipped,) = json.loads(manifest.read_text())["skipped"]
    assert skipped["index"] == 107
    assert skipped["where"].endswith("bee/007.jpg")


def test_photos_that_were_too_large_are_missed_once_they_are_not(tmp_path, capsys):
    root = write_tree(tmp_path)
    (root / "train" / "bee" / "007.jpg").write_bytes(photo(107, size=(300, 200)))
    skip = ["--config.data.on_corrupt=skip", "--config.data.max_corrupt_fraction=0.5"]
    at_most = "--config.data.max_pixels=59999"
    assert prepare.main(_args(root, *skip, at_most)) == 0
    assert "1 corrupt skipped" in capsys.readouterr().out
    assert prepare.main(_args(root, *skip, at_most)) == 0
    message = (
        r"config.data.max_pixels = 60000: .* without .*bee/007.jpg \(300 x 200 pixels, .*anew$"
    )
    with pytest.raises(UserError, match=message):
        prepare.main(_args(root, *skip, "--config.data.max_pixels=60000"))
    with pytest.raises(UserError, match=message.replace("60000", "64000000")):
        _source(_config(root))

    # A shard that a killed process has left is not taken over either.
    folder = root / "prepared" / "folder" / "train_32px"
    (folder / "manifest.json").unlink()
    assert prepare.main(_args(root, *skip)) == 0
    assert len(_source(_config(root))) == 24


def test_where_nothing_can_be_written_what_is_prepared_is_found(prepared, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise UserError("nothing can be written here")

    monkeypatch.setattr(write_prepared, "check_writable", refuse)
    monkeypatch.setattr(write_prepared, "held_lock", refuse)
    assert prepare.main(_args(prepared)) == 0
    assert "train: is prepared" in capsys.readouterr().out


def test_two_at_once_are_refused(tmp_path):
    from cascaded_diffusion.files.locks import held_lock

    root = write_tree(tmp_path, per_class=2)
    folder = root / "prepared" / "folder" / "train_32px"
    with (
        held_lock(pathlib.Path(folder), "prepare", "x"),
        pytest.raises(UserError, match="another prepare process"),
    ):
        prepare.main(_args(root))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.data.prepared_dir=None"], "config.data.prepared_dir = None: expected the fold"),
        (["--splits=val"], "split = 'val': no such folder"),
        (["--dry_run", "--verify"], "--dry_run does not go with --verify"),
        (["--encoding=jpeg"], "encoding"),
        (["--workers=0"], "workers"),
        (["--config.data.path=/nowhere"], "config.data.path = '/nowhere': no such folder"),
        (["--config.data.path="], "config.data.path = '': expected where the images"),
        (["--verify"], "is not prepared in"),
    ],
)
def test_bad_input_is_explained(tmp_path, more, message):
    root = write_tree(tmp_path, per_class=2)
    with pytest.raises(UserError, match=message):
        prepare.main(_args(root, *more))
    assert not (root / "prepared").exists()


def test_the_embedded_data_can_be_prepared_too(tmp_path):
    values = ["prepare", f"--config={ROOT}/configs/mnist_sr32.py"]
    values += [f"--config.data.prepared_dir={tmp_path}/prepared"]
    assert prepare.main(values) == 0
    from tests.tiny import config_values, with_overrides

    plain = with_overrides(config_values("mnist_sr32"), {})
    from cascaded_diffusion.config.run_checks import run_config_from

    a = run_config_from(plain)
    b = round_trip(a, data__prepared_dir=f"{tmp_path}/prepared")
    assert to_dict(a)["data"]["prepared_dir"] is None
    first, second = (_source(c, "test") for c in (a, b))
    for i in (0, 500, 999):
        np.testing.assert_array_equal(first[i]["image"], second[i]["image"])


def test_a_full_disk_is_told_and_leaves_no_shard(tmp_path):
    root = write_tree(tmp_path, per_class=100)
    # No file may become larger than half of a shard.
    code = (
        "import resource, sys\n"
        "from cascaded_diffusion import prepare\n"
        "from cascaded_diffusion.commands import entry\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "    entry.run(prepare.main)\n"
    )
    script = tmp_path / "limited.py"
    script.write_text(code)
    result = subprocess.run(
        [sys.executable, str(script), *_args(root)[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "cannot be written (write() failed: File too large" in line
    folder = root / "prepared" / "folder" / "train_32px"
    # The second shard, of 44 images, fits.
    assert {p.name for p in folder.rglob("*.array_record*")} <= {"00001.array_record"}
    assert not (folder / "manifest.json").exists()
    assert prepare.main(_args(root)) == 0
