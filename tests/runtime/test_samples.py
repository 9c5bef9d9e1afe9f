import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import samples
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
    "NCHW": (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), "arr_0 is uint8 (7, 3, 6, 6), expected"),
    "names": (dict(images=IMAGES), "expected a folder of PNGs, or an .npz with arr_0"),
    "labels": (dict(arr_0=IMAGES, arr_1=LABELS[:3]), "arr_1 is int64 (3,), expected 7 integer"),
    "float labels": (dict(arr_0=IMAGES, arr_1=LABELS / 2), "arr_1 is float64 (7,), expected 7"),
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
    for i in range(2):
        Image.new("L", (9000, 9000)).save(tmp_path / f"{i}.png")
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
