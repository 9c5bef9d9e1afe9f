import numpy as np
import pytest

from cascaded_diffusion.evaluation.frechet import FeatureStatistics, frechet_distance


def _exact(mean, covariance, count=10_000):
    """Statistics with exactly this mean and covariance."""
    mean = np.asarray(mean, np.float64)
    total = count * mean
    outer = np.asarray(covariance) * (count - 1) + np.outer(total, total) / count
    return FeatureStatistics(count, total, outer)


def _random_rotation(size, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return q


@pytest.mark.parametrize("size", [1, 16, 256])
def test_gaussians_with_common_axes_have_a_closed_form(size):
    rng = np.random.default_rng(0)
    a, b, mean_a, mean_b = rng.uniform(0.1, 2, (4, size))
    q = _random_rotation(size)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = frechet_distance(
        _exact(q @ mean_a, q @ np.diag(a) @ q.T), _exact(q @ mean_b, q @ np.diag(b) @ q.T)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_covariances_that_do_not_commute_against_scipy():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(500, 32)) @ rng.normal(size=(32, 32)), rng.normal(size=(400, 32)) + 0.3
    mu, cov = x.mean(0) - y.mean(0), np.cov(x.T) + np.cov(y.T)
    expected = mu @ mu + np.trace(cov - 2 * np.real(sqrtm(np.cov(x.T) @ np.cov(y.T))))
    got = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_distance_to_itself_is_zero_and_it_is_symmetric():
    rng = np.random.default_rng(2)
    a = FeatureStatistics.of(rng.normal(size=(300, 16)))
    b = FeatureStatistics.of(rng.normal(size=(200, 16)) * 2)
    assert frechet_distance(a, a) < 1e-8
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-10)


def test_fewer_examples_than_features_is_finite():
    rng = np.random.default_rng(3)
    few = FeatureStatistics.of(rng.normal(size=(10, 64)))
    assert np.isfinite(frechet_distance(few, FeatureStatistics.of(rng.normal(size=(20, 64)))))
    with pytest.raises(ValueError, match="at least 2 examples"):
        frechet_distance(few, FeatureStatistics.of(np.zeros((1, 64))))


def test_batches_in_any_order_give_the_same_statistics():
    features = np.random.default_rng(4).normal(size=(1000, 16)) + 5
    reference = FeatureStatistics.of(features)
    other = FeatureStatistics.of(np.random.default_rng(5).normal(size=(1000, 16)))
    shuffled = np.random.default_rng(6).permutation(features)
    parts = [FeatureStatistics.of(p) for p in np.split(shuffled, [1, 7, 400, 999])]
    merged = sum(parts[1:], start=parts[0])
    assert merged.count == 1000
    np.testing.assert_allclose(
        frechet_distance(merged, other), frechet_distance(reference, other), rtol=1e-9
    )
    np.testing.assert_allclose(merged.covariance, np.cov(features.T), rtol=1e-6, atol=1e-9)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.of(np.asarray([[1.0, np.nan]]))
