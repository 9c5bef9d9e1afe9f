import json

import numpy as np
import pytest

from cascaded_diffusion.evaluation.metrics.precision_recall import precision_recall
from tests.fixtures import make_metric_values


def _by_definition(real, generated, k):
    def squared_distance(a, b):
        return sum((s - t) ** 2 for s, t in zip(a.tolist(), b.tolist(), strict=True))

    def share(queries, points):
        radii = [
            sorted(squared_distance(x, y) for j, y in enumerate(points) if j != i)[k - 1]
            for i, x in enumerate(points)
        ]
        inside = [
            any(squared_distance(q, x) <= r for x, r in zip(points, radii, strict=True))
            for q in queries
        ]
        return sum(inside) / len(queries)

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_as_it_is_defined(k, seed):
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(70, 6)), rng.normal(size=(50, 6)) * 0.8 + 0.3
    got = precision_recall(real, generated, num_neighbours=k)
    assert 0.1 < min(got) < 0.999
    np.testing.assert_allclose(got, _by_definition(real, generated, k), atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 2.0**20])
def test_ties_and_equal_examples(offset):
    # On a grid most distances are there many times; far from the origin, rounding of (4) is
    # larger than what lies between them.
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size, k = rng.integers(1, 4), int(rng.integers(1, 5))
        real = rng.integers(0, 4, (rng.integers(k + 1, 30), size)) / 8 + offset
        generated = rng.integers(0, 5, (rng.integers(k + 1, 30), size)) / 8 + offset
        got = precision_recall(real, generated, num_neighbours=k, block=int(rng.integers(1, 40)))
        np.testing.assert_allclose(got, _by_definition(real, generated, k), atol=1e-12)


def test_near_ties_are_decided_in_float64():
    # Radii of 1; queries beyond by 1 part in 10^12, inside by as much, and on the border.
    real = np.asarray([[0.0, 0.0], [0.0, 1.0], [50.0, 0.0], [50.0, 1.0]]) + 3000.0
    for excess, expected in ((0.0, 1.0), (1e-12, 0.0), (-1e-12, 1.0)):
        reach = 1.0 + excess * 1e3
        generated = real[[0, 2]] - [0.0, reach]
        got, _ = precision_recall(real, generated, num_neighbours=1)
        assert got == expected, excess


def test_as_torch_fidelity_has_it():
    stored = json.loads(make_metric_values.VALUES.read_text())
    real, generated, _ = make_metric_values.inputs()
    got = precision_recall(real, generated)
    np.testing.assert_allclose(got, stored["precision_recall"], atol=1e-6)
    for block in (1, 7, 299, 300, 10_000):
        assert precision_recall(real, generated, block=block) == got
    rng = np.random.default_rng(0)
    assert precision_recall(rng.permutation(real), rng.permutation(generated)) == got
    precision, recall = got
    assert precision_recall(generated, real) == (recall, precision)


def test_float32_features_are_taken_as_they_are():
    real, generated, _ = (x.astype(np.float32) for x in make_metric_values.inputs())
    expected = _by_definition(real[:60].astype(np.float64), generated[:60].astype(np.float64), 3)
    np.testing.assert_allclose(precision_recall(real[:60], generated[:60]), expected, atol=1e-12)


def test_closed_forms():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 8))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x[:10]) == (1.0, pytest.approx(_by_definition(x, x[:10], 3)[1]))
    assert precision_recall(x, x + 1e3) == (0.0, 0.0)
    # Half of the samples are real images, the others are nowhere near.
    assert precision_recall(x, np.concatenate([x[:30], x[30:] + 1e3]))[0] == 0.5
    # On a line, k = 1: real points reach 1, generated ones 0.25.
    real, generated = np.arange(8.0)[:, None], np.asarray([[-1.0], [-1.25], [7.25], [7.5], [9.0]])
    precision, recall = precision_recall(real, generated, num_neighbours=1)
    assert (precision, recall) == (3 / 5, 1 / 8)


def test_a_collapsed_generator():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(40, 5)) * 0.1 + 1 / 3
    # Always the same real image, or the same other one: radius 0.
    assert precision_recall(real, np.tile(real[7], (30, 1))) == (1.0, 1 / 40)
    assert precision_recall(real, np.tile(real[7] + 9, (30, 1))) == (0.0, 0.0)
    # Three copies of one and another: the third other member is the far one.
    generated = np.concatenate([np.tile(real[7], (3, 1)), real[7:8] + 0.01])
    assert precision_recall(real, generated) == pytest.approx(_by_definition(real, generated, 3))
    assert precision_recall(np.ones((4, 2)), np.ones((5, 2))) == (1.0, 1.0)


def test_bad_input_is_refused_in_one_line():
    x = np.random.default_rng(0).normal(size=(9, 3))
    for act, message in (
        (lambda: precision_recall(x[:3], x), "at least 4 features of real images"),
        (lambda: precision_recall(x, x[:5], num_neighbours=5), "at least 6 features of generated"),
        (lambda: precision_recall(x, x[:, :2]), "real images have size 3, of generated images 2"),
        (lambda: precision_recall(x * np.nan, x), "real images are not finite"),
        (lambda: precision_recall(x, x[:, 0]), r"shape \[9\], expected \[n, F\]"),
        (lambda: precision_recall(x, x, num_neighbours=0), "0 neighbours"),
        (lambda: precision_recall(x, x, block=0), "blocks of 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
