import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cascaded_diffusion.files.image_files import essential_png


def _png(image=None, **options):
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    (image or Image.fromarray(pixels)).save(data, "PNG", **options)
    return data.getvalue()


def _with_chunk(data, kind, body):
    """The chunk put right after the header, which takes 33 bytes."""
    crc = zlib.crc32(kind + body)
    return (
        data[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc) + data[33:]
    )


def _kinds(data):
    kinds, at = [], 8
    while at < len(data):
        kinds.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return kinds


def test_only_what_pixels_need_stays():
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    text.add_itxt("workflow", "y" * 3_000_000, zip=True)
    data = _png(pnginfo=text, icc_profile=bytes(2_000_000), dpi=(72, 72), exif=b"Exif\0\0")
    assert essential_png(data) == essential_png(_png())
    assert _kinds(essential_png(data)) == [b"IHDR", b"IDAT", b"IEND"]
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    kept = _kinds(essential_png(_png(palette, transparency=3, pnginfo=text)))
    assert kept == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]


def test_animations_stay_animations():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = _png(frames[0], save_all=True, append_images=frames[1:], duration=100)
    assert Image.open(io.BytesIO(essential_png(data))).n_frames == 2


def test_nothing_is_inflated():
    bomb = zlib.compress(bytes(200_000_000), 9)
    data = _with_chunk(_png(), b"zTXt", b"Comment\0\0" + bomb)
    data = _with_chunk(data, b"iCCP", b"profile\0\0" + bomb)
    tracemalloc.start()
    try:
        assert essential_png(data) == essential_png(_png())
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"", "no PNG"),
        (lambda d: b"GIF89a", "no PNG"),
        (lambda d: d[:8], "ends too early"),
        (lambda d: d[:-1], "ends too early"),
        (lambda d: d[:-12], "ends too early"),
        (lambda d: d[:33] + b"\xff\xff\xff\xff" + d[37:], "ends too early"),
        (lambda d: d[:60] + bytes([d[60] ^ 1]) + d[61:], "checksum is wrong"),
        (lambda d: _with_chunk(d, b"tEXt", b"a\0b").replace(b"a\0b", b"a\0c"), "checksum is wrong"),
    ],
)
def test_damage_is_noticed(change, message):
    with pytest.raises(ValueError, match=message):
        essential_png(change(_png()))
