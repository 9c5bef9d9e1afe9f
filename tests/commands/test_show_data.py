import os
import re

import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.commands import show_data
from cascaded_diffusion.errors import UserError
from tests.data.photos import photo, write_tree
from tests.tiny import ROOT


def _args(root, *more, config="cifar10_sr32"):
    return [
        "data",
        f"--config={ROOT}/configs/{config}.py:smoke",
        "--config.data.name=folder",
        "--config.data.resolution=32",
        f"--config.data.path={root}",
        "--config.data.prepared_dir=None",
        "--config.data.eval_split=train",
        "--config.stage.num_classes=3",
        "--config.eval.num_samples=30",
        "--config.eval.final_num_samples=30",
        "--secs=0.3",
        f"--output={root}/data.png",
        *more,
    ]


def test_the_picture_and_the_figures(tmp_path, capsys):
    write_tree(tmp_path, per_class=9)
    assert show_data.main(_args(tmp_path, "--show")) == 0
    out = capsys.readouterr().out
    assert "27 images, shown to the model as 32 x 32 x 3" in out
    assert "3 classes, 9 to 9 images each" in out
    assert re.search(r" 1 +9  bee", out)
    assert re.search(r"loader: [\d,]+ images/s by 2 threads", out)
    parts = re.findall(r"([\d.]+) ms/image +\d+ %  (.+)", out)
    assert [name for _, name in parts] == [
        "read the file or record",
        "decode",
        "crop and resize",
        "copy to the device",
    ]
    picture = np.asarray(Image.open(tmp_path / "data.png"))
    # Names, then the image, its low-res version, and four strengths of damage, each with
    # a caption: of 8 images of 32 px, shown three times as large.
    assert picture.shape == (18 + 6 * (18 + 3 * 34), 3 * (8 * 33 + 1), 3)
    rows = [picture[18 + k * 120 + 18 :][: 3 * 34] for k in range(6)]
    assert len({row.tobytes() for row in rows}) == 6
    # What is damaged more is less like the clean one.
    distance = [np.abs(row.astype(int) - rows[1]).mean() for row in rows[2:]]
    assert distance == sorted(distance)


def test_a_base_model_has_one_row(tmp_path):
    write_tree(tmp_path, per_class=9)
    assert show_data.main(_args(tmp_path, "--show", config="cifar10_base16")) == 0
    assert np.asarray(Image.open(tmp_path / "data.png")).shape[0] == 18 + 18 + 6 * 18


def test_corrupt_photos_are_counted(tmp_path, capsys):
    write_tree(tmp_path, per_class=9)
    (tmp_path / "train" / "bee" / "003.jpg").write_bytes(photo(1)[:99])
    skip = ["--config.data.on_corrupt=skip", "--config.data.max_corrupt_fraction=0.1"]
    assert show_data.main(_args(tmp_path, "--show", *skip)) == 0
    captured = capsys.readouterr()
    assert "1 corrupt records were skipped" in captured.out
    assert "bee/003.jpg" in captured.err


def test_splits_with_other_classes_are_refused(tmp_path):
    write_tree(write_tree(tmp_path, per_class=9), "test", per_class=9)
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "yak")
    args = _args(tmp_path, "--show", "--config.data.eval_split=test")
    with pytest.raises(UserError, match="eval_split 'test' has no 'bee' and train_split 'train'"):
        show_data.main(args)


def test_class_folders_with_odd_names_are_shown(tmp_path, capsys):
    write_tree(tmp_path, per_class=9)
    os.rename(os.fsencode(tmp_path) + b"/train/ant", os.fsencode(tmp_path) + b"/train/caf\xe9")
    os.rename(tmp_path / "train" / "cow", tmp_path / "train" / "new\nline")
    (tmp_path / "train" / "bee" / "x.bmp").write_bytes(b"")
    assert show_data.main(_args(tmp_path, "--show", config="cifar10_base16")) == 0
    captured = capsys.readouterr()
    assert re.search(r" 1 +9  caf\\udce9\n +2 +9  new\\nline\n", captured.out)
    captured.out.encode()
    assert "1 other file passed over: 1 .bmp" in captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to do: add --show"),
        (["--show", "--output=x.jpg"], "--output=x.jpg: expected a name that ends with .png"),
        (["--show", "--split=val"], "split = 'val': no such folder"),
        (["--show", "--images=0"], "images"),
        (["--show", "--config.data.prepared_dir=/nowhere"], "'train' is not prepared in /nowhere"),
    ],
)
def test_bad_input_is_explained(tmp_path, more, message):
    write_tree(tmp_path, per_class=9)
    with pytest.raises(UserError, match=message):
        show_data.main(_args(tmp_path, *more))
