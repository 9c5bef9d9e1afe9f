import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples import stored_images as samples
from cascaded_diffusion.files import npz_archive as npz_file
from tests.tiny import tiny_base

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 6, 6, 3), np.uint8)
LABELS = np.arange(7)


def _png(path, image, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **kwargs)


def test_npz_and_png_folder_hold_the_same_images(tmp_path):
    samples.save_samples(tmp_path / "a.npz", IMAGES, LABELS)
    for i, image in enumerate(IMAGES):  # in folders of classes, as other tools leave them
        _png(tmp_path / "b" / f"{i // 4}" / f"{i:03d}.png", image)
    npz = samples.open_images(str(tmp_path / "a.npz"), flag="samples")
    png = samples.open_images(str(tmp_path / "b"), flag="samples")
    np.testing.assert_array_equal(npz.labels, LABELS)
    assert png.labels is None
    assert png.images.shape == IMAGES.shape == npz.images.shape
    np.testing.assert_array_equal(png.images[2:5], IMAGES[2:5])
    np.testing.assert_array_equal(png.images[np.array([6, 0])], IMAGES[[6, 0]])
    assert npz.digest(labels=False) == png.digest() != npz.digest()
    np.testing.assert_array_equal(np.concatenate(list(samples.batches(png.images, 3))), IMAGES)
    changed = IMAGES.copy()
    changed[3, 0, 0, 0] ^= 1
    assert samples.StoredImages("", changed, None).digest() != npz.digest()


def test_grey_pngs_have_one_channel(tmp_path):
    for i in range(2):
        _png(tmp_path / f"{i}.png", IMAGES[i, :, :, 0])
    images = samples.open_images(str(tmp_path), flag="samples").images
    np.testing.assert_array_equal(images[0:2], IMAGES[:2, :, :, :1])


def test_a_file_written_in_batches_is_what_numpy_reads(tmp_path):
    def batches():
        yield IMAGES[:3], LABELS[:3]
        yield IMAGES[3:], LABELS[3:]

    path = tmp_path / "all.npz"
    samples.save_sample_batches(path, IMAGES.shape, batches)
    with np.load(path, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["arr_0"], IMAGES)
        np.testing.assert_array_equal(stored["arr_1"], LABELS)
        assert stored["arr_1"].dtype == np.int64
    with pytest.raises(ValueError, match="7 samples, expected 8"):
        samples.save_sample_batches(tmp_path / "bad.npz", (8, *IMAGES.shape[1:]), batches)
    assert [p.name for p in tmp_path.iterdir()] == ["all.npz"]


def _write(path, **arrays):
    np.savez(path, **arrays)


