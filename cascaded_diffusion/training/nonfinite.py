"""Steps whose loss or gradient is not finite: skipped and recorded, and too many of them an end.

Such a step changes neither parameters nor moments nor averages (`step.make_train_step`). Each is a
line of RUN/nonfinite.jsonl. When training ends because of them, RUN/nonfinite/STEP/ has the state
before that step, with which `main --replay` does it again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from cascaded_diffusion.config.schema import TrainConfig
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.json_files import (
    Record,
    append_line,
    read_lines,
    write_json,
    write_lines,
)
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params

_IN_A_ROW, _PER_THOUSAND = 3, 10  # where the config says None
_WINDOW = 1000
_ABOUT = "about.json"


def leaf_names(params: Params) -> list[str]:
    """The names of parameters in the order in which `grad_squares` has them."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def are_finite(values: Mapping[str, float]) -> bool:
    """Whether nothing is wrong with a step of these metrics."""
    return all(map(math.isfinite, values.values()))


def bad_leaves(names: Sequence[str], grad_squares: np.ndarray) -> list[str]:
    """The parameters whose gradient is not finite."""
    return [n for n, x in zip(names, grad_squares, strict=True) if not math.isfinite(x)]


def described(values: Mapping[str, float], leaves: Sequence[str]) -> str:
    """What is not finite, in words."""
    found = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    if leaves:
        found.append(f"first bad gradient {leaves[0]}, {len(leaves)} in all")
    return "; ".join(found)


def state_path(folder: RunFolder, step: int) -> AnyPath:
    """Where the state before a step is that ended the training."""
    return folder.nonfinite / str(step) / "state"


class NonFiniteSteps:
    """Which steps were not finite, and whether they are too many.

    Every process has one; `writes` is the first. What is recorded up to `first_step`, from which
    training resumes, counts.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, *, first_step: int, writes: bool
    ) -> None:
        self.in_a_row = config.max_nonfinite_in_row or _IN_A_ROW
        self.per_thousand = config.max_nonfinite_per_thousand or _PER_THOUSAND
        self._folder, self._writes = folder, writes
        lines = read_lines(folder.nonfinite_log, {"step": int})
        kept = [line for line in lines if line["step"] <= first_step]
        if writes and len(kept) < len(lines):  # those steps are done again
            write_lines(folder.nonfinite_log, kept)
        self._steps = sorted({line["step"] for line in kept})

    @property
    def count(self) -> int:
        """Of the whole run."""
        return len(self._steps)

    def near(self, step: int) -> bool:
        """Whether there was one in the thousand steps before `step`, this one included."""
        return bool(self._steps) and self._steps[-1] > step - _WINDOW

    def add(
        self,
        step: int,
        values: Mapping[str, float],
        leaves: Sequence[str],
        records: Iterable[int] | None,
    ) -> str | None:
        """Records a step. Returns why training cannot go on, if it cannot."""
        self._steps.append(step)
        if self._writes:
            line: Record = {
                "step": step,
                # JSON has no numbers that are not finite.
                "values": {name: repr(value) for name, value in values.items()},
                "leaves": list(leaves),
                "records": None if records is None else [int(i) for i in records],
            }
            append_line(self._folder.nonfinite_log, line)
        row = range(step - self.in_a_row + 1, step + 1)
        if set(row) <= set(self._steps[-self.in_a_row :]):
            return f"{self.in_a_row} steps in a row were not finite"
        recent = sum(s > step - _WINDOW for s in self._steps)
        if recent > self.per_thousand:
            return f"{recent} of the last {_WINDOW} steps were not finite"
        return None

    def store(self, step: int, values: Mapping[str, float], leaves: Sequence[str]) -> None:
        """Writes what a replay is compared with, after the state."""
        about = {"step": step, "values": {k: repr(v) for k, v in values.items()}}
        write_json(state_path(self._folder, step).with_name(_ABOUT), {**about, "leaves": leaves})
