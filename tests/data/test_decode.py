import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cascaded_diffusion.config.schema import MAX_PIXELS
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.records import CorruptRecord


def _picture(height=60, width=70, channels=3):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 7, channels), np.uint8)
    coarse = coarse if channels > 1 else coarse[..., 0]
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def _encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def _decode(data, channels=3, max_pixels=MAX_PIXELS):
    return decode_image(data, channels=channels, max_pixels=max_pixels)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": 0, "quality": 97}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_pixels_are_pillows(kind, options):
    data = _encoded(_picture(), kind, **options)
    pixels, note = _decode(data)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert note is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_becomes_colour_and_colour_grey(kind):
    grey = _encoded(_picture(channels=1), kind)
    pixels, note = _decode(grey)
    assert pixels.shape == (60, 70, 3)
    assert note is None
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
    np.testing.assert_array_equal(_decode(grey, channels=1)[0][..., 0], pixels[..., 0])
    colour = _encoded(_picture(), kind)
    expected = np.asarray(Image.open(io.BytesIO(colour)).convert("L"))
    np.testing.assert_array_equal(_decode(colour, channels=1)[0][..., 0], expected)


def test_what_is_converted_is_said():
    cmyk = _picture().convert("CMYK")
    palette = _picture().convert("P")
    clear = _picture().convert("RGBA")
    clear.putalpha(100)
    for image, kind, expected in (
        (cmyk, "JPEG", "CMYK"),
        (palette, "PNG", "palette"),
        (clear, "PNG", "transparency"),
        (clear, "WEBP", "transparency"),
    ):
        pixels, note = _decode(_encoded(image, kind))
        assert pixels.shape == (60, 70, 3)
        assert note == expected
    # Transparency is dropped: the colours beneath it stay.
    pixels, _ = _decode(_encoded(clear, "PNG"))
    np.testing.assert_array_equal(pixels, np.asarray(_picture()))


def test_sixteen_bits_are_rounded_to_eight():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    grey = _encoded(Image.fromarray(values), "PNG")
    pixels, note = _decode(grey)
    np.testing.assert_array_equal(pixels[..., 1], np.rint(values / 257.0))
    assert note == "16-bit"

    import cv2

    deep = np.stack([values, values.T, values[::-1]], axis=-1)
    _, data = cv2.imencode(".png", deep[..., ::-1])
    pixels, note = _decode(data.tobytes())
    np.testing.assert_array_equal(pixels, np.rint(deep / 257.0))
    assert note == "16-bit"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind):
    frames = [_picture(), _picture().rotate(90)]
    data = _encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    with pytest.raises(CorruptRecord, match="animated, 2 frames"):
        _decode(data)


@pytest.mark.parametrize("channels", [1, 3])
def test_of_a_phones_several_pictures_the_first_is_taken(channels):
    first, preview = _picture(), _picture(30, 35)
    data = _encoded(first, "MPO", save_all=True, append_images=[preview], quality=95)
    assert (Image.open(io.BytesIO(data)).format, Image.open(io.BytesIO(data)).n_frames) == (
        "MPO",
        2,
    )
    pixels, note = _decode(data, channels)
    expected, _ = _decode(_encoded(first, "JPEG", quality=95), channels)
    np.testing.assert_array_equal(pixels, expected)
    assert note is None
    cmyk = _encoded(first.convert("CMYK"), "MPO", save_all=True, append_images=[preview])
    assert _decode(cmyk, channels)[1] == "CMYK"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA", "I;16"])
def test_ancillary_chunks_of_a_png_do_not_matter(mode, channels):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    text.add_text("prompt", "y" * 3_000_000)
    image = Image.fromarray(np.arange(0, 64000, 1000, np.uint16).reshape(8, 8))
    image = image if mode == "I;16" else _picture().convert(mode)
    plain = _decode(_encoded(image, "PNG"), channels)
    heavy = _encoded(image, "PNG", pnginfo=text, icc_profile=np.random.bytes(2_000_000))
    assert len(heavy) > 5_000_000
    pixels, note = _decode(heavy, channels)
    np.testing.assert_array_equal(pixels, plain[0])
    assert note == plain[1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_large_profiles_and_exif_do_not_matter(kind, channels):
    plain, _ = _decode(_encoded(_picture(), kind, quality=90), channels)
    more = {
        "icc_profile": np.random.bytes(2_000_000),
        "exif": b"Exif\0\0" + np.random.bytes(60_000),
    }
    heavy = _encoded(_picture(), kind, quality=90, **more)
    assert len(heavy) > 2_000_000
    np.testing.assert_array_equal(_decode(heavy, channels)[0], plain)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_cut_is_noticed(kind):
    data = _encoded(_picture(), kind)
    for end in [*range(40), *range(40, len(data) - 1, max(1, len(data) // 60)), len(data) - 1]:
        with pytest.raises(CorruptRecord):
            _decode(data[:end])


def test_every_flipped_bit_of_a_png_is_noticed():
    data = _encoded(_picture(20, 24), "PNG")
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 200):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(CorruptRecord):
            _decode(bytes(damaged))


def test_a_jpeg_that_libjpeg_warns_of_is_refused():
    # Pillow decodes it without a word.
    data = bytearray(_encoded(_picture(), "JPEG"))
    scan = data.index(b"\xff\xda") + 20
    del data[scan + 100 : scan + 200]
    assert Image.open(io.BytesIO(bytes(data))).convert("RGB").size == (70, 60)
    with pytest.raises(CorruptRecord, match="damaged JPEG"):
        _decode(bytes(data))
    with pytest.raises(CorruptRecord):  # by the way of grey, too
        _decode(bytes(data), channels=1)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"GIF89a", b"<html>no image</html>", b"\x89PNG\r\n\x1a\n", b"BM"]
)
def test_what_is_no_image_is_refused(data):
    with pytest.raises(CorruptRecord, match="."):
        _decode(data)


def test_formats_that_are_not_allowed_are_refused():
    for kind in ("GIF", "BMP", "TIFF"):
        with pytest.raises(CorruptRecord, match="cannot be read as JPEG, PNG, WEBP"):
            _decode(_encoded(_picture(), kind))


def _png_of_size(width, height):
    """A PNG of a few hundred bytes that says it is as large as that."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def test_a_bomb_is_refused_from_its_header():
    bomb = _png_of_size(13_000, 13_000)
    _decode(_encoded(_picture(), "PNG"))  # what is slow the first time
    start = time.process_time()
    with pytest.raises(CorruptRecord, match="13000 x 13000 pixels, expected at most 64000000"):
        _decode(bomb)
    assert time.process_time() - start < 0.5  # decoding takes several seconds
    # The bound is the config's, not a library's.
    with pytest.raises(CorruptRecord, match="20000 x 20000 pixels, expected .*data.max_pixels"):
        _decode(_png_of_size(20_000, 20_000))
    with pytest.raises(CorruptRecord, match="70 x 60 pixels, expected at most 4000"):
        _decode(_encoded(_picture(), "JPEG"), max_pixels=4000)
    with pytest.raises(CorruptRecord, match="0 x 5|cannot be read"):
        _decode(_png_of_size(0, 5))
