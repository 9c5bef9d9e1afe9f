"""The extractor against other implementations, whose outputs are stored (tests/fixtures)."""

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


@pytest.fixture(scope="module")
def weights():
    params = params_from_checkpoint(random_checkpoint(checkpoint_tensors()))
    return InceptionWeights(params, "0" * 64)


def _extractor(weights, resize, *, devices=1, batch_size=2):
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.devices()[:devices])
    return inception.InceptionExtractor(weights, resize, mesh, batch_size)


@pytest.fixture(scope="module")
def stored():
    with np.load(ROOT / "tests" / "fixtures" / "inception_features.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("resize", ["legacy", "clean"])
def test_features_are_those_of_another_implementation(resize, weights, stored):
    extractor = _extractor(weights, resize)
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


def test_any_number_of_devices_and_any_batch_give_the_same(weights):
    images = np.concatenate([IMAGES[32], IMAGES[32][:, ::-1], IMAGES[32][:, :, ::-1]])[:5]
    one = _extractor(weights, "legacy")(images)
    eight = _extractor(weights, "legacy", devices=8)(images)
    np.testing.assert_allclose(eight.pooled, one.pooled, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(eight.logits, one.logits, rtol=2e-5, atol=2e-5)

    def fid(extractor):
        sides = (images, images[::-1, ::-1])
        a, b = (FeatureStatistics.of(extractor(side).pooled) for side in sides)
        return frechet_distance(a, b)

    expected = fid(_extractor(weights, "legacy"))
    assert fid(_extractor(weights, "legacy", devices=8)) == pytest.approx(expected, rel=1e-6)
    assert fid(_extractor(weights, "legacy", batch_size=3)) == pytest.approx(expected, rel=1e-6)


def test_grey_images_are_taken_as_rgb():
    grey = IMAGES[32][..., :1]
    for mode in inception.RESIZES:
        one = inception.at_inception_size(jnp.asarray(grey), mode)
        three = inception.at_inception_size(jnp.asarray(grey.repeat(3, axis=-1)), mode)
        np.testing.assert_array_equal(one, three)


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


def test_the_program_is_at_highest_precision_or_refused(weights, monkeypatch):
    extractor = _extractor(weights, "legacy")
    assert extractor._compiled((2, 32, 32, 3)) is not None

    def product(precision):
        return jax.jit(lambda x: jnp.dot(x, x, precision=precision)).lower(jnp.ones((2, 2)))

    inception.check_precision(product("highest").as_text())
    for program in (product(None).as_text(), product("high").as_text(), "module {}"):
        with pytest.raises(RuntimeError, match="not at the highest precision"):
            inception.check_precision(program)
    from cascaded_diffusion.networks import inception as network

    monkeypatch.setattr(network, "_HIGHEST", None)
    with pytest.raises(RuntimeError, match="9. of 9. products"):
        _extractor(weights, "legacy")._compiled((2, 40, 40, 3))


def test_the_identity_says_how_and_by_what(weights):
    assert _extractor(weights, "clean").identity == "inception-2015-12-05:clean:000000000000"
