"""Which checkpoint is best, and whether to stop: pure functions of the records.

The records are the lines of `eval/results.jsonl`, whoever wrote them and however often evaluation
was interrupted. A checkpoint that failed (value null) is never the best.
"""

import itertools
import math
from collections.abc import Sequence

from cascaded_diffusion.files.json_files import Record


def series(
    records: Sequence[Record], metric: str, like: Record, ema_decays: Sequence[float]
) -> list[Record]:
    """The records of `metric` with all fields of `like`, one per step and EMA, in that order.

    `like` says what was measured: samples, reference, features, conditioning, sampler and seed.
    """
    wanted = {**like, "metric": metric}.items()
    # If a step was trained again after damage, its last score holds.
    found = {
        (record["step"], record["ema_decay"]): record
        for record in records
        if record.get("ema_decay") in ema_decays
        and all(record.get(key) == value for key, value in wanted)
    }
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
        # Before the first finite score, one more is waited for.
        if without_better >= patience_evals + (lowest == math.inf):
            return True
    return False
