import random

import pytest

from cascaded_diffusion.evaluation import early_stopping

IDENTITY = {
    "num_samples": 1000,
    "reference": "mnist:train:4000:16px",
    "features": "classifier:abc",
    "low_res": "none",
    "aug_level": None,
    "sampler": {"name": "ddim"},
    "seed": 0,
}


def _record(step, value, metric="fd_classifier", **changes):
    record = {"step": step, "ema_decay": 0.99, "metric": metric, "value": value}
    return {**record, **IDENTITY, **changes}


def _series(values):
    return [_record(10 * i, v) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "best", "stops"),
    [
        ([5.0], 0, False),
        ([5.0, 4.0, 3.0], 20, False),
        ([5.0, 3.0, 4.0], 10, False),
        ([5.0, 3.0, 4.0, 3.5], 10, True),
        ([5.0, 3.0, 4.0, 2.0], 30, False),
        ([5.0, 3.0, 4.0, 3.5, 2.0], 40, True),  # a stop is not taken back
        ([5.0, 3.0, 3.0], 10, False),  # the earliest of equals
        ([5.0, 3.0, None, None], 10, True),
        ([5.0, float("nan"), 4.0], 20, False),
        ([None, None], None, False),
        ([None, None, None], None, True),
    ],
)
def test_best_and_stop(values, best, stops):
    records = _series(values)
    found = early_stopping.best_record(records)
    assert (None if found is None else found["step"]) == best
    assert early_stopping.should_stop(records, patience_evals=2) is stops


def test_only_like_is_compared_with_like():
    records = [
        _record(10, 1.0),
        _record(20, 0.1, num_samples=50_000),
        _record(30, 0.1, reference="mnist:test:1000:16px"),
        _record(40, 0.1, features="classifier:other"),
        _record(50, 0.1, low_res="real"),
        _record(60, 0.1, sampler={"name": "ancestral"}),
        _record(70, 0.1, metric="classifier_accuracy"),
        _record(75, 0.1, ema_decay=0.5),
        _record(80, 2.0),
    ]
    found = early_stopping.series(records, "fd_classifier", IDENTITY, [0.99])
    assert [r["step"] for r in found] == [10, 80]


def test_the_decision_depends_on_the_set_of_records_alone():
    records = _series([5.0, 3.0, 4.0, 3.5])
    expected = early_stopping.series(records, "fd_classifier", IDENTITY, [0.99])
    for seed in range(5):
        shuffled = [*records, records[2]]  # out of order, one written twice
        random.Random(seed).shuffle(shuffled)
        assert early_stopping.series(shuffled, "fd_classifier", IDENTITY, [0.99]) == expected


def test_of_several_emas_the_best_one_counts():
    values = [(10, 0.9, 5.0), (10, 0.99, 4.0), (20, 0.9, 3.0), (20, 0.99, None), (30, 0.99, 6.0)]
    records = [_record(step, value, ema_decay=decay) for step, decay, value in values]
    found = early_stopping.series(records, "fd_classifier", IDENTITY, [0.9, 0.99])
    assert len(found) == 5
    best = early_stopping.best_record(found)
    assert (best["step"], best["ema_decay"]) == (20, 0.9)
    per_step = early_stopping.lowest_per_step(found)
    assert [(r["step"], r["value"]) for r in per_step] == [(10, 4.0), (20, 3.0), (30, 6.0)]
    assert early_stopping.should_stop(per_step, 1)
    assert not early_stopping.should_stop(per_step, 2)
