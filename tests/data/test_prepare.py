import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from cascaded_diffusion import prepare
from cascaded_diffusion.config import to_dict
from cascaded_diffusion.data.sources import load_source
from cascaded_diffusion.errors import UserError
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
    assert source.identity == plain.identity
    assert source.class_names == plain.class_names
    assert source.image_shape == (32, 32, 3)
    assert "array_record, record 7" in source.reader.describe(7)


def test_the_manifest_says_what_is_there(prepared):
    folder = prepared / "prepared" / "folder" / "train_32px"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["num_examples"] == sum(s["count"] for s in manifest["shards"]) == 300
    assert len(manifest["shards"]) == 2
    assert manifest["class_counts"] == [100, 100, 100]
    assert manifest["skipped"] == []
    assert len(manifest["fingerprint"]) == 64


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
    assert "going on, 1 of 2 shards are there" in capsys.readouterr().out
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
        ({"data__path": "/elsewhere"}, "config.data.path = '/elsewhere': .*prepared with"),
        ({"stage__num_classes": 2}, "config.stage.num_classes = 2: .* with 3"),
    ],
)
def test_data_prepared_in_another_way_is_refused(prepared, overrides, message):
    if overrides.get("stage__num_classes"):
        overrides |= {"eval__num_samples": 40, "eval__final_num_samples": 40}
    config = _config(prepared, **overrides)
    with pytest.raises(UserError, match=message):
        _source(config, config.data.train_split)


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


def test_two_at_once_are_refused(tmp_path):
    from cascaded_diffusion.runtime.run_folder import held_lock

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
    from cascaded_diffusion.config_checks import run_config_from

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
        "from cascaded_diffusion import cli, prepare\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "    cli.run(prepare.main)\n"
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
