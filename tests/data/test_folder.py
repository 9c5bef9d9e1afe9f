import json
import os
import shutil

import numpy as np
import pytest

from cascaded_diffusion.config.class_names import check_same_classes
from cascaded_diffusion.data.folder import load_folder
from cascaded_diffusion.data.sources import load_source, load_splits
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
        eval__features="rotation",
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


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    write_tree(tmp_path, per_class=2)
    write_tree(tmp_path / "elsewhere", per_class=5)
    ant, bee = (tmp_path / "train" / name for name in ("ant", "bee"))
    (ant / "more").symlink_to(tmp_path / "elsewhere" / "train" / "cow")
    (ant / "up").symlink_to("..")
    (ant / "here").symlink_to(".")
    (ant / "itself.jpg").symlink_to("itself.jpg")
    (bee / "gone.jpg").symlink_to("nowhere.jpg")
    (bee / "linked.jpg").symlink_to("000.jpg")
    os.mkfifo(bee / "pipe.jpg")
    (tmp_path / "train" / "gone").symlink_to("nowhere")
    # Two folders that lead to each other.
    for a, b in (("x", "y"), ("y", "x")):
        folder = tmp_path / "train" / "cow" / a
        folder.mkdir()
        (folder / "1.jpg").write_bytes(photo(1))
        (folder / b).symlink_to(tmp_path / "train" / "cow" / b)
    source = load_folder(str(tmp_path), "train", classes="folder")
    assert source.class_names == CLASSES
    # Of cow: two, x/1.jpg, x/y/1.jpg, y/1.jpg, y/x/1.jpg.
    assert np.bincount(source.labels).tolist() == [2 + 5, 3, 2 + 4]
    names = [source.name(i) for i in range(len(source))]
    assert b"ant/more/004.jpg" in names
    assert source.passed_over == (
        "8 other files passed over: 4 links back, 3 broken links, 1 pipes or devices"
    )


def test_other_files_are_counted_and_said_once(tmp_path, capsys):
    config = photo_config(write_tree(tmp_path))
    for i in range(20):
        for suffix in ("bmp", "TIF", "jfif"):
            (tmp_path / "train" / "ant" / f"x{i}.{suffix}").write_bytes(photo(i))
    (tmp_path / "train" / "README").write_text("of ants")
    for _ in range(2):
        source = load_source(config.data, "train", config.stage)
    # .jfif is JPEG.
    assert len(source) == 24 + 20
    (line,) = capsys.readouterr().err.splitlines()
    kinds = "20 .bmp, 20 .tif, 1 without suffix"
    assert line == f"{tmp_path}/train: 41 other files passed over: {kinds}"


def test_hidden_folders_and_litter_are_no_classes(tmp_path):
    write_tree(tmp_path, per_class=2)
    for name in (".ipynb_checkpoints", ".Trash-0", "__MACOSX", "@eaDir", "ant/.thumbnails"):
        folder = tmp_path / "train" / name
        folder.mkdir()
        (folder / "000.jpg").write_bytes(photo(1))
    (tmp_path / "train" / "bee" / "._000.jpg").write_bytes(b"of macOS")
    (tmp_path / "train" / "bee" / "Thumbs.db").write_bytes(b"of Windows")
    for kind in ("folder", None):
        source = load_folder(str(tmp_path), "train", classes=kind)
        assert len(source) == 6
        assert source.passed_over == "7 other files passed over: 7 hidden"
    assert load_folder(str(tmp_path), "train", classes="folder").class_names == CLASSES


def test_replaced_images_of_other_sizes_are_another_set(tmp_path):
    write_tree(tmp_path)
    path = tmp_path / "train" / "bee" / "003.jpg"
    os.utime(path, (1e9, 1e9))
    before = load_folder(str(tmp_path), "train", classes="folder")
    contents = before.content_sample()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, (1e9, 1e9))
    after = load_folder(str(tmp_path), "train", classes="folder")
    assert after.identity != before.identity
    assert after.times == before.times
    assert after.content_sample() != contents


