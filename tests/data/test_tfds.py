import io
import os
import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from cascaded_diffusion.data.records import CorruptRecord
from cascaded_diffusion.data.sized import class_counts
from cascaded_diffusion.data.sources import load_source, load_splits
from cascaded_diffusion.data.tfds import load_tfds
from cascaded_diffusion.errors import UserError
from tests.data import tiny_photos
from tests.data.photos import photo, photo_config
from tests.tiny import ROOT, round_trip

# Prepared by TFDS with TensorFlow, once; see tests/fixtures/make_tfds_tfrecord.py.
TFRECORD = ROOT / "tests" / "fixtures" / "tfds_tfrecord"


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    tiny_photos.prepare(path)
    return path


def _records(source):
    return [source.read(i) for i in range(len(source))]


@pytest.mark.parametrize("split", ["train", "test", "train[50%:]", "train[3:5]+test"])
def test_both_formats_give_the_same_in_the_same_order(array_record, split):
    a = load_tfds("tiny_photos", split, str(array_record))
    b = load_tfds("tiny_photos", split, str(TFRECORD))
    assert _records(a) == _records(b)
    assert a.content_sample() == b.content_sample()
    # Files of other names and sizes: which records are in them is known to those who read them.
    for source in (a, b):
        assert source.identity.startswith(f"tiny_photos/1.0.0:{split}:{len(a)} images:")
    assert a.identity != b.identity
    assert a.class_names == ("cat", "dog", "eel")


def test_the_records_are_what_was_put_in(array_record):
    source = load_tfds("tiny_photos", "train", str(array_record))
    expected = {(tiny_photos.photo(i), i % 3) for i in range(tiny_photos.NUM_TRAIN)}
    assert set(_records(source)) == expected
    assert "tiny_photos-train.array_record-00000-of-00001, record 5" in source.describe(5)


def test_it_is_a_source_like_any_other(array_record):
    config = photo_config(array_record, data__name="tiny_photos", data__eval_split="test")
    source = load_source(config.data, "test", config.stage)
    assert len(source) == tiny_photos.NUM_TEST
    assert source[4]["image"].shape == (16, 16, 3)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_replaced_shards_are_another_set(tmp_path, array_record, file_format):
    folder, path = _copy(tmp_path, TFRECORD if file_format == "tfrecord" else array_record)
    first, test = (load_tfds("tiny_photos", s, str(folder)) for s in ("train", "test"))
    os.utime(path, (1e9, 1e9))
    touched = load_tfds("tiny_photos", "train", str(folder))
    assert (touched.identity, touched.content_sample()) == (first.identity, first.content_sample())
    assert touched.times != first.times
    path.write_bytes(path.read_bytes() + b"\0" * 65536)
    try:
        assert load_tfds("tiny_photos", "train", str(folder)).identity != first.identity
    except UserError:
        assert file_format == "array_record"  # which is noticed when it is opened
    again = load_tfds("tiny_photos", "test", str(folder))
    assert (again.identity, again.times) == (test.identity, test.times)


def test_splits_of_tfds_have_their_classes_compared(array_record):
    config = photo_config(array_record, data__name="tiny_photos", data__eval_split="test")
    sources = load_splits(config.data, ["train", "test"], config.stage)
    assert {s.class_names for s in sources.values()} == {("cat", "dog", "eel")}


def _copy(tmp_path, origin):
    shutil.copytree(origin, tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob("*train*record*")
    return tmp_path / "copy", path


@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_cut_tfrecord_is_noticed(tmp_path, kept):
    folder, path = _copy(tmp_path, TFRECORD)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    source = load_tfds("tiny_photos", "train", str(folder))
    with pytest.raises(UserError, match=r"\d whole records in it, expected 12: it was cut"):
        source.read(0)


def test_a_cut_array_record_is_noticed_when_opened(tmp_path, array_record):
    folder, path = _copy(tmp_path, array_record)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"records in it, expected 12|cannot be read"):
        load_tfds("tiny_photos", "train", str(folder))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_no_flipped_bit_changes_a_record_unnoticed(tmp_path, array_record, file_format):
    origin = TFRECORD if file_format == "tfrecord" else array_record
    expected = _records(load_tfds("tiny_photos", "train", str(origin)))
    folder, path = _copy(tmp_path, origin)
    data, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    for at in rng.integers(0, len(data), 80):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            source = load_tfds("tiny_photos", "train", str(folder))
        except UserError:
            noticed += 1
            continue
        for i, record in enumerate(expected):
            try:
                assert source.read(i) == record
            except (CorruptRecord, UserError):
                noticed += 1
                break
    # ArrayRecord has padding, where a flip does no harm.
    assert noticed >= (80 if file_format == "tfrecord" else 10)


