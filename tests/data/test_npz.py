import numpy as np
import pytest

from cascaded_diffusion.data.arrays import load_npz
from cascaded_diffusion.data.sources import load_splits
from cascaded_diffusion.errors import UserError
from tests.data.photos import photo_config

_IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
_LABELS = np.arange(12) % 3


def _save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_a_file_and_a_folder_of_files(tmp_path):
    path = _save(tmp_path / "train.npz", arr_0=_IMAGES, arr_1=_LABELS)
    for source in (
        load_npz(path, "all", num_classes=3),
        load_npz(str(tmp_path), "train", num_classes=3),
    ):
        assert (len(source), source.fixed_shape, len(source.class_names)) == (12, (8, 8, 3), 3)
        image, label = source.read(4)
        np.testing.assert_array_equal(image, _IMAGES[4])
        assert label == 1


def test_parts_and_no_classes(tmp_path):
    path = _save(tmp_path / "x.npz", arr_0=_IMAGES)
    parts = [load_npz(path, split, num_classes=0) for split in ("all[:75%]", "all[75%:]")]
    assert [len(p) for p in parts] == [9, 3]
    assert {x.tobytes() for p in parts for x in p.images} == {x.tobytes() for x in _IMAGES}
    assert parts[0].identity != parts[1].identity


def test_class_names(tmp_path):
    arrays = dict(arr_0=_IMAGES, arr_1=_LABELS.astype(np.uint64))
    plain = load_npz(_save(tmp_path / "x.npz", **arrays), "all", num_classes=3)
    assert (plain.class_names, plain.times, plain.content_sample()) == (("0", "1", "2"), "", "")
    for names in (["caf\u00e9", "b", "c"], np.asarray(["caf\u00e9".encode(), b"b", b"c"])):
        path = _save(tmp_path / "y.npz", **arrays, class_names=names)
        assert load_npz(path, "all", num_classes=3).class_names == ("caf\u00e9", "b", "c")
        assert load_npz(path, "all", num_classes=0).class_names == ()


def test_files_with_other_class_names_are_refused(tmp_path):
    for split, names in (("train", "abc"), ("test", "bac")):
        _save(tmp_path / f"{split}.npz", arr_0=_IMAGES, arr_1=_LABELS, class_names=list(names))
    config = photo_config(
        tmp_path, data__name="npz", data__eval_split="test", data__resolution=8,
        stage__resolution=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="class 0 of train_split 'train' is 'a', and of eval_split"):
        load_splits(config.data, ["train", "test"], config.stage)


@pytest.mark.parametrize(
    ("arrays", "split", "num_classes", "message"),
    [
        (dict(arr_0=_IMAGES, arr_1=_LABELS), "train", 3, "= 'train': .* is one file, whose split"),
        (dict(arr_0=_IMAGES, arr_1=_LABELS), "all", 2, "labels from 0 to 2, expected 0 to 1"),
        (dict(arr_0=_IMAGES, arr_1=_LABELS - 1), "all", 3, "labels from -1 to 1, expected 0 to 2"),
        (dict(arr_0=_IMAGES, arr_1=_LABELS), "all", 4, "class 3 has no images"),
        (dict(arr_0=_IMAGES), "all", 3, "no labels .arr_1.; for a model without classes"),
        (
            dict(arr_0=_IMAGES, arr_1=_LABELS[:5]),
            "all",
            3,
            r"arr_1 is int64 \(5,\), expected 12 in",
        ),
        (dict(arr_0=_IMAGES / 255), "all", 0, "arr_0 is float64 .*expected uint8"),
        (dict(other=_IMAGES), "all", 0, "no images .arr_0."),
        (
            dict(arr_0=_IMAGES.transpose(0, 3, 1, 2)),
            "all",
            0,
            r"looks like .n, channels, .*store arr_0.transpose\(0, 2, 3, 1\)",
        ),
        (
            dict(arr_0=_IMAGES[..., :1].transpose(0, 3, 1, 2)),
            "all",
            0,
            r"arr_0.transpose\(0, 2, 3, 1\)",
        ),
        (dict(arr_0=_IMAGES[..., 0]), "all", 0, r"; store grey images as arr_0\[..., None\]"),
        (
            dict(arr_0=np.zeros((5, 8, 8, 4), np.uint8)),
            "all",
            0,
            r"expected uint8 \(n, height, width, 1 or 3\)$",
        ),
        (
            dict(arr_0=np.zeros((5, 0, 10, 3), np.uint8)),
            "all",
            0,
            r"arr_0 is declared as uint8 of shape \(5, 0, 10, 3\), which is empty",
        ),
        (
            dict(arr_0=_IMAGES, arr_1=_LABELS, class_names=["a", "b"]),
            "all",
            3,
            "class_names is <U1 .2,., expected 3 texts",
        ),
        (
            dict(arr_0=_IMAGES, arr_1=_LABELS, class_names=["a", "b", "a"]),
            "all",
            3,
            "same name twice",
        ),
        (
            dict(arr_0=_IMAGES, arr_1=_LABELS, class_names=np.asarray(["a", "b", "a"], object)),
            "all",
            3,
            "class_names holds Python objects",
        ),
    ],
)
def test_bad_files_are_explained(tmp_path, arrays, split, num_classes, message):
    path = _save(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_npz(path, split, num_classes=num_classes)


def test_files_that_are_not_there_or_cut_are_explained(tmp_path):
    with pytest.raises(UserError, match="no such .npz file, or folder of them"):
        load_npz(str(tmp_path / "none.npz"), "all", num_classes=0)
    path = tmp_path / "train.npz"
    _save(path, arr_0=_IMAGES)
    with pytest.raises(UserError, match="split = 'val': no .*val.npz; splits there: train"):
        load_npz(str(tmp_path), "val", num_classes=0)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        load_npz(str(path), "all", num_classes=0)
