"""Data in a bucket: image folders, `.npz` files, TFDS data sets, prepared shards, weights."""

import pathlib
import shutil
from http import HTTPStatus

import numpy as np
import pytest

from cascaded_diffusion.data.folder import load_folder
from cascaded_diffusion.data.sources import load_source
from cascaded_diffusion.data.tfds import load_tfds
from cascaded_diffusion.data.write_prepared import prepare_splits, verify_splits
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import open_images, save_samples
from cascaded_diffusion.files import local_copies
from tests.data.one_thread import prepare_in_a_thread
from tests.data.photos import photo_config, write_tree
from tests.tiny import ROOT

_TFRECORD = ROOT / "tests" / "fixtures" / "tfds_tfrecord"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(local_copies.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "bucket"


@pytest.fixture(autouse=True)
def _a_thread_for_the_workers(monkeypatch):
    prepare_in_a_thread(monkeypatch)


def _upload(source: pathlib.Path, target) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source).as_posix()).write_bytes(path.read_bytes())


@pytest.fixture
def photos(folder, tmp_path):
    write_tree(tmp_path / "photos", per_class=4)
    (tmp_path / "photos" / "train" / "notes.txt").write_text("mine")
    (tmp_path / "photos" / "train" / ".DS_Store").write_text("litter")
    _upload(tmp_path / "photos", folder / "photos")
    return tmp_path / "photos", folder / "photos"


def _same(a, b):
    assert len(a) == len(b)
    for i in range(len(a)):
        for name, value in a[i].items():
            np.testing.assert_array_equal(value, b[i][name])


@pytest.mark.parametrize("split", ["train", "all", "train[:50%]"])
def test_a_folder_of_images_is_that_on_a_disk(photos, split):
    local, there = photos
    a, b = (load_folder(str(path), split, classes=None) for path in (local, there))
    assert a.identity == b.identity
    assert a.names == b.names
    assert [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
    assert a.content_sample() == b.content_sample()
    assert sorted(a.passed_over) == sorted(b.passed_over)
    named = load_folder(str(there), "train", classes="folder")
    assert named.class_names == load_folder(str(local), "train", classes="folder").class_names


def test_a_folder_that_is_not_there(folder):
    with pytest.raises(UserError, match=r"config\.data\.path = 'gs://.*: no images in"):
        load_folder(str(folder / "gone"), "train", classes=None)


def test_prepared_data_is_that_on_a_disk_and_is_copied_once(photos, cache, server):
    local, there = photos
    configs = []
    for path in (local, there):
        config = photo_config(path, sr=True, data__prepared_dir=f"{path}/prepared")
        prepare_splits(config.data, config.stage, ["train"])
        configs.append(config)
    sources = [load_source(c.data, "train", c.stage) for c in configs]
    _same(*sources)
    assert len(list(cache.iterdir())) == len(list((there / "prepared").glob("*/*/*.array_record")))
    reads = []
    server.intercept = lambda method, url: reads.append(url) if "array_record" in url else None
    _same(sources[0], load_source(configs[1].data, "train", configs[1].stage))
    assert reads == []
    verify_splits(configs[1].data, configs[1].stage, ["train"])
    # Nothing is left to do, and killed half-way only what is missing is made.
    prepare_splits(configs[1].data, configs[1].stage, ["train"])


def test_preparing_resumes(photos, server, capsys):
    _, there = photos
    config = photo_config(there, data__prepared_dir=f"{there}/prepared")
    server.intercept = lambda method, url: (
        HTTPStatus.FORBIDDEN if method == "POST" and "manifest.json" in url else None
    )
    with pytest.raises(OSError, match=r"manifest\.json: cannot be written: access was denied"):
        prepare_splits(config.data, config.stage, ["train"])
    server.intercept = lambda *_: None
    with pytest.raises(UserError, match="which has begun there and is not done"):
        load_source(config.data, "train", config.stage)
    prepare_splits(config.data, config.stage, ["train"])
    assert len(load_source(config.data, "train", config.stage)) == 12


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_refused(photos, damage, cache):
    _, there = photos
    config = photo_config(there, data__prepared_dir=f"{there}/prepared")
    prepare_splits(config.data, config.stage, ["train"])
    shard = next((there / "prepared").glob("*/*/*.array_record"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(bytes(data if damage == "flip" else data[:-10]))
    wanted = {"flip": "SHA-256", "cut": "bytes, expected", "gone": "missing"}[damage]
    with pytest.raises(UserError, match=rf"array_record: .*{wanted}"):
        load_source(config.data, "train", config.stage)
    assert list(cache.iterdir()) == []


def test_a_disk_too_small_for_the_copies_is_refused(photos, monkeypatch):
    _, there = photos
    config = photo_config(there, data__prepared_dir=f"{there}/prepared")
    prepare_splits(config.data, config.stage, ["train"])
    free = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(local_copies.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"has 0\.0 GB left; .* CASCADED_DIFFUSION_CACHE"):
        load_source(config.data, "train", config.stage)


def test_a_tfds_data_set_is_read(folder):
    _upload(_TFRECORD, folder)
    a, b = (load_tfds("tiny_photos", "train", str(path)) for path in (_TFRECORD, folder))
    assert [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
    assert a.identity == b.identity


def test_a_tfds_data_set_is_not_made_in_a_bucket(folder):
    config = photo_config(folder, data__name="cifar10")
    with pytest.raises(UserError, match="prepare it on a disk and copy the folder"):
        prepare_splits(config.data, config.stage, ["train"])


def test_samples_in_a_bucket_are_read(folder):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    save_samples(folder / "samples.npz", images, np.arange(4))
    stored = open_images(str(folder / "samples.npz"), flag="samples")
    np.testing.assert_array_equal(stored.images, images)
    with pytest.raises(UserError, match=r"--samples=gs://.*: expected a folder of PNGs, or an"):
        open_images(str(folder / "gone.npz"), flag="samples")


def test_a_folder_of_pngs_is_read_on_a_disk_alone(folder):
    (folder / "png" / "0.png").write_bytes(b"1")
    with pytest.raises(UserError, match="a folder of PNGs is read on this machine alone"):
        open_images(str(folder / "png"), flag="samples")
