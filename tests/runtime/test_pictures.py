import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.runtime.pictures import grid, labelled_rows, save_png, save_png_folder


def test_grid_puts_images_in_reading_order(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    picture = grid(images, columns=4, gap=1)
    assert picture.shape == (7, 13, 3)
    assert picture[1, 1, 0] == 0
    assert picture[1, 4, 0] == 1
    assert picture[4, 4, 0] == 5
    assert picture[4, 7, 0] == 64  # no image there
    save_png(tmp_path / "x.png", picture, scale=2)
    assert Image.open(tmp_path / "x.png").size == (26, 14)


def test_captions_are_whole_and_rows_may_differ_in_length():
    one = np.full((1, 8, 8, 1), 200, np.uint8)
    three = np.full((3, 8, 8, 1), 100, np.uint8)
    narrow = labelled_rows([("a", one), ("b", three)])
    wide = labelled_rows([("a caption that is longer than its images are wide", one)])
    assert narrow.shape[1] == 2 * (3 * 9 + 1)
    assert (narrow[30, -1] == 255).all()  # beside the row of one
    ink = np.flatnonzero((wide[:18] < 128).any(axis=(0, 2)))
    assert ink.max() < wide.shape[1] - 3


def test_names_stand_above_their_columns_and_are_cut_to_fit():
    three = np.full((3, 30, 30, 3), 100, np.uint8)
    rows = [("a caption that is longer than its images are wide", three)]
    picture = labelled_rows(rows, scale=1, names=["a", "", "a name that is far too long"])
    assert picture.shape[0] == labelled_rows(rows, scale=1).shape[0] + 18
    ink = np.flatnonzero((picture[:18] < 128).any(axis=(0, 2)))
    assert ink[0] < 31
    assert not ((ink >= 31) & (ink < 62)).any()
    assert 62 <= ink[-1] < 93


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pngs_is_whole_or_not_there(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 5, channels), np.uint8)
    folder, names = tmp_path / "new" / "png", ["a.png", "deep/b.png", "c.png"]
    with pytest.raises(ValueError, match="shorter"):
        save_png_folder(folder, names, images[:2])
    assert not folder.exists()
    save_png_folder(folder, names, images)
    assert [p.name for p in folder.parent.iterdir()] == ["png"]
    for name, image in zip(names, images, strict=True):
        with Image.open(folder / name) as stored:
            np.testing.assert_array_equal(np.asarray(stored).reshape(image.shape), image)
