import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime.pictures import line_plot

LABELS = {"x_label": "step", "y_label": "FID", "title": "FID by step"}
SERIES = {
    "base": [(0, 30.0), (1000, 12.5), (2000, 8.0)],
    "cascade": [(0, 25.0), (1000, 14.0), (2000, 6.0)],
}


def _plot(path, series):
    write_whole(path, line_plot(series, **LABELS))


def _pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.filterwarnings("error")
def test_line_plot_shows_its_points(tmp_path):
    path = tmp_path / "new" / "plot.png"
    _plot(path, SERIES)
    picture = _pixels(path)
    assert picture.shape == (600, 960, 3)
    assert [x.name for x in path.parent.iterdir()] == ["plot.png"]

    _plot(path, SERIES)
    np.testing.assert_array_equal(_pixels(path), picture)
    moved = {**SERIES, "cascade": [(0, 25.0), (1000, 20.0), (2000, 6.0)]}
    _plot(path, moved)
    assert (_pixels(path) != picture).any()


def test_line_plot_has_a_legend(tmp_path):
    _plot(tmp_path / "a.png", SERIES)
    renamed = dict(zip(("one", "two"), SERIES.values(), strict=True))
    _plot(tmp_path / "b.png", renamed)
    assert (_pixels(tmp_path / "a.png") != _pixels(tmp_path / "b.png")).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "series", [{}, {"none": []}, {"one": [(3, 1.0)]}, {"gap": [(0, 1.0), (1, float("nan"))]}]
)
def test_line_plot_of_little_data_does_not_warn(tmp_path, series):
    _plot(tmp_path / "plot.png", series)
    assert _pixels(tmp_path / "plot.png").shape == (600, 960, 3)
