import json

import numpy as np
import pytest

from cascaded_diffusion.evaluation.metrics.inception_score import ScoreStatistics
from tests.fixtures import make_metric_values


def _logits(count, classes=7, seed=0):
    return np.random.default_rng(seed).normal(size=(count, classes)) * 3


def _score(logits, num_splits=10):
    count = len(logits)
    statistics = ScoreStatistics.of(
        logits, np.arange(count), num_samples=count, num_splits=num_splits
    )
    return statistics.score()


def _by_definition(logits, num_splits):
    scores = []
    n = len(logits)
    for s in range(num_splits):
        part = logits[s * n // num_splits : (s + 1) * n // num_splits]
        p = [[np.exp(v) / sum(np.exp(u) for u in row) for v in row] for row in part]
        q = [sum(column) / len(part) for column in zip(*p, strict=True)]
        kl = [sum(a * np.log(a / b) for a, b in zip(row, q, strict=True)) for row in p]
        scores.append(np.exp(sum(kl) / len(part)))
    mean = sum(scores) / num_splits
    return mean, np.sqrt(sum((s - mean) ** 2 for s in scores) / num_splits)


@pytest.mark.parametrize(
    ("count", "num_splits"), [(200, 10), (203, 10), (97, 4), (30, 1), (10, 10)]
)
def test_as_it_is_defined(count, num_splits):
    logits = _logits(count)
    np.testing.assert_allclose(
        _score(logits, num_splits), _by_definition(logits, num_splits), rtol=1e-12, atol=1e-12
    )


def test_as_torch_fidelity_has_it():
    stored = json.loads(make_metric_values.VALUES.read_text())
    *_, logits = make_metric_values.inputs()
    np.testing.assert_allclose(_score(logits), stored["inception_score"], rtol=1e-9)


def test_closed_forms():
    certain = np.eye(8)[np.arange(400) % 8] * 1e4  # each class as often, and surely
    np.testing.assert_allclose(_score(certain), (8.0, 0.0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(_score(certain + 1e6), (8.0, 0.0), rtol=1e-12, atol=1e-12)
    same = np.tile(_logits(1), (400, 1))
    np.testing.assert_allclose(_score(same), (1.0, 0.0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(_score(np.zeros((400, 8))), (1.0, 0.0), rtol=1e-12, atol=1e-12)

    # Two classes, each half of the time, with probability 0.9.
    unsure = np.log(np.where(np.arange(400)[:, None] % 2 == np.arange(2), 0.9, 0.1))
    expected = np.exp(0.9 * np.log(1.8) + 0.1 * np.log(0.2))
    np.testing.assert_allclose(_score(unsure), (expected, 0.0), rtol=1e-12, atol=1e-12)

    # Splits are contiguous: half of them with 2 classes, half with 4.
    halves = np.eye(4)[np.concatenate([np.arange(200) % 2, np.arange(200) % 4])] * 1e4
    np.testing.assert_allclose(_score(halves), (3.0, 1.0), rtol=1e-12)


def test_any_batches_in_any_order_on_any_host_give_the_same():
    count = 1003
    logits = _logits(count).astype(np.float32)
    expected = _score(logits)
    rng = np.random.default_rng(1)
    for batch_size in (1, 8, 250, 5000):
        for indices in (np.arange(count), rng.permutation(count)):
            batches = [indices[i : i + batch_size] for i in range(0, count, batch_size)]
            parts = [ScoreStatistics.of(logits[b], b, num_samples=count) for b in batches]
            nothing = ScoreStatistics.of(logits[:0], np.arange(0), num_samples=count)
            hosts = [sum(parts[host::3], start=nothing) for host in (1, 0, 2)]
            merged = hosts[0] + hosts[1] + hosts[2]
            np.testing.assert_allclose(merged.score(), expected, rtol=1e-12)


def test_each_sample_counts_once():
    logits = _logits(100)

    def part(start, stop):
        return ScoreStatistics.of(logits[start:stop], np.arange(start, stop), num_samples=100)

    whole = part(0, 100).score()
    assert (part(0, 30) + part(30, 100)).score() == pytest.approx(whole)
    for wrong in (part(0, 99), part(0, 30) + part(29, 100), part(0, 30) + part(20, 90)):
        with pytest.raises(ValueError, match="must be counted once"):
            wrong.score()


def test_bad_input_is_refused_in_one_line():
    logits, indices = _logits(20), np.arange(20)

    def of(logits=logits, indices=indices, **kwargs):
        return ScoreStatistics.of(logits, indices, **{"num_samples": 20, **kwargs})

    twice = np.asarray([0, 0, *range(18)])
    for act, message in (
        (lambda: of(logits[:9], indices[:9], num_samples=9), "9 samples leave some of 10 splits"),
        (lambda: of(num_splits=0), "num_splits"),
        (lambda: of(indices=indices[:19]), "one integer for each of 20 rows"),
        (lambda: of(indices=indices * 1.0), "one integer for each"),
        (lambda: of(indices=indices + 1), r"from 1 to 20, expected them in \[0, 20\)"),
        (lambda: of(indices=indices - 1), "from -1 to 18"),
        (lambda: of(indices=twice), "there twice"),
        (lambda: of(logits=logits * np.nan), "logits are not finite"),
        (lambda: of(logits=logits[0]), r"expected \[n, F\]"),
        (lambda: of() + of(num_samples=21), "of 20 and of 21 samples"),
        (lambda: of() + of(num_splits=5), "of 10 and of 5 splits"),
        (lambda: of() + of(_logits(20, classes=8)), "of 7 and of 8 classes"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