FLOATS = (IMAGES / 255).astype(np.float32)
BAD_FILES = {
    "one image": (dict(arr_0=IMAGES[:1]), "1 images, expected at least 2"),
    "floats": (dict(arr_0=FLOATS), "arr_0 is float32 (7, 6, 6, 3) with values from 0 to 1"),
    "NaN": (
        dict(arr_0=np.where(FLOATS > 0.5, np.nan, FLOATS)),
        f"with {(FLOATS > 0.5).sum()} values that are NaN or infinite, expected uint8",
    ),
    "int64": (dict(arr_0=IMAGES.astype(np.int64)), "arr_0 is int64 (7, 6, 6, 3), expected uint8"),
    "channels": (dict(arr_0=IMAGES[..., :2]), "arr_0 is uint8 (7, 6, 6, 2), expected uint8"),
    "NCHW": (
        dict(arr_0=IMAGES.transpose(0, 3, 1, 2)),
        "arr_0 is uint8 (7, 3, 6, 6), expected uint8 (n, height, width, 1 or 3), values 0 to 255;"
        " it looks like (n, channels, height, width)",
    ),
    "three numbers": (dict(arr_0=IMAGES[0]), "arr_0 is uint8 (6, 6, 3), expected uint8 (n, heigh"),
    "one number": (dict(arr_0=np.uint8(3)), "arr_0 is uint8 (), expected uint8 (n, height"),
    "objects": (dict(arr_0=IMAGES.astype(object)), "arr_0 holds Python objects"),
    "no rows": (dict(arr_0=np.zeros((5, 0, 10, 3), np.uint8)), "(5, 0, 10, 3), which is empty"),
    "bools": (dict(arr_0=IMAGES > 3), "arr_0 is bool (7, 6, 6, 3), expected uint8"),
    "text": (dict(arr_0=np.asarray("images")), "arr_0 is <U6 (), expected uint8"),
    "complex": (dict(arr_0=IMAGES * 1j), "arr_0 is complex128 (7, 6, 6, 3), expected uint8"),
    "names": (dict(images=IMAGES), "expected a folder of PNGs, or an .npz with arr_0"),
    "labels": (dict(arr_0=IMAGES, arr_1=LABELS[:3]), "arr_1 is int64 (3,), expected 7 integer"),
    "float labels": (dict(arr_0=IMAGES, arr_1=LABELS / 2), "arr_1 is float64 (7,), expected 7"),
    "NaN labels": (dict(arr_0=IMAGES, arr_1=LABELS * np.nan), "arr_1 is float64 (7,), expected 7"),
    "bool labels": (dict(arr_0=IMAGES, arr_1=LABELS > 3), "arr_1 is bool (7,), expected 7 integer"),
    "labels beyond int64": (
        dict(arr_0=IMAGES, arr_1=np.full(7, 1 << 63, np.uint64)),
        "arr_1 is uint64 (7,), expected 7 integer labels",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_in_one_line(name, tmp_path):
    arrays, message = BAD_FILES[name]
    path = tmp_path / "a.npz"
    _write(path, **arrays)
    with pytest.raises(UserError) as error:
        samples.open_images(str(path), flag="samples")
    assert str(error.value).startswith(f"--samples={path}: ")
    assert message in str(error.value)


def test_damaged_and_missing_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    samples.save_samples(path, IMAGES, LABELS)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=f"--samples={path}: expected a folder of PNGs, or an"):
            samples.open_images(str(path), flag="samples")
    np.save(tmp_path / "a.npy", IMAGES)
    for name in ("none.npz", "a.npy"):
        with pytest.raises(UserError, match="expected"):
            samples.open_images(str(tmp_path / name), flag="samples")


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="0 .png files there, expected at least 2"):
        samples.open_images(str(tmp_path), flag="samples")
    for i in range(3):
        _png(tmp_path / f"{i}.png", IMAGES[i])
    _png(tmp_path / "1.png", IMAGES[1][:5])
    with pytest.raises(UserError, match=r"1.png is \(5, 6, 3\), expected \(6, 6, 3\)"):
        samples.open_images(str(tmp_path), flag="samples").images[0:3]
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(UserError, match="1.png cannot be read as PNG"):
        samples.open_images(str(tmp_path), flag="samples").images[0:3]
    _png(tmp_path / "1.jpg", IMAGES[1])
    with pytest.raises(UserError, match="1.jpg is of a lossy format, expected PNG"):
        samples.open_images(str(tmp_path), flag="samples")


def test_a_bomb_is_refused_from_its_header(tmp_path):
    _png(tmp_path / "1.png", IMAGES[1])
    header = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = (tmp_path / "1.png").read_bytes()[-12:]
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + end)
    with pytest.raises(UserError, match="0.png has 9000 x 9000 pixels, expected at most 64000000"):
        samples.open_images(str(tmp_path), flag="samples")


