"""The extractor against other implementations, whose outputs are stored (tests/fixtures)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.evaluation.features import inception_extractor as inception
from cascaded_diffusion.evaluation.features.inception_weights import InceptionWeights
from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from cascaded_diffusion.networks.inception import checkpoint_tensors, params_from_checkpoint
from cascaded_diffusion.runtime.mesh import build_mesh
from tests.evaluation.random_inception import fixture_images, random_checkpoint
from tests.tiny import ROOT

IMAGES = fixture_images()


@functools.cache
def _weights():
    params = params_from_checkpoint(random_checkpoint(checkpoint_tensors()))
    return InceptionWeights(params, "0" * 64)


def _new_extractor(resize, *, devices=1, batch_size=2):
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.devices()[:devices])
    return inception.InceptionExtractor(_weights(), resize, mesh, batch_size)


# A network takes seconds to trace and to compile.
_extractor = functools.cache(_new_extractor)


@pytest.fixture(scope="module")
def stored():
    with np.load(ROOT / "tests" / "fixtures" / "inception_features.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("resize", ["legacy", "clean"])
def test_features_are_those_of_another_implementation(resize, stored):
    extractor = _extractor(resize)
    for size, images in IMAGES.items():
        features = extractor(images)
        name = f"{resize}_{size}"
        np.testing.assert_allclose(features.pooled, stored[f"{name}_pooled"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(features.logits, stored[f"{name}_logits"], atol=1e-4, rtol=0)
        spatial = features.spatial[:, ::8]
        np.testing.assert_allclose(spatial, stored[f"{name}_spatial"], atol=1e-4, rtol=0)
        assert (features.pooled.shape, features.spatial.shape) == ((2, 2048), (2, 17 * 17 * 7))
    other = stored[f"{'clean' if resize == 'legacy' else 'legacy'}_320_pooled"]
    assert np.abs(features.pooled - other).max() > 0.1  # the modes are not the same


def test_any_number_of_devices_and_any_batch_give_the_same():
    images = np.concatenate([IMAGES[32], IMAGES[32][:1, :, ::-1]])
    found = []
    # Of three images, the last batch is filled up, or the last device's share, or none is.
    for how in ({}, {"devices": 4}, {"batch_size": 3}):
        extractor = _extractor("legacy", **how)
        sides = [extractor(side) for side in (images, images[::-1, ::-1])]
        # Every eighth feature: the distance of 2,048 would take most of the test's time.
        a, b = (FeatureStatistics.of(side.pooled[:, ::8]) for side in sides)
        found.append((sides[0], frechet_distance(a, b)))
    (one, expected), *others = found
    for other, distance in others:
        np.testing.assert_allclose(other.pooled, one.pooled, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(other.logits, one.logits, rtol=2e-5, atol=2e-5)
        assert distance == pytest.approx(expected, rel=1e-6)


def test_grey_images_are_taken_as_rgb():
    grey = IMAGES[32][..., :1]
    for mode in inception.RESIZES:
        one = inception.at_inception_size(jnp.asarray(grey), mode)
        three = inception.at_inception_size(jnp.asarray(grey.repeat(3, axis=-1)), mode)
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("size", [32, 256, 299])
def test_pytorch_fid_has_half_pixel_centres_and_another_scale(size):
    image = np.random.default_rng(size).integers(0, 256, (1, size, size, 3), np.uint8)
    ours = inception.at_inception_size(jnp.asarray(image), "pytorch_fid")
    expected = jax.image.resize(image.astype(np.float32), ours.shape, "linear", antialias=False)
    np.testing.assert_allclose(ours, expected, atol=1e-2)
    inputs = _extractor("pytorch_fid")._resized(jnp.full((1, 299, 299, 3), 255, jnp.uint8))
    np.testing.assert_allclose(inputs, 1.0, atol=1e-6)
    with_others = _extractor("legacy")._resized(jnp.full((1, 299, 299, 3), 255, jnp.uint8))
    np.testing.assert_allclose(with_others, 127 / 128, atol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_clean_is_pillows_bicubic_of_floats(size):
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    channels = [
        np.asarray(
            Image.fromarray(image[..., c].astype(np.float32), mode="F").resize(
                (299, 299), Image.Resampling.BICUBIC
            )
        )
        for c in range(3)
    ]
    expected = np.clip(np.stack(channels, axis=-1), 0, 255)
    ours = inception.at_inception_size(jnp.asarray(image[None]), "clean")[0]
    assert np.abs(ours - expected).max() < 0.01


@pytest.mark.parametrize("size", [32, 299, 320])
def test_legacy_is_linear_between_pixels_without_half_centres(size):
    image = np.random.default_rng(size).integers(0, 256, size).astype(float)
    expected = []
    for i in range(299):
        x = i * size / 299
        low = int(x)
        high = min(low + 1, size - 1)
        expected.append(image[low] * (1 - (x - low)) + image[high] * (x - low))
    np.testing.assert_allclose(inception.legacy_matrix(size, 299) @ image, expected, atol=1e-3)


def test_the_program_is_at_highest_precision_or_refused(monkeypatch):
    assert _extractor("legacy")._network is not None

    def product(precision):
        return jax.jit(lambda x: jnp.dot(x, x, precision=precision)).lower(jnp.ones((2, 2)))

    inception.check_precision(product("highest").as_text())
    for program in (product(None).as_text(), product("high").as_text(), "module {}"):
        with pytest.raises(RuntimeError, match="not at the highest precision"):
            inception.check_precision(program)
    from cascaded_diffusion.networks import inception as network

    monkeypatch.setattr(network, "_HIGHEST", None)
    with pytest.raises(RuntimeError, match="9. of 9. products"):
        _new_extractor("legacy")._network  # noqa: B018


def test_the_identity_says_how_and_by_what():
    assert _extractor("clean").identity == "inception-2015-12-05:clean:000000000000"
