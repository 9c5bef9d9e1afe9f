import jax
import numpy as np
import pytest

from cascaded_diffusion.cascade import pixels as device
from cascaded_diffusion.data import transforms
from cascaded_diffusion.data.records import CorruptRecord
from tests.tiny import ROOT

_FIXTURES = np.load(ROOT / "tests" / "fixtures" / "resize_area.npz")
_CASES = sorted(name.removeprefix("image_") for name in _FIXTURES.files if name.startswith("image"))


def _exact_weights(size_in, size_out, method):
    """The equations of `resize_weights`, pixel by pixel, in float64."""
    scale, weights = size_in / size_out, np.zeros((size_out, size_in))
    for i in range(size_out):
        for j in range(size_in):
            if method == "area":
                overlap = min((i + 1) * scale, j + 1) - max(i * scale, j)
                weights[i, j] = max(overlap, 0.0) / scale
            else:
                weights[i, j] = max(0.0, 1 - abs(j + 0.5 - (i + 0.5) * scale) / max(scale, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("method", ["area", "bilinear"])
def test_resizes_are_tensorflows(method, case):
    image, expected = _FIXTURES[f"image_{case}"], _FIXTURES[f"{method}_{case}"]
    size = expected.shape[0]
    found = transforms.RESIZES[method](image.astype(np.float32), size)
    weights = _exact_weights(len(image), size, method)
    exact = np.einsum("ih,hwc,jw->ijc", weights, image.astype(np.float64), weights)
    # In grey levels; float32 sums of up to a hundred products.
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)
    # TensorFlow's coordinates are float32: where sizes are nearly the same, and where it
    # enlarges, it is itself off by up to 1e-3 grey levels. Else it is as near as we are.
    scale = 1.0 if len(image) > 1.5 * size or len(image) == size else 127.5
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-4)
    rounded = transforms.resize_uint8(image, size, method)
    assert rounded.dtype == np.uint8
    assert np.abs(rounded - exact).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("sizes", [(64, 16), (61, 60), (256, 64), (50, 32)])
def test_host_and_device_shrink_alike(sizes):
    size_in, size_out = sizes
    image = np.random.default_rng(1).integers(0, 256, (size_in, size_in, 3)).astype(np.float32)
    on_device = np.asarray(device.area_downsample(jax.numpy.asarray(image)[None], size_out))[0]
    np.testing.assert_allclose(transforms.area_resize(image, size_out), on_device, atol=1e-4)


def test_one_channel_stays_one():
    image = np.random.default_rng(1).integers(0, 256, (30, 30, 1)).astype(np.float32)
    for method in transforms.RESIZES.values():
        for size in (7, 30, 41):
            assert method(image, size).shape == (size, size, 1)


@pytest.mark.parametrize("shape", [(5, 8, 3), (9, 4, 3), (6, 6, 3), (7, 4, 1)])
def test_the_crop_is_the_largest_centred_square(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    size, crop = min(shape[:2]), transforms.center_crop(image)
    assert crop.shape == (size, size, shape[2])
    before = [(length - size) // 2 for length in shape[:2]]
    np.testing.assert_array_equal(
        crop, image[before[0] : before[0] + size, before[1] : before[1] + size]
    )
    assert all(abs(length - size - 2 * b) <= 1 for length, b in zip(shape, before, strict=False))


def test_without_a_crop_images_must_be_square():
    image = np.zeros((5, 8, 3), np.uint8)
    with pytest.raises(CorruptRecord, match="8 x 5 pixels, expected a square: config.data.crop"):
        transforms.CROPS["none"](image)
    assert transforms.CROPS["none"](image[:, :5]).shape == (5, 5, 3)


def test_coins_are_fair_and_of_seed_and_position_alone():
    positions = np.arange(20_000)
    coins = transforms.coins(3, positions)
    assert abs(coins.mean() - 0.5) < 0.015
    # Neighbours, and other seeds, say nothing of each other.
    assert abs((coins[1:] == coins[:-1]).mean() - 0.5) < 0.015
    assert abs((coins == transforms.coins(4, positions)).mean() - 0.5) < 0.015
    np.testing.assert_array_equal(transforms.coins(3, positions[500:700]), coins[500:700])
    # A golden value: a run that goes on after an update must see what it would have seen.
    assert np.packbits(coins[:16]).tolist() == _GOLDEN


def test_a_flip_mirrors_all_images_of_the_row():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (3, 8, 8, 3), np.uint8),
        "low_res": rng.integers(0, 256, (3, 4, 4, 3), np.uint8),
        "label": np.arange(3),
    }
    before = {name: value.copy() for name, value in batch.items()}
    transforms.flip(batch, np.asarray([True, False, True]))
    for name in ("image", "low_res"):
        np.testing.assert_array_equal(batch[name][1], before[name][1])
        for row in (0, 2):
            np.testing.assert_array_equal(batch[name][row], before[name][row][:, ::-1])
    np.testing.assert_array_equal(batch["label"], before["label"])


_GOLDEN = [214, 42]


def test_adms_way_halves_then_resizes_then_crops():
    from PIL import Image

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (130, 90, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    found = transforms.adm_resize(image, 32)
    # 180 x 260 is halved twice, to 45 x 65, and resized to 32 x 46; 7 rows go at either end.
    picture = Image.fromarray(image).resize((90, 130), Image.Resampling.BOX)
    picture = picture.resize((45, 65), Image.Resampling.BOX)
    expected = np.asarray(picture.resize((32, 46), Image.Resampling.BICUBIC))[7:39]
    np.testing.assert_array_equal(found, expected)
    grey = transforms.adm_resize(image[..., :1], 32)
    assert grey.shape == (32, 32, 1)
    np.testing.assert_array_equal(transforms.adm_resize(expected, 32), expected)


def test_adms_way_takes_another_window_than_the_crop():
    # Seven rows go at either end of 46, which is another window than the largest square's.
    image = np.zeros((130, 90, 3), np.uint8)
    image[20:110] = np.linspace(0, 255, 90).astype(np.uint8)[:, None, None]
    ours = transforms.cropped_and_resized(image, 32, "center", "area")
    adms = transforms.cropped_and_resized(image, 32, "center", "adm")
    assert 0 < np.abs(ours.astype(int) - adms).mean() < 10
    with pytest.raises(CorruptRecord, match="expected a square"):
        transforms.cropped_and_resized(image, 32, "none", "adm")
