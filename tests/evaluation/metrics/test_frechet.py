import json

import numpy as np
import pytest

from cascaded_diffusion.evaluation.metrics import frechet as lib
from cascaded_diffusion.evaluation.metrics.frechet import (
    FeatureStatistics,
    Moments,
    frechet_distance,
    frechet_terms,
)
from tests.fixtures import make_metric_values


def _rotation(size, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return q


def _activations(count, size, seed):
    """Like a network's: not negative, correlated, a few directions much stronger than most."""
    rng = np.random.default_rng(seed)
    scales = np.exp(-np.linspace(0, 8, size))
    mix = np.random.default_rng(99).normal(size=(size, size)) * scales
    return np.maximum(rng.normal(size=(count, size)) @ mix.T + 0.5 + 0.01 * seed, 0.0)


def _merged(parts):
    return sum(parts[1:], start=parts[0])


@pytest.mark.parametrize("size", [1, 16, 256])
def test_covariances_with_common_axes_have_a_closed_form(size):
    rng = np.random.default_rng(0)
    a, b, mean_a, mean_b = rng.uniform(0.1, 2, (4, size))
    q = _rotation(size)
    means = ((mean_a - mean_b) ** 2).sum()
    covariances = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    for turn in (np.eye(size), q):
        sides = [
            Moments(turn @ m, turn @ np.diag(v) @ turn.T) for m, v in ((mean_a, a), (mean_b, b))
        ]
        terms = frechet_terms(*sides)
        np.testing.assert_allclose(terms.distance, means + covariances, rtol=1e-10)
        np.testing.assert_allclose(terms.mean_term, means, rtol=1e-10)
        np.testing.assert_allclose(terms.covariance_term, covariances, rtol=1e-10)
        # The same from sums over 10,000 examples.
        sums = [FeatureStatistics(10_000, 10_000 * s.mean, 9_999 * s.covariance) for s in sides]
        np.testing.assert_allclose(frechet_distance(*sums), terms.distance, rtol=1e-12)


def test_features_times_a_number_have_a_closed_form():
    x = _activations(900, 256, seed=1)
    spread = np.trace(np.cov(x.T))
    for times in (0.5, 1.25, 3.0):
        scaled = x * times + (x.mean(0) * (1 - times) + 2.0)  # every mean moved by 2
        got = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(scaled))
        np.testing.assert_allclose(got, 4.0 * 256 + (times - 1) ** 2 * spread, rtol=1e-10)


def test_covariances_that_do_not_commute_have_a_closed_form_in_two_dimensions():
    # Eigenvalues of C_1 C_2 = [[2, 4], [1, 8]] are those of no common axes: their roots' sum
    # is sqrt(trace + 2 sqrt(determinant)) = sqrt(10 + 2 sqrt(12)).
    zero = np.zeros(2)
    a, b = np.asarray([[2.0, 1.0], [1.0, 2.0]]), np.diag([1.0, 4.0])
    expected = 4 + 5 - 2 * np.sqrt(10 + 2 * np.sqrt(12))
    got = frechet_distance(Moments(zero, a), Moments(zero + 1, b))
    np.testing.assert_allclose(got, 2 + expected, rtol=1e-12)

    # 128 such pairs in 256 dimensions, turned so that no entry is zero.
    rng = np.random.default_rng(5)
    blocks = rng.normal(size=(2, 128, 2, 3))
    blocks = blocks @ blocks.swapaxes(-1, -2)
    products = blocks[0] @ blocks[1]
    roots = np.sqrt(np.trace(products, axis1=1, axis2=2) + 2 * np.sqrt(np.linalg.det(products)))
    expected = np.trace(blocks, axis1=2, axis2=3).sum() - 2 * roots.sum()
    covariances = np.zeros((2, 256, 256))
    for i in range(128):
        covariances[:, 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = blocks[:, i]
    q, mean = _rotation(256, seed=6), np.zeros(256)
    turned = [Moments(mean, q @ c @ q.T) for c in covariances]
    np.testing.assert_allclose(frechet_distance(*turned), expected, rtol=1e-8)


def test_as_large_as_inceptions_features_against_scipys_square_root():
    stored = json.loads(make_metric_values.VALUES.read_text())
    sides = (FeatureStatistics.of(x) for x in make_metric_values.inputs_of_inceptions_size())
    expected = stored["frechet_distance_of_inceptions_size"]
    np.testing.assert_allclose(frechet_distance(*sides), expected, rtol=1e-6)


def test_as_pytorch_fid_has_it():
    stored = json.loads(make_metric_values.VALUES.read_text())
    real, generated, _ = make_metric_values.inputs()
    got = frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(generated))
    np.testing.assert_allclose(got, stored["frechet_distance"], rtol=1e-9)


