import json

import numpy as np
import pytest

from cascaded_diffusion.evaluation.metrics.kernel_distance import (
    kernel_distance,
    squared_discrepancy,
)
from tests.fixtures import make_metric_values


def _by_definition(x, y):
    def kernel(a, b):
        return (sum(s * t for s, t in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(z):
        pairs = [kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(between) / len(between)


@pytest.mark.parametrize(("m", "n", "size"), [(30, 30, 5), (20, 31, 3), (2, 2, 1), (9, 2, 40)])
def test_as_it_is_defined(m, n, size):
    rng = np.random.default_rng(m)
    x, y = rng.normal(size=(m, size)) + 0.3, rng.normal(size=(n, size)) * 1.2
    expected = _by_definition(x, y)
    np.testing.assert_allclose(squared_discrepancy(x, y), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(squared_discrepancy(y, x), expected, rtol=1e-10, atol=1e-12)


def test_as_torch_fidelity_has_it():
    stored = json.loads(make_metric_values.VALUES.read_text())
    real, generated, _ = make_metric_values.inputs()
    expected = stored["kernel_distance_of_the_first_250"]
    np.testing.assert_allclose(squared_discrepancy(real[:250], generated), expected, rtol=1e-9)
    mean, std = kernel_distance(real[:250], generated)  # of all there are
    np.testing.assert_allclose((mean, std), (expected, 0.0), rtol=1e-9)


def test_subsets_are_drawn_without_replacement_from_all_examples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)) + 0.5, rng.normal(size=(9, 4))
    # The mean over all subsets is the value of the whole: (2) is a U-statistic in each set.
    mean, std = kernel_distance(x, y, num_subsets=4000, subset_size=5)
    assert abs(mean - squared_discrepancy(x, y)) < 5 * std / np.sqrt(4000)
    assert std > 0
    # All of the smaller set, in each of them; 9 of the other 12.
    mean, std = kernel_distance(x, y, num_subsets=400, subset_size=1000)
    assert abs(mean - squared_discrepancy(x, y)) < 5 * std / np.sqrt(400)
    # Twice the same example would give its own subset's value a term on the diagonal.
    far = np.eye(12) * 1e3
    mean, std = kernel_distance(far, np.zeros((12, 12)), num_subsets=50, subset_size=6)
    np.testing.assert_allclose((mean, std), (0.0, 0.0), atol=1e-9)


def test_mean_and_deviation_are_over_subsets():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 4)), rng.normal(size=(50, 4)) + 1
    same = np.random.default_rng(7)
    values = [
        _by_definition(x[same.choice(40, 10, replace=False)], y[same.choice(50, 10, replace=False)])
        for _ in range(5)
    ]
    got = kernel_distance(x, y, num_subsets=5, subset_size=10, seed=7)
    np.testing.assert_allclose(got, (np.mean(values), np.std(values)), rtol=1e-10)
    assert kernel_distance(x, y, num_subsets=5, subset_size=10, seed=8) != got
    # Features come as float32; all else is float64.
    np.testing.assert_allclose(
        kernel_distance(x.astype(np.float32), y, num_subsets=5, subset_size=10, seed=7),
        kernel_distance(x.astype(np.float32) * 1.0, y, num_subsets=5, subset_size=10, seed=7),
    )


def test_of_one_distribution_it_is_zero_on_average():
    rng = np.random.default_rng(2)
    values = [squared_discrepancy(*rng.normal(size=(2, 20, 8))) for _ in range(2000)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert np.min(values) < 0  # unbiased, so not bounded by 0
    # The same set twice is below zero: the cross term has the diagonal, the others have not.
    x = rng.normal(size=(20, 8))
    assert squared_discrepancy(x, x) < 0


def test_a_shifted_gaussian_has_a_closed_form():
    # In one dimension (x y + 1)^3 has the features 1, x, x^2, x^3 with weights 1, 3, 3, 1, whose
    # means for N(c, 1) are 1, c, c^2 + 1, c^3 + 3 c.
    c = 0.5
    expected = 3 * c**2 + 3 * c**4 + (c**3 + 3 * c) ** 2
    rng = np.random.default_rng(3)
    values = [
        squared_discrepancy(rng.normal(size=(200, 1)), rng.normal(size=(200, 1)) + c)
        for _ in range(300)
    ]
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(300)


def test_bad_input_is_refused_in_one_line():
    x = np.random.default_rng(0).normal(size=(9, 3))
    for act, message in (
        (lambda: kernel_distance(x, x[:1]), "at least 2 features of generated images"),
        (lambda: kernel_distance(x[:0], x), "at least 2 features of real images"),
        (lambda: kernel_distance(x, x[:, :2]), "real images have size 3, of generated images 2"),
        (lambda: kernel_distance(x, x * np.inf), "generated images are not finite"),
        (lambda: squared_discrepancy(x[0], x), r"shape \[3\], expected \[n, F\]"),
        (lambda: kernel_distance(x, x, subset_size=1), "100 subsets of 1"),
        (lambda: kernel_distance(x, x, num_subsets=0), "0 subsets of 1000"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