def test_a_forged_length_is_noticed(tmp_path):
    folder, path = _copy(tmp_path, TFRECORD)
    data = bytearray(path.read_bytes())
    data[6] = 0xFF  # of petabytes
    path.write_bytes(bytes(data))
    source = load_tfds("tiny_photos", "train", str(folder))
    with pytest.raises(UserError, match="the length of record 0 is damaged"):
        source.read(0)


def test_a_missing_shard_is_noticed(tmp_path, array_record):
    for origin in (TFRECORD, array_record):
        folder, path = _copy(tmp_path / origin.name, origin)
        path.unlink()
        with pytest.raises(UserError, match="record-00000-of-00001: missing; copy the data set"):
            load_tfds("tiny_photos", "train", str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar11",
            "expected one of 'mnist', .*'folder'.*, or a data set of tensorflow-datasets .did",
        ),
        ("lsun/bedrom", "'lsun' has these configurations: .*bedroom"),
        ("huggingface:mnist", "expected a name like 'cifar10'"),
        ("../cifar10", "expected a name like 'cifar10'"),
        (
            "cifar10",
            r"not found in .*cifar10/3.0.2; get and prepare it by `python -m cascaded_diff",
        ),
        ("imagenet2012", r"download by hand: .*ILSVRC2012_img_train.tar.*manual_dir is .*manual\)"),
    ],
)
def test_data_sets_that_are_not_there_are_explained(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_tfds(name, "train", str(tmp_path))


def test_splits_that_do_not_exist_are_explained(array_record):
    with pytest.raises(UserError, match=r"= 'val': 'tiny_photos' has 'train', 'test', and parts"):
        load_tfds("tiny_photos", "val", str(array_record))


@pytest.mark.parametrize(
    "name", ["imagenet2012", "imagenet_resized/64x64", "downsampled_imagenet/64x64", "cifar10",
             "lsun/bedroom", "celeb_a", "imagenette"],
)  # fmt: skip
def test_the_known_data_sets_have_images_we_find(name):
    from cascaded_diffusion.data import tfds as tfds_source

    builder = tfds_source.find_builder(name, "/nowhere")
    image, label = tfds_source._keys(name, builder.info.features)
    assert image == "image"
    assert label == (None if name[:4] in ("lsun", "cele", "down") else "label")


def test_a_data_set_without_images_is_refused(array_record):
    from cascaded_diffusion.data import tfds as tfds_source

    builder = tfds_source.find_builder("ag_news_subset", "/nowhere")
    with pytest.raises(UserError, match="expected a data set with one image per example, found"):
        tfds_source._keys("ag_news_subset", builder.info.features)


def test_a_label_out_of_range_is_named(array_record, monkeypatch):
    config = photo_config(array_record, data__name="tiny_photos")
    source = load_source(config.data, "train", config.stage)
    raw = source.raw
    read = raw.read
    monkeypatch.setattr(raw, "read", lambda i: read(i)._replace(label=-1))
    with pytest.raises(UserError, match=r"record 2: label -1 is out of range, expected 0 to 2"):
        source[2]
    with pytest.raises(UserError, match=r"record 0: label -1 is out of range"):
        class_counts(source, max_examples=5, say=lambda done: None)


def test_a_tfrecord_that_is_cut_while_it_is_read_is_corrupt(tmp_path):
    folder, path = _copy(tmp_path, TFRECORD)
    source = load_tfds("tiny_photos", "train", str(folder))
    source.read(0)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptRecord, match="checksum is wrong"):
        source.read(11)
    path.unlink()
    with pytest.raises(CorruptRecord, match="cannot be read .No such file"):
        source.read(0)


