import dataclasses
import json

import numpy as np
import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import reference as lib
from cascaded_diffusion.evaluation.frechet import FeatureStatistics
from tests.evaluation.stubs import Extractor

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
WORDS = dict(data="noise", split="train", crop="none", resize="area")


def _measure(batch_size=50, images=IMAGES, **kwargs):
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return lib.measure_reference(
        batches, Extractor(spatial=True), num_images=len(images), label="", **{**WORDS, **kwargs}
    )


def test_a_reference_is_what_its_images_are_for_any_batch_size():
    extractor, whole = Extractor(spatial=True), _measure()
    features = extractor(IMAGES)
    np.testing.assert_allclose(whole.pooled.mean, features.pooled.mean(0), rtol=1e-6)
    np.testing.assert_allclose(whole.pooled.covariance, np.cov(features.pooled.T), atol=1e-7)
    np.testing.assert_allclose(whole.spatial.covariance, np.cov(features.spatial.T), atol=1e-7)
    np.testing.assert_array_equal(whole.features, features.pooled)
    np.testing.assert_allclose(whole.pixels.mean, IMAGES.mean((0, 1, 2)))
    np.testing.assert_allclose(whole.pixels.std, IMAGES.std((0, 1, 2)))
    assert whole.fingerprint == lib.Fingerprint(
        **WORDS,
        num_images=50,
        resolution=8,
        channels=3,
        features="projection:1",
        pixels=whole.fingerprint.pixels,
    )
    for batch_size in (1, 7, 49):
        parts = _measure(batch_size)
        assert parts.fingerprint == whole.fingerprint
        np.testing.assert_allclose(parts.pooled.covariance, whole.pooled.covariance, atol=1e-9)
        np.testing.assert_allclose(parts.features, whole.features, atol=1e-7)
    changed = IMAGES.copy()
    changed[-1, -1, -1, -1] ^= 1
    assert _measure(images=changed).fingerprint.pixels != whole.fingerprint.pixels
    with pytest.raises(ValueError, match="50 images, expected 51"):
        lib.measure_reference([IMAGES], Extractor(), num_images=51, label="", **WORDS)


def test_features_are_kept_of_images_spread_over_the_set(monkeypatch):
    monkeypatch.setattr(lib, "_KEPT_FEATURES", 10)
    kept = _measure(7).features
    np.testing.assert_allclose(kept, Extractor()(IMAGES[::5]).pooled, atol=1e-7)


def test_the_file_gives_back_what_was_measured(tmp_path):
    path, made = tmp_path / "r.npz", _measure()
    lib.save_reference(path, made)
    read = lib.read_reference(str(path), flag="reference")
    assert (read.fingerprint, read.name) == (made.fingerprint, made.name)
    np.testing.assert_array_equal(read.pooled.mean, made.pooled.mean)
    np.testing.assert_array_equal(read.spatial.covariance, made.spatial.covariance)
    np.testing.assert_array_equal(read.features, made.features)
    np.testing.assert_array_equal(read.pixels.std, made.pixels.std)
    # Under the names that other tools read.
    with np.load(path, allow_pickle=False) as stored:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(stored.files)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(lib.Fingerprint)])
def test_a_mismatch_names_the_field_and_both_values(field):
    reference = _measure()
    found = getattr(reference.fingerprint, field)
    lib.check_reference(reference, "r.npz", "reference", **{field: found})
    other = found + 1 if isinstance(found, int) else f"{found}x"
    with pytest.raises(UserError) as error:
        lib.check_reference(reference, "r.npz", "reference", **{field: other})
    expected = f"--reference=r.npz: its field {field!r} is {found!r}, expected {other!r}; make"
    assert str(error.value).startswith(expected)


def test_a_file_of_another_tool_is_read(tmp_path):
    statistics = FeatureStatistics.of(Extractor()(IMAGES).pooled)
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=IMAGES, mu=statistics.mean, sigma=statistics.covariance)
    read = lib.read_reference(str(path), flag="reference")
    assert (read.fingerprint, read.spatial, read.features) == (None, None, None)
    assert read.name.startswith("adm.npz:")
    np.testing.assert_array_equal(read.pooled.mean, statistics.mean)
    assert lib.holds_statistics(str(path))
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    assert not lib.holds_statistics(str(tmp_path / "images.npz"))
    with pytest.raises(UserError, match="expected statistics, mu and sigma"):
        lib.read_reference(str(tmp_path / "images.npz"), flag="reference")


def _rewrite(path, **changes):
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(path, **{**arrays, **changes})


def test_what_has_changed_is_refused(tmp_path):
    path, made = tmp_path / "r.npz", _measure()
    lib.save_reference(path, made)
    _rewrite(path, mu=made.pooled.mean + 1e-9)
    with pytest.raises(UserError, match="its arrays have changed since it was written"):
        lib.read_reference(str(path), flag="reference")
    lib.save_reference(path, made)
    fingerprint = {**dataclasses.asdict(made.fingerprint), "num_images": 60}
    _rewrite(path, fingerprint=np.asarray(json.dumps(fingerprint)))
    with pytest.raises(UserError, match="its arrays have changed since it was written"):
        lib.read_reference(str(path), flag="reference")
    lib.save_reference(path, made)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot be read as .npz"):
        lib.read_reference(str(path), flag="reference")


@pytest.mark.parametrize(
    "arrays",
    [
        dict(mu=np.zeros(3), sigma=np.eye(4)),
        dict(mu=np.zeros((3, 1)), sigma=np.eye(3)),
        dict(mu=np.full(3, np.nan), sigma=np.eye(3)),
    ],
)
def test_statistics_that_cannot_be_are_refused(arrays, tmp_path):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=r"expected \[F\] and \[F, F\], finite"):
        lib.read_reference(str(tmp_path / "r.npz"), flag="reference")
