import os

import numpy as np
import pytest

from cascaded_diffusion.data.folder import load_folder
from cascaded_diffusion.data.sources import load_source
from cascaded_diffusion.errors import UserError
from tests.data.photos import CLASSES, photo, photo_config, write_tree


def test_a_tree_has_its_folders_as_classes(tmp_path):
    write_tree(tmp_path, per_class=4)
    (tmp_path / "train" / "ant" / "readme.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / ".hidden.jpg").write_bytes(b"")
    deeper = tmp_path / "train" / "bee" / "more"
    deeper.mkdir()
    (deeper / "X.JPEG").write_bytes(photo(7))
    source = load_folder(str(tmp_path), "train", classes="folder")
    assert source.class_names == CLASSES
    assert len(source) == 13
    np.testing.assert_array_equal(np.bincount(source.labels), [4, 5, 4])
    names = [source.name(i) for i in range(len(source))]
    assert names == sorted(names)
    assert source.name(8) == b"bee/more/X.JPEG"
    assert source.read(8) == (photo(7), 1)
    assert source.describe(8) == str(deeper / "X.JPEG")


def test_the_order_is_of_the_names_alone(tmp_path):
    names = [f"{i * 7919 % 101:03d}.jpg" for i in range(40)]
    for root, order in (("a", names), ("b", names[::-1])):
        folder = tmp_path / root / "train" / "ant"
        folder.mkdir(parents=True)
        for name in order:
            (folder / name).write_bytes(photo(1))
    a, b = (load_folder(str(tmp_path / r), "train", classes="folder") for r in "ab")
    assert a.names == b.names
    assert a.identity == b.identity
    os.rename(tmp_path / "b/train/ant/000.jpg", tmp_path / "b/train/ant/zzz.jpg")
    assert load_folder(str(tmp_path / "b"), "train", classes="folder").identity != a.identity


def test_flat_folders_are_for_models_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(5):
        (tmp_path / "train" / f"{i}.png").write_bytes(photo(i, "PNG"))
    config = photo_config(
        tmp_path,
        stage__num_classes=0,
        stage__diffusion__label_dropout_prob=0.0,
        stage__sampler__guidance_scale=1.0,
    )
    source = load_source(config.data, "train", config.stage)
    assert (len(source), source.num_classes, source[3]["label"]) == (5, 0, 0)
    # The same images, by the names of their classes left out.
    write_tree(tmp_path, "tree", per_class=2)
    assert len(load_folder(str(tmp_path), "tree", classes=None)) == 6
    with pytest.raises(UserError, match=r"5 images outside of any class folder, .*num_classes=0"):
        load_folder(str(tmp_path), "train", classes="folder")


def test_classes_in_file_names(tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("dog_2.jpg", "cat_1.jpg", "dog_1.jpg", "eel_fresh_9.jpg"):
        (tmp_path / "val" / name).write_bytes(photo(1))
    source = load_folder(str(tmp_path), "val", classes="file_name")
    assert source.class_names == ("cat", "dog", "eel")
    assert source.labels.tolist() == [0, 1, 1, 2]


def test_parts_have_a_share_of_every_class_and_no_overlap(tmp_path):
    write_tree(tmp_path, per_class=40)
    whole, train, val = (
        load_folder(str(tmp_path), split, classes="folder")
        for split in ("train", "train[:75%]", "train[75%:]")
    )
    names = [{s.name(i) for i in range(len(s))} for s in (whole, train, val)]
    assert names[1] | names[2] == names[0]
    assert not names[1] & names[2]
    assert (len(train), len(val)) == (90, 30)
    assert np.bincount(train.labels).min() >= 22
    assert train.class_names == val.class_names == CLASSES
    # Another image moves none from one part to the other, but at the border.
    (tmp_path / "train" / "ant" / "new.jpg").write_bytes(photo(1))
    again = load_folder(str(tmp_path), "train[:75%]", classes="folder")
    assert len({again.name(i) for i in range(len(again))} ^ names[1]) <= 2


def test_the_whole_folder_is_a_split(tmp_path):
    write_tree(tmp_path / "x", "", per_class=2)
    assert len(load_folder(str(tmp_path / "x"), "all", classes="folder")) == 6
    assert len(load_folder(str(tmp_path / "x"), "all[:4]", classes="folder")) == 4


def test_links_to_class_folders_are_followed(tmp_path):
    write_tree(tmp_path / "real", per_class=2)
    (tmp_path / "train").mkdir()
    for name in CLASSES:
        (tmp_path / "train" / name).symlink_to(tmp_path / "real" / "train" / name)
    assert len(load_folder(str(tmp_path), "train", classes="folder")) == 6


def test_records_are_cropped_and_shrunk(tmp_path):
    config = photo_config(write_tree(tmp_path), sr=True, data__low_res="stored")
    source = load_source(config.data, "train", config.stage)
    record = source[9]
    assert record["image"].shape == source.image_shape == (32, 32, 3)
    assert record["low_res"].shape == source.low_res_shape == (16, 16, 3)
    assert (record["label"], record["index"], record["skipped"]) == (1, 9, -1)


@pytest.mark.parametrize(
    ("change", "split", "classes", "message"),
    [
        ("none", "val", "folder", "split = 'val': no such folder in .*; there are: train; 'all'"),
        ("none", "train[:0]", "folder", r"'train\[:0\]': holds none of 24 images"),
        ("none", "train[a:]", "folder", "expected a split's name, or a part"),
        ("no folder", "train", "folder", "config.data.path = .*: no such folder"),
        ("empty class", "train", "folder", "class 'dodo' has no images"),
        ("no images", "train", "folder", "no images there, expected .*jpg.*other files: 24 .gif"),
        ("nothing", "train", None, "no images there, .*other files: none at all"),
    ],
)
def test_bad_folders_are_explained(tmp_path, change, split, classes, message):
    root = tmp_path / "data"
    if change == "nothing":
        (root / "train").mkdir(parents=True)
    elif change != "no folder":
        write_tree(root)
    if change == "empty class":
        (root / "train" / "dodo").mkdir()
    if change == "no images":
        for path in list(root.rglob("*.jpg")):
            path.rename(path.with_suffix(".gif"))
    with pytest.raises(UserError, match=message):
        load_folder(str(root), split, classes=classes)


def test_a_number_of_classes_that_is_not_there_is_refused(tmp_path):
    config = photo_config(write_tree(tmp_path), stage__num_classes=2)
    with pytest.raises(UserError, match="num_classes = 2: expected 3, as 'folder' has, or 0 for"):
        load_source(config.data, "train", config.stage)
