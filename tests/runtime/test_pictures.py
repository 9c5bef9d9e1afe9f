import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.runtime.pictures import labelled_rows, line_plot, save_png_folder

LABELS = {"x_label": "step", "y_label": "FID", "title": "FID by step"}
SERIES = {
    "base": [(0, 30.0), (1000, 12.5), (2000, 8.0)],
    "cascade": [(0, 25.0), (1000, 14.0), (2000, 6.0)],
}


def _pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.filterwarnings("error")
def test_line_plot_shows_its_points(tmp_path):
    path = tmp_path / "new" / "plot.png"
    line_plot(path, SERIES, **LABELS)
    picture = _pixels(path)
    assert picture.shape == (600, 960, 3)
    assert [x.name for x in path.parent.iterdir()] == ["plot.png"]

    line_plot(path, SERIES, **LABELS)
    np.testing.assert_array_equal(_pixels(path), picture)
    moved = {**SERIES, "cascade": [(0, 25.0), (1000, 20.0), (2000, 6.0)]}
    line_plot(path, moved, **LABELS)
    assert (_pixels(path) != picture).any()


def test_line_plot_has_a_legend(tmp_path):
    line_plot(tmp_path / "a.png", SERIES, **LABELS)
    renamed = dict(zip(("one", "two"), SERIES.values(), strict=True))
    line_plot(tmp_path / "b.png", renamed, **LABELS)
    assert (_pixels(tmp_path / "a.png") != _pixels(tmp_path / "b.png")).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "series", [{}, {"none": []}, {"one": [(3, 1.0)]}, {"gap": [(0, 1.0), (1, float("nan"))]}]
)
def test_line_plot_of_little_data_does_not_warn(tmp_path, series):
    line_plot(tmp_path / "plot.png", series, **LABELS)
    assert _pixels(tmp_path / "plot.png").shape == (600, 960, 3)


def test_captions_are_whole_and_rows_may_differ_in_length():
    one = np.full((1, 8, 8, 1), 200, np.uint8)
    three = np.full((3, 8, 8, 1), 100, np.uint8)
    narrow = labelled_rows([("a", one), ("b", three)])
    wide = labelled_rows([("a caption that is longer than its images are wide", one)])
    assert narrow.shape[1] == 2 * (3 * 9 + 1)
    assert (narrow[30, -1] == 255).all()  # beside the row of one
    ink = np.flatnonzero((wide[:18] < 128).any(axis=(0, 2)))
    assert ink.max() < wide.shape[1] - 3


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
