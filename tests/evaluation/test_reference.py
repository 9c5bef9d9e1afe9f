import dataclasses
import json

import numpy as np
import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import reference as lib
from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics
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
    assert lib.holds_statistics(str(path), flag="reference")
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    assert not lib.holds_statistics(str(tmp_path / "images.npz"), flag="reference")
    assert not lib.holds_statistics(str(tmp_path), flag="reference")
    with pytest.raises(UserError, match="expected statistics, mu and sigma"):
        lib.read_reference(str(tmp_path / "images.npz"), flag="reference")


def test_the_differing_field_is_told_in_a_few_words():
    reference = _measure()
    assert lib.differing_field(reference, data="noise", num_images=50) is None
    said = lib.differing_field(reference, data="noise", num_images=60)
    assert said == "its field 'num_images' is 50, expected 60"
    foreign = dataclasses.replace(reference, fingerprint=None)
    assert lib.differing_field(foreign, data="noise") == "it has no fingerprint"
    lib.check_reference(foreign, "r.npz", "reference", data="noise")


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


EYE = np.eye(3)
GOOD = dict(mu=np.zeros(3), sigma=EYE)
PRINT = dict(num_images=1, resolution=8, channels=3, features="a", pixels="b", **WORDS)
ODD = {
    "sizes": (dict(mu=np.zeros(3), sigma=np.eye(4)), "expected [F] and [F, F], finite"),
    "dimensions": (dict(mu=np.zeros((3, 1)), sigma=EYE), "expected [F] and [F, F], finite"),
    "NaN": (dict(mu=np.full(3, np.nan), sigma=EYE), "expected [F] and [F, F], finite"),
    "text": (dict(mu=np.asarray("mean"), sigma=EYE), "a mean of <U4 () and a covariance"),
    "complex": (dict(mu=np.zeros(3), sigma=EYE * 1j), "a covariance of complex128 (3, 3)"),
    "bools": (dict(mu=np.zeros(3), sigma=EYE > 0), "a covariance of bool (3, 3)"),
    "objects": (dict(mu=np.zeros(3, object), sigma=EYE), "mu holds Python objects"),
    "not symmetric": (dict(mu=np.zeros(3), sigma=EYE + np.eye(3, k=1)), "its covariance is none"),
    "negative": (dict(mu=np.zeros(3), sigma=-EYE), "its covariance is none"),
    "mu alone": (dict(mu=np.zeros(3)), "expected statistics, mu and sigma"),
    "mu_s alone": ({**GOOD, "mu_s": np.zeros(3)}, "of mu_s and sigma_s it has one"),
    "sigma_s alone": ({**GOOD, "sigma_s": EYE}, "of mu_s and sigma_s it has one"),
    "features": ({**GOOD, "features": np.zeros((5, 4))}, "features are float64 (5, 4), expected"),
    "bad features": ({**GOOD, "features": np.full((5, 3), np.inf)}, "features are float64 (5, 3)"),
    "pixels": ({**GOOD, "pixels": np.ones((2, 3))}, "pixels are float64 (2, 3), expected count"),
    "no pixels": ({**GOOD, "pixels": np.zeros((3, 3))}, "pixels are float64 (3, 3), expected"),
    "a print": ({**GOOD, "fingerprint": np.arange(3)}, "its fingerprint is no JSON"),
    "brackets": ({**GOOD, "fingerprint": np.asarray("[" * 100_000)}, "its fingerprint is no JSON"),
    "numbers": (
        {**GOOD, "fingerprint": np.asarray("[1]")},
        "its fingerprint is of another version",
    ),
    "a type": (
        {**GOOD, "fingerprint": np.asarray(json.dumps({**PRINT, "features": 3}))},
        "its fingerprint is of another version, expected the fields data, split,",
    ),
    "a field more": (
        {**GOOD, "fingerprint": np.asarray(json.dumps({**PRINT, "more": 3}))},
        "its fingerprint is of another version",
    ),
    "a field less": (
        {**GOOD, "fingerprint": np.asarray(json.dumps(WORDS))},
        "its fingerprint is of another version",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_statistics_that_cannot_be_are_refused_in_one_line(name, tmp_path):
    arrays, message = ODD[name]
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError) as error:
        lib.read_reference(str(tmp_path / "r.npz"), flag="reference")
    assert str(error.value).startswith(f"--reference={tmp_path}/r.npz: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_any_type_of_numbers_is_read(tmp_path):
    for dtype in (">f4", "<f2", "f8", "i4", ">i8"):
        np.savez(tmp_path / "r.npz", mu=np.zeros(3, dtype), sigma=np.asfortranarray(EYE, dtype))
        read = lib.read_reference(str(tmp_path / "r.npz"), flag="reference")
        assert read.pooled.covariance.dtype == np.float64
        np.testing.assert_array_equal(read.pooled.covariance, EYE)


def test_damage_anywhere_is_one_line_or_leaves_the_numbers(tmp_path):
    path, made, rng = tmp_path / "r.npz", _measure(), np.random.default_rng(0)
    lib.save_reference(path, made)
    whole = path.read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data if rng.random() < 0.7 else data[: rng.integers(len(data))])
        try:
            read = lib.read_reference(str(path), flag="reference")
        except UserError as e:
            assert "\n" not in str(e)
        else:
            np.testing.assert_array_equal(read.pooled.covariance, made.pooled.covariance)
