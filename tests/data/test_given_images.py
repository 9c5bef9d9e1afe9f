"""Images that somebody gives to be enlarged."""

import io

import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.data.given_images import output_names, read_given_images
from cascaded_diffusion.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 16, 16, 3), np.uint8)


def _file(path, pixels, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, quality=95)
    path.write_bytes(data.getvalue())


def _read(path, *, channels=3, sizes=(16, 64), resize_to=None, max_pixels=10_000):
    return read_given_images(
        str(path),
        channels=channels,
        sizes=sizes,
        resize_to=resize_to,
        max_pixels=max_pixels,
    )


def test_a_folder_in_order_of_names_without_what_is_no_image(tmp_path):
    _file(tmp_path / "b.png", COLOUR[0])
    _file(tmp_path / "a" / "z[1].webp", COLOUR[1], "WEBP")
    _file(tmp_path / "c.JPG", COLOUR[2], "JPEG")
    _file(tmp_path / ".ipynb_checkpoints" / "b.png", COLOUR[3])
    _file(tmp_path / ".hidden.png", COLOUR[4])
    (tmp_path / "notes.txt").write_text("x")
    found = _read(tmp_path)
    assert found.names == ("a/z[1].webp", "b.png", "c.JPG")
    assert found.images.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(found.images[1], COLOUR[0])
    assert found.notes == ()
    assert found.passed_over == "3 other files passed over: 2 hidden, 1 .txt"
    assert output_names(found.names) == ["a/z[1].png", "b.png", "c.png"]

    alone = _read(tmp_path / "b.png")
    assert alone.names == ("b.png",)
    np.testing.assert_array_equal(alone.images, COLOUR[:1])


def test_a_folder_within_the_folder_may_have_any_name(tmp_path):
    # "all" is a split's name, in data sets.
    _file(tmp_path / "all" / "1.png", COLOUR[0])
    _file(tmp_path / "2.png", COLOUR[1])
    assert _read(tmp_path).names == ("2.png", "all/1.png")


@pytest.mark.parametrize(
    "names",
    [["cat.jpg", "cat.png"], ["cat.jpg", "CAT.png"], ["cat.jpg", "cat.png", "cat.jpg.png"]],
)
def test_no_output_has_the_name_of_another(names):
    assert output_names(names) == [f"{name}.png" for name in names]


def test_grey_and_colour_are_converted_and_it_is_said(tmp_path):
    grey = COLOUR[0, ..., 0]
    _file(tmp_path / "a.png", COLOUR[0])
    _file(tmp_path / "b.png", grey)
    found = _read(tmp_path)
    np.testing.assert_array_equal(found.images[1], np.repeat(grey[..., None], 3, axis=-1))
    assert found.notes == ("converted to 8-bit RGB: 1 of 2 images (grey), the first is b.png",)
    found = _read(tmp_path, channels=1)
    np.testing.assert_array_equal(found.images[1, ..., 0], grey)
    assert found.notes == ("converted to 8-bit grey: 1 of 2 images (colour), the first is a.png",)


def test_centre_squares_are_shrunk_when_that_is_wanted(tmp_path):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 8:40] = COLOUR[0].repeat(2, axis=0).repeat(2, axis=1)
    _file(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(_read(tmp_path, resize_to=16).images[0], COLOUR[0])


@pytest.mark.parametrize(
    ("size", "resize_to", "message"),
    [
        ((32, 48), None, r"a.png is 48 x 32 pixels, expected 16 x 16 or 64 x 64, as the cascade"
         r" enlarges; --resize_low_res=16 cuts out"),
        ((100, 80), None, r"is 80 x 100 pixels, .*--resize_low_res=64 cuts"),
        ((9, 9), None, r"is 9 x 9 pixels, expected 16 x 16 or 64 x 64, as the cascade enlarges$"),
        ((12, 40), 16, r"a.png is 40 x 12 pixels, expected at least 16 x 16"),
        ((200, 200), None, r"a.png: 200 x 200 pixels, expected at most 10000"),
    ],
)  # fmt: skip
def test_other_sizes_are_refused(tmp_path, size, resize_to, message):
    _file(tmp_path / "a.png", np.zeros((*size, 3), np.uint8))
    with pytest.raises(UserError, match=message) as e:
        _read(tmp_path, resize_to=resize_to)
    assert str(e.value).startswith(f"--low_res={tmp_path}: ")
    assert "\n" not in str(e.value)


def test_sizes_that_differ_are_refused(tmp_path):
    _file(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    _file(tmp_path / "b.png", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"a.png is 16 x 16 pixels, b.png 64 x 64 pixels: expected"):
        _read(tmp_path)


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--low_res=.*nothing: no such file or folder"):
        _read(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a.txt: expected a folder of images, a file that ends"):
        _read(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"no images there, expected files that end with .jpg"):
        _read(tmp_path)
    _file(tmp_path / "b.png", COLOUR[0])
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"b.png: .*damaged PNG"):
        _read(tmp_path)