def test_samples_of_another_stage_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    samples.save_samples(path, IMAGES, LABELS)
    stage = tiny_base().stage
    with pytest.raises(UserError, match=r"images of \(6, 6, 3\), expected \(16, 16, 1\)"):
        samples.load_samples(str(path), stage)
    _write(path, arr_0=np.zeros((3, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match="no labels; 'base16' has 10 classes"):
        samples.load_samples(str(path), stage)
    _write(path, arr_0=np.zeros((3, 16, 16, 1), np.uint8), arr_1=np.asarray([0, 9, 10]))
    with pytest.raises(UserError, match="labels from 0 to 10, expected 0 to 9, as 'base16' has"):
        samples.load_samples(str(path), stage)


def test_any_order_of_bytes_and_axes_is_read(tmp_path):
    _write(tmp_path / "a.npz", arr_0=np.asfortranarray(IMAGES), arr_1=LABELS.astype(">i2"))
    samples.save_samples(tmp_path / "b.npz", IMAGES, LABELS)
    a, b = (samples.open_images(str(tmp_path / f"{x}.npz"), flag="samples") for x in "ab")
    assert a.labels.dtype == np.int64
    assert a.digest() == b.digest()


def _folder(path, count=4):
    for i in range(count):
        _png(path / f"{i:02d}.png", IMAGES[i])
    return path


def test_hidden_parts_are_passed_over_and_counted(tmp_path, capsys):
    folder = _folder(tmp_path / ".cache" / "samples")  # what is above does not count
    plain = samples.open_images(str(folder), flag="samples").digest()
    assert capsys.readouterr().err == "samples: 4 images\n"
    for name in (".ipynb_checkpoints/00-checkpoint.png", ".Trash-0/files/9.png", "a/.b/c/1.png"):
        _png(folder / name, IMAGES[6])
    _png(folder / ".ipynb_checkpoints" / "1.jpg", IMAGES[6])
    _png(folder / "__MACOSX" / "00.png", IMAGES[6])
    _png(folder / "._00.png", IMAGES[6])
    (folder / ".empty").mkdir()
    (folder / "list.txt").touch()
    opened = samples.open_images(str(folder), flag="samples")
    assert opened.images.shape == (4, 6, 6, 3)
    assert opened.digest() == plain
    note = capsys.readouterr().err
    assert note.startswith(
        "samples: 4 images (7 other files passed over: 2 in .ipynb_checkpoints, 1 "
    )
    for kind in ("1 in .Trash-0", "1 in .b", "1 in __MACOSX", "1 hidden"):
        assert kind in note
    samples.save_samples(tmp_path / "a.npz", IMAGES, LABELS)
    samples.open_images(str(tmp_path / "a.npz"), flag="reference")
    assert capsys.readouterr().err == "reference: 7 images\n"


def test_links_are_followed_and_each_folder_is_read_once(tmp_path, capsys):
    folder = _folder(tmp_path / "a")
    _folder(tmp_path / "more", 3)
    (folder / "linked").symlink_to(tmp_path / "more")
    (folder / "again").symlink_to(tmp_path / "more")
    (folder / "linked" / "loop").symlink_to(folder)
    (folder / "99.png").symlink_to(folder / "00.png")
    assert len(samples.open_images(str(folder), flag="samples")) == 4 + 3 + 1
    assert "2 links to a folder that was read already" in capsys.readouterr().err


def test_what_pixels_do_not_need_is_not_looked_at(tmp_path):
    text = PngInfo()
    text.add_text("prompt", "a cat " * 500_000, zip=True)
    text.add_text("parameters", "a dog " * 500_000)
    _png(tmp_path / "0.png", IMAGES[0], pnginfo=text)
    _png(tmp_path / "1.png", IMAGES[1], icc_profile=RNG.bytes(2_000_000))
    _png(tmp_path / "2.png", IMAGES[2])
    with (tmp_path / "2.png").open("ab") as f:
        f.write(b"after the end")
    images = samples.open_images(str(tmp_path), flag="samples").images
    np.testing.assert_array_equal(images[0:3], IMAGES[:3])


def _damaged_header(path):
    data = bytearray(path.read_bytes())
    data[18] ^= 1
    path.write_bytes(data)


ODD = {
    "another size": (lambda p: _png(p, IMAGES[0][:5]), "is (5, 6, 3), expected (6, 6, 3), as the"),
    "grey": (
        lambda p: _png(p, IMAGES[0, ..., 0]),
        "is (6, 6, 1), expected (6, 6, 3), as the first",
    ),
    "alpha": (
        lambda p: Image.new("RGBA", (6, 6)).save(p),
        "is 8-bit RGBA, expected 8-bit grey or RGB",
    ),
    "palette": (
        lambda p: Image.new("P", (6, 6)).save(p),
        "is 1-bit palette, expected 8-bit grey or RGB",
    ),
    "16-bit": (lambda p: Image.new("I;16", (6, 6)).save(p), "is 16-bit grey, expected 8-bit"),
    "header": (_damaged_header, "cannot be read as PNG (its header is damaged)"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read as PNG (its header is damaged)"),
    "cut off": (
        lambda p: p.write_bytes(p.read_bytes()[:-20]),
        "cannot be read as PNG (damaged PNG: it ends too early)",
    ),
    "text": (lambda p: p.write_text("a" * 100), "cannot be read as PNG (its header is damaged)"),
    "JPEG": (
        lambda p: Image.new("RGB", (6, 6)).save(p, format="jpeg"),
        "cannot be read as PNG (its header is damaged)",
    ),
    "pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "is no regular file"),
    "device": (lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "is no regular file"),
    "link to nothing": (lambda p: (p.unlink(), p.symlink_to("nothing")), "is no regular file"),
    "jfif": (lambda p: p.rename(p.with_name("02.jfif")), "lossy format, expected PNG"),
}


@pytest.mark.parametrize("name", ODD)
def test_one_odd_file_among_many_is_found_before_any_pixel_is_read(name, tmp_path, monkeypatch):
    change, message = ODD[name]
    change(_folder(tmp_path) / "02.png")
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UserError) as error:
        samples.open_images(str(tmp_path), flag="samples")
    assert str(error.value).startswith(f"--samples={tmp_path}: 02.")
    assert message in str(error.value)


def test_flipped_bits_of_pixels_and_animations_are_refused(tmp_path):
    _folder(tmp_path)
    data = bytearray((tmp_path / "02.png").read_bytes())
    data[60] ^= 1
    (tmp_path / "02.png").write_bytes(data)
    frames = [Image.fromarray(image) for image in IMAGES[:2]]
    frames[0].save(tmp_path / "03.png", save_all=True, append_images=frames[1:])
    images = samples.open_images(str(tmp_path), flag="samples").images
    for rows, message in ((2, "02.png cannot be read as PNG .*checksum"), (3, "03.png .*animated")):
        with pytest.raises(UserError, match=message):
            images[rows : rows + 1]


def test_names_that_are_not_utf_8_are_read(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    for i in range(2):
        buffer = io.BytesIO()
        Image.fromarray(IMAGES[i]).save(buffer, format="png")
        with open(os.path.join(folder, b"\xff%d.png" % i), "wb") as f:
            f.write(buffer.getvalue())
    opened = samples.open_images(str(tmp_path), flag="samples")
    np.testing.assert_array_equal(opened.images[0:2], IMAGES[:2])
    _png(tmp_path / "grey.png", IMAGES[0, ..., 0])
    with pytest.raises(UserError, match="grey.png is") as error:
        samples.open_images(str(tmp_path), flag="samples")
    str(error.value).encode(errors="backslashreplace")


def _npz(path, header, *, data=b"", compression=zipfile.ZIP_STORED):
    """An .npz whose arr_0 has this header, whatever it holds."""
    text = header.encode().ljust(118) + b"\n"
    with zipfile.ZipFile(path, "w", compression) as archive:
        start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        archive.writestr("arr_0.npy", start + text + data)


def _header(shape, descr="|u1"):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    "header",
    [
        _header("(1000000000, 1000, 1000, 3)"),
        _header("(100000000000000000000, 1, 1, 3)"),
        _header("(4294967296, 4294967296, 1, 1)"),
        _header("(5, 0, 10, 3)"),
        _header("(-7, 6, 6, 3)"),
        _header("(7, 6, 6, 3)", "O"),
        _header("(7, 6, 6, 3)", "nonsense"),
        "(" * 100,
        "nothing",
    ],
)
def test_headers_that_cannot_be_true_are_refused_at_once(header, tmp_path):
    path = tmp_path / "a.npz"
    _npz(path, header, data=IMAGES.tobytes())
    with pytest.raises(UserError) as error:
        samples.open_images(str(path), flag="samples")
    assert str(error.value).startswith(f"--samples={path}: expected a folder of PNGs, or an .npz")
    assert "\n" not in str(error.value)


def test_a_small_file_that_inflates_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_file, "_FREE_BYTES", 1_000_000)
    data = bytes(9_000_000)
    _npz(tmp_path / "a.npz", _header("(900, 100, 100, 1)"), data=data, compression=8)
    with pytest.raises(UserError, match="arr_0 declares 9,000,129 bytes, which .* do not make"):
        samples.open_images(str(tmp_path / "a.npz"), flag="samples")


@pytest.mark.parametrize("kind", ["pipe", "device", "empty", "nothing", "folder"])
def test_what_is_no_file_does_not_hang(kind, tmp_path):
    path = tmp_path / "a.npz"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match="expected"):
        samples.open_images(str(path), flag="samples")


