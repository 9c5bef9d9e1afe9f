import itertools

import numpy as np
import pytest

from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.data.shapes import NUM_CLASSES, SHAPES, load_shapes
from cascaded_diffusion.data.sources import load_source
from cascaded_diffusion.errors import UserError
from tests.tiny import config_values


@pytest.fixture(scope="module")
def splits():
    return {split: load_shapes(split) for split in ("train", "test")}


@pytest.mark.parametrize(("split", "n"), [("train", 1000), ("test", 200)])
def test_splits_are_balanced_colour_images(splits, split, n):
    images, labels = splits[split]
    assert (images.shape, images.dtype) == ((n, 64, 64, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((n,), np.int32)
    np.testing.assert_array_equal(labels, np.arange(n) % 10)
    assert (images.reshape(n, -1, 3).std(axis=1).max(axis=1) > 5).all()
    assert (images[..., 0] != images[..., 1]).any(axis=(1, 2)).all()


def test_every_call_draws_the_same(splits):
    for mine, again in zip(splits["test"], load_shapes("test"), strict=True):
        np.testing.assert_array_equal(mine, again)


def test_no_two_images_are_the_same(splits):
    images = [image.tobytes() for split in splits.values() for image in split[0]]
    assert len(set(images)) == len(images)


def test_stripes_show(splits):
    images, labels = splits["train"]
    steps = np.abs(np.diff(images.astype(int), axis=1)).mean(axis=(1, 2, 3))
    busy = np.asarray([steps[labels == k].mean() for k in range(NUM_CLASSES)])
    assert (busy[5:] > 1.5 * busy[:5]).all()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_just_fits_its_circle(name):
    u, v = np.meshgrid(*2 * [np.linspace(-1.2, 1.2, 481)])
    inside = SHAPES[name](u, v) < 0
    assert 0.98 < np.hypot(u, v)[inside].max() <= 1


def test_shapes_differ():
    u, v = np.meshgrid(*2 * [np.linspace(-1, 1, 201)])
    masks = [outline(u, v) < 0 for outline in SHAPES.values()]
    for one, other in itertools.combinations(masks, 2):
        assert (one != other).sum() > 0.2 * (one | other).sum()


def test_edges_are_smooth(splits):
    # A plain disc on its background: pixels between the two brightnesses.
    image = splits["train"][0][0].astype(int).sum(axis=-1)
    shape, background = image[26, 28], image[63, 63]
    low, high = sorted((shape, background))
    assert ((image > low + 0.3 * (high - low)) & (image < low + 0.7 * (high - low))).any()


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="eval_split = 'valid': expected 'train' or 'test', .*sh"):
        load_shapes("valid")


def test_the_source_is_there_by_name():
    config = run_config_from(config_values("sr64"))
    source = load_source(config.data, "test", config.stage)
    assert source.image_shape == (64, 64, 3)
    assert source.num_classes == NUM_CLASSES == 10
    assert len(source) == 200