def test_a_tfrecord_copy_is_converted(tmp_path, array_record):
    from cascaded_diffusion import prepare

    config = photo_config(TFRECORD, data__name="tiny_photos", data__eval_split="test")
    flags = [
        "prepare",
        f"--config={ROOT}/configs/cifar10_base16.py",
        "--config.data.name=tiny_photos",
        f"--config.data.path={TFRECORD}",
        "--config.data.resolution=16",
        "--config.stage.num_classes=3",
        "--config.eval.num_samples=30",
        "--config.eval.final_num_samples=30",
        f"--config.data.prepared_dir={tmp_path}/prepared",
        "--workers=1",
    ]
    assert prepare.main(flags) == 0
    # Read without the copy, under the same name; and equal to what TFDS's own format gives.
    there = photo_config(
        "/nowhere", data__name="tiny_photos", data__prepared_dir=f"{tmp_path}/prepared"
    )
    converted = load_source(there.data, "train", there.stage)
    plain = load_source(round_trip(config, data__path=str(array_record)).data, "train", there.stage)
    copy = load_source(config.data, "train", there.stage)
    assert (converted.identity, converted.times) == (copy.identity, copy.times)
    assert converted.content_sample() == plain.content_sample() == copy.content_sample()
    assert len(converted) == len(plain) == tiny_photos.NUM_TRAIN
    for i in range(len(plain)):
        for name, value in plain[i].items():
            np.testing.assert_array_equal(converted[i][name], value)


def _tar(path: pathlib.Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def test_the_real_imagenet_builder(tmp_path, capfd):
    pytest.importorskip("tensorflow", reason="TFDS's ImageNet builder needs the extra [tf]")
    from cascaded_diffusion import prepare

    manual = tmp_path / "tfds" / "downloads" / "manual"
    args = [
        "prepare",
        f"--config={ROOT}/configs/sr64.py",
        f"--config.data.path={tmp_path}/tfds",
        f"--config.data.prepared_dir={tmp_path}/prepared",
        "--config.data.low_res=stored",
        "--workers=2",
    ]
    with pytest.raises(UserError, match=r"manual is missing: make it, and put .*img_train.tar"):
        prepare.main(args)
    manual.mkdir(parents=True)
    synsets = ["n01440764", "n01443537", "n01484850"]
    inner = {
        f"{s}.tar": _tar(
            tmp_path / f"{s}.tar",
            {f"{s}_{i}.JPEG": photo(10 * k + i, size=(90, 80)) for i in range(4)},
        )
        for k, s in enumerate(synsets)
    }
    _tar(manual / "ILSVRC2012_img_train.tar", inner)
    _tar(
        manual / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{i + 1:08d}.JPEG": photo(500 + i, size=(80, 90)) for i in range(50)},
    )
    assert prepare.main(args) == 0
    assert "train: 12 images at 64 px" in capfd.readouterr().out

    from cascaded_diffusion.config.run_checks import run_config_from
    from tests.tiny import config_values, with_overrides

    values = with_overrides(
        config_values("sr64", None),
        {
            "data.path": f"{tmp_path}/tfds",
            "data.prepared_dir": f"{tmp_path}/prepared",
            "data.low_res": "stored",
        },
    )
    config = run_config_from(values)
    prepared = load_source(config.data, "train", config.stage)
    plain = load_source(
        run_config_from(with_overrides(values, {"data.prepared_dir": None})).data,
        "train",
        config.stage,
    )
    assert prepared.num_classes == 1000
    assert sorted(int(prepared[i]["label"]) for i in range(12)) == [0] * 4 + [1] * 4 + [2] * 4
    for i in range(12):
        for name, value in plain[i].items():
            np.testing.assert_array_equal(prepared[i][name], value)
    with pytest.raises(
        UserError, match=r"split 'valid' is not prepared in .*there: train_64px_low32px, v"
    ):
        load_source(config.data, "valid", config.stage)