@pytest.mark.parametrize("path", ["ftp://bucket/samples.npz", "run[1]/a.npz", "a\0b", ""])
def test_paths_that_cannot_work_are_refused_by_name(path):
    with pytest.raises(UserError, match="--samples="):
        samples.open_images(path, flag="samples")


def test_random_bytes_and_damage_are_refused_or_leave_the_images(tmp_path):
    path = tmp_path / "a.npz"
    samples.save_samples(path, IMAGES, LABELS)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for at in RNG.integers(0, len(data), RNG.integers(1, 4)):
            data[at] = RNG.integers(256)
        path.write_bytes(data if RNG.random() < 0.7 else data[: RNG.integers(len(data))])
        try:
            found = samples.open_images(str(path), flag="samples")
        except UserError as e:
            assert "\n" not in str(e)
        else:
            np.testing.assert_array_equal(found.images, IMAGES)


def test_stored_samples_are_those_of_their_origin_or_none(tmp_path):
    path, origin = tmp_path / "a.npz", {"seed": 7, "levels": [0.1]}
    assert samples.stored_samples(path, origin) is None
    samples.save_samples(path, IMAGES, LABELS, provenance=origin)
    np.testing.assert_array_equal(samples.stored_samples(path, origin), IMAGES)
    assert samples.stored_samples(path, {**origin, "seed": 8}) is None
    whole = path.read_bytes()
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])  # in arr_0
    assert samples.stored_samples(path, origin) is None
    for provenance in ("[" * 100_000, "{", "3", json.dumps([origin]), "1" * 5000):
        _write(path, arr_0=IMAGES, provenance=np.asarray(provenance))
        assert samples.stored_samples(path, origin) is None
    _write(path, arr_0=IMAGES, provenance=np.arange(3))
    assert samples.stored_samples(path, origin) is None
    _write(path, provenance=np.asarray(json.dumps(origin)))
    assert samples.stored_samples(path, origin) is None
