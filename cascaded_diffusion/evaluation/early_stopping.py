"""Which checkpoint is best, and whether to stop: pure functions of the records.

The records are the lines of `eval/results.jsonl`, whoever wrote them and however often evaluation
was interrupted. Only records that measured the same thing are compared: they have the same metric,
number of samples, reference, features, conditioning and sampler. A checkpoint that failed (value
null) is never the best.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

# The fields, besides the metric, in which two records must agree to be compared.
COMPARABLE = (
    "num_samples",
    "reference",
    "features",
    "low_res",
    "low_res_sampler",
    "aug_level",
    "truncated",
    "sampler",
    "seed",
)


def series(
    records: Sequence[Record], metric: str, like: Record, ema_decays: Sequence[float]
) -> list[Record]:
    """The records of `metric` comparable to `like`, one per step and EMA, in that order."""
    found: dict[tuple[int, float], Record] = {}
    for record in records:
        if (
            record.get("metric") == metric
            and record.get("ema_decay") in ema_decays
            and all(record.get(key) == like.get(key) for key in COMPARABLE)
        ):
            # If a step was trained again after damage, its last score holds.
            found[record["step"], record["ema_decay"]] = record
    return [found[key] for key in sorted(found)]


def lowest_per_step(comparable: Sequence[Record]) -> list[Record]:
    """The EMA with the lowest value of each step, for early stopping."""
    of_step = (list(found) for _, found in itertools.groupby(comparable, lambda r: r["step"]))
    return [best_record(records) or records[0] for records in of_step]


def best_record(comparable: Sequence[Record]) -> Record | None:
    """The record with the lowest finite value; the earliest of equals."""
    finite = [r for r in comparable if r["value"] is not None and math.isfinite(r["value"])]
    return min(finite, key=lambda r: (r["value"], r["step"])) if finite else None


def should_stop(comparable: Sequence[Record], patience_evals: int) -> bool:
    """Whether `patience_evals` scores in a row ever brought no improvement.

    A later score, such as that of the trainer's last checkpoint, does not take a stop back.
    """
    lowest, without_better = math.inf, 0
    for record in comparable:
        value = record["value"]
        if value is not None and value < lowest:
            lowest, without_better = value, 0
        else:
            without_better += 1
        if without_better >= patience_evals and (
            lowest < math.inf or without_better > patience_evals
        ):
            return True
    return False