@pytest.mark.parametrize("count", [20, 300])
def test_distance_to_itself_is_zero_and_it_is_symmetric(count):
    a = FeatureStatistics.of(_activations(count, 64, seed=2))
    b = FeatureStatistics.of(_activations(200, 64, seed=3))
    assert frechet_distance(a, a) < 1e-10
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-12)
    again = FeatureStatistics.of(_activations(count, 64, seed=2)[::-1])
    assert frechet_distance(a, again) < 1e-6


@pytest.mark.parametrize(("n", "m"), [(10, 20), (40, 500), (2, 2)])
def test_fewer_examples_than_features(n, m):
    # With X the centred examples over sqrt(n - 1), C = X^T X, and the trace of the root is
    # the sum of the singular values of X Y^T: no zero eigenvalue is ever formed.
    x, y = _activations(n, 128, seed=4), _activations(m, 128, seed=5)
    centred = [(f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (x, y)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = means + (centred[0] ** 2).sum() + (centred[1] ** 2).sum() - 2 * roots
    got = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    np.testing.assert_allclose(got, expected, rtol=1e-11)


def test_features_that_are_always_the_same():
    x, y = _activations(300, 16, seed=1), _activations(200, 16, seed=2)
    for f, value in ((x, 3.0), (y, 5.0)):
        f[:, ::2] = value  # dead units
    got = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    live = frechet_distance(FeatureStatistics.of(x[:, 1::2]), FeatureStatistics.of(y[:, 1::2]))
    np.testing.assert_allclose(got, live + 8 * 2.0**2, rtol=1e-10)

    constant = FeatureStatistics.of(np.full((50, 16), 0.1))
    terms = frechet_terms(constant, FeatureStatistics.of(np.full((9, 16), 0.3)))
    np.testing.assert_allclose(terms.distance, 16 * 0.2**2, rtol=1e-10)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("count", [50, 1003])
def test_any_batches_in_any_order_on_any_host_give_the_same(count, mean):
    rng = np.random.default_rng(4)
    features = (rng.normal(size=(count, 64)) * np.exp(-np.arange(64) / 10) + mean).astype(
        np.float32
    )
    other = FeatureStatistics.of(rng.normal(size=(500, 64)) + mean)
    reference = FeatureStatistics.of(features)
    expected = frechet_distance(reference, other)

    def check(statistics):
        assert statistics.count == count  # the last, partial batch once
        np.testing.assert_allclose(statistics.mean, features.astype(np.float64).mean(0), rtol=1e-13)
        np.testing.assert_allclose(
            statistics.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-9, atol=1e-13
        )
        np.testing.assert_allclose(frechet_distance(statistics, other), expected, rtol=1e-10)

    check(reference)
    for batch_size in (1, 7, 32, 1000):
        starts = range(0, count, batch_size)
        parts = [FeatureStatistics.of(features[i : i + batch_size]) for i in starts]
        check(_merged(parts))
        check(_merged([parts[i] for i in rng.permutation(len(parts))]))
        # Each of three hosts merges its own, then they are merged; one may have none.
        empty = FeatureStatistics.of(features[:0])
        check(_merged([_merged([empty, *parts[host::3]]) for host in (2, 0, 1)]))
    check(FeatureStatistics.of(rng.permutation(features)))


def test_features_are_summed_block_by_block(monkeypatch):
    x = _activations(1003, 16, seed=1).astype(np.float16)
    whole = FeatureStatistics.of(x)
    monkeypatch.setattr(lib, "_BLOCK_ROWS", 100)
    blocks = FeatureStatistics.of(x)
    assert blocks.count == 1003
    np.testing.assert_allclose(blocks.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-10)
    np.testing.assert_allclose(blocks.covariance, whole.covariance, rtol=1e-10)


def test_a_mean_that_is_large_against_the_spread_costs_no_digits():
    # Multiples of 2^-20, so that adding the mean is exact.
    x = np.round(_activations(2000, 16, seed=1) * 2**20) / 2**20
    parts = [FeatureStatistics.of(p + 1e5) for p in np.split(x, 20)]
    np.testing.assert_allclose(_merged(parts).covariance, np.cov(x.T), rtol=1e-9)


def test_examples_and_features_are_not_mixed_up():
    # As many examples as features: a covariance of the transposed would have the right shape.
    x, y = _activations(32, 32, seed=1), _activations(32, 32, seed=2) * 1.5
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(y)
    np.testing.assert_allclose(a.covariance, np.cov(x, rowvar=False), rtol=1e-10)
    transposed = [Moments(f.mean(0), np.cov(f)) for f in (x, y)]
    assert abs(frechet_distance(a, b) / frechet_distance(*transposed) - 1) > 0.05
    with pytest.raises(ValueError, match=r"\[8\], covariance \[20, 20\], expected \[F\]"):
        frechet_distance(Moments(np.zeros(8), np.cov(np.ones((20, 8)))), a)


def test_what_is_clipped_is_told():
    def side(*variances):
        return Moments(np.zeros(3), np.diag(variances))

    assert frechet_terms(side(1, 2, 4), side(1, 2, 4)).clipped == 0
    terms = frechet_terms(side(1, 2, 4), side(1, -4e-7, 4))
    np.testing.assert_allclose(terms.clipped, -1e-7)
    np.testing.assert_allclose(terms.distance, 2, rtol=1e-6)
    few = frechet_terms(*(FeatureStatistics.of(_activations(30, 64, s)) for s in (1, 2)))
    assert -1e-13 < few.clipped < 0
    # Neither this nor a negative variance is the covariance of anything.
    for wrong in (side(1, -0.1, 4), side(-1e-9, -1e-9, 0)):
        with pytest.raises(ValueError, match="expected none below 0"):
            frechet_terms(side(1, 2, 4), wrong)


def test_bad_input_is_refused_in_one_line():
    good = FeatureStatistics.of(np.random.default_rng(0).normal(size=(9, 3)))

    def moments(**changes):
        return Moments(**{"mean": good.mean, "covariance": good.covariance, **changes})

    skewed = good.covariance + np.triu(np.ones((3, 3)), 1)
    for act, message in (
        (lambda: FeatureStatistics.of([[1.0, np.nan]]), "features are not finite"),
        (lambda: FeatureStatistics.of(np.ones(3)), r"shape \[3\], expected \[n, F\]"),
        (lambda: FeatureStatistics.of(np.ones((3, 2, 2, 1))), r"expected \[n, F\]"),
        (lambda: good + FeatureStatistics.of(np.ones((2, 4))), "sizes 3 and 4"),
        (lambda: frechet_distance(good, FeatureStatistics.of(np.ones((2, 4)))), "sizes 3 and 4"),
        (lambda: frechet_distance(good, FeatureStatistics.of(np.ones((1, 3)))), "2 examples"),
        (lambda: FeatureStatistics.of(np.ones((0, 3))).covariance, "at least 2 examples"),
        (lambda: frechet_distance(good, moments(mean=np.full(3, np.inf))), "not finite"),
        (lambda: frechet_distance(moments(covariance=np.full((3, 3), np.nan)), good), "not finite"),
        (lambda: frechet_distance(moments(covariance=skewed), good), "not symmetric"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