def test_a_copy_has_other_times_and_the_same_contents(tmp_path):
    write_tree(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for i, path in enumerate((tmp_path / "b").rglob("*.jpg")):
        os.utime(path, (1e9 + i, 1e9 + i))
    a, b = (load_folder(str(tmp_path / x), "train", classes="folder") for x in "ab")
    assert a.identity == b.identity
    assert a.times != b.times
    contents = a.content_sample()
    assert b.content_sample() == contents
    # Labels are not in it: without classes they are the same images.
    unlabelled = load_folder(str(tmp_path / "a"), "train", classes=None)
    assert unlabelled.content_sample() == contents
    # The same name and size; only the times, and the contents, tell.
    path = tmp_path / "b" / "train" / "cow" / "005.jpg"
    path.write_bytes(bytes(path.stat().st_size))
    again = load_folder(str(tmp_path / "b"), "train", classes="folder")
    assert again.identity == b.identity
    assert again.times != b.times
    replaced = again.content_sample()
    path.unlink()
    assert len({contents, replaced, again.content_sample()}) == 3  # a file that is gone counts too


def test_names_that_are_not_utf_8(tmp_path):
    root = os.fsencode(write_tree(tmp_path))
    os.rename(root + b"/train/ant", root + b"/train/caf\xe9")
    os.rename(root + b"/train/cow", root + b"/train/two\nlines")
    os.rename(root + b"/train/bee/000.jpg", root + b"/train/bee/\xff.jpg")
    source = load_folder(str(tmp_path), "train", classes="folder")
    assert source.class_names == ("bee", "caf\udce9", "two\nlines")
    assert json.loads(json.dumps(source.class_names)) == list(source.class_names)
    assert source.read(7) == (photo(100), 0)
    assert source.describe(7) == f"{tmp_path}/train/bee/\\udcff.jpg"
    assert source.describe(16) == f"{tmp_path}/train/two\\nlines/000.jpg"
    source.describe(8).encode()
    with pytest.raises(UserError, match=r"there are: train, x\\udce9; 'all'"):
        os.mkdir(root + b"/x\xe9")
        load_folder(str(tmp_path), "val", classes="folder")


def _config_of_two(root, **overrides):
    return photo_config(root, data__eval_split="test", **overrides)


def test_splits_with_other_classes_are_refused(tmp_path):
    write_tree(tmp_path)
    write_tree(tmp_path, "test")
    config = _config_of_two(tmp_path)
    both = load_splits(config.data, ["train", "test", "train"], config.stage)
    assert list(both) == ["train", "test"]
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "yak")
    with pytest.raises(
        UserError,
        match="^eval_split 'test' has no 'bee' and train_split 'train' has no 'yak'; .*same class",
    ):
        load_splits(config.data, ["train", "test"], config.stage)
    # A class that has no folder at all there: the number of classes is not what is wrong.
    shutil.rmtree(tmp_path / "test" / "yak")
    with pytest.raises(UserError, match=r"^eval_split 'test' has no 'bee'; .*train\[:90%\]"):
        load_splits(config.data, ["train", "test"], config.stage)
    none = _config_of_two(
        tmp_path,
        stage__num_classes=0,
        eval__features="rotation",
        stage__diffusion__label_dropout_prob=0.0,
        stage__sampler__guidance_scale=1.0,
    )
    assert len(load_splits(none.data, ["train", "test"], none.stage)) == 2


def test_splits_with_other_classes_in_their_file_names_are_refused(tmp_path):
    for split, names in (("train", ("ant_1", "bee_1", "cow_1")), ("test", ("ant_2", "cow_2"))):
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / f"{name}.jpg").write_bytes(photo(1))
    config = _config_of_two(tmp_path, data__name="adm_folder", train__batch_size=1)
    with pytest.raises(UserError, match="^eval_split 'test' has no 'bee'"):
        load_splits(config.data, ["train", "test"], config.stage)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a": ("x", "y"), "b": ("x", "y"), "c": ()}, None),
        ({"a": ("x", "y", "z"), "b": ("z",)}, "^b has no 'x' .and 1 more.; labels"),
        ({"a": ("x", "y"), "b": ("y", "x")}, "^class 0 of a is 'x', and of b 'y'; labels"),
        ({"a": ("x", "caf\udce9"), "b": ("x", "z")}, r"^b has no 'caf\\udce9' and a has no 'z'; "),
        ({"a": ("x",), "b": ("x", "x")}, "^a has 1 classes, and b 2"),
    ],
)
def test_classes_are_compared(names, message):
    if message is None:
        check_same_classes(names)
    else:
        with pytest.raises(UserError, match=message):
            check_same_classes(names)


def test_small_photos_are_counted_and_said(tmp_path, capsys):
    config = photo_config(write_tree(tmp_path))
    for name in ("000", "001"):
        (tmp_path / "train" / "ant" / f"{name}.jpg").write_bytes(photo(1, size=(40, 8)))
    source = load_source(config.data, "train", config.stage)
    for i in range(4):
        assert source[i]["image"].shape == (16, 16, 3)
    assert source.converted == {"enlarged": 2}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ant/000.jpg (40 x 8 pixels) to 16 px; so are others that are smaller")


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
        ("none", f"train[{'9' * 5000}:]", "folder", "expected a split's name, or a part"),
        ("no folder", "train", "folder", "config.data.path = .*: no such folder"),
        ("empty class", "train", "folder", "class 'dodo' has no images"),
        (
            "no images",
            "train",
            "folder",
            "no images there, expected .*jpg.*24 other files passed over: 24 .gif",
        ),
        ("nothing", "train", None, "no images there, .*; no other files either"),
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
    with pytest.raises(
        UserError, match="num_classes = 2: expected 3, as 'folder' has in 'train', or 0 for"
    ):
        load_source(config.data, "train", config.stage)
