"""Records that cannot be read, and what is done about them: fail, or skip and count."""

from __future__ import annotations

import math
import sys
import threading

from cascaded_diffusion.config.schema import MAX_CORRUPT_FRACTION, DataConfig
from cascaded_diffusion.errors import UserError

# Threads share a guard. The lock is none of its attributes, since guards are pickled.
_LOCK = threading.Lock()


class CorruptRecord(Exception):
    """A record is damaged, or is none at all. The message says what is wrong with it."""


class CorruptionGuard:
    """Applies a config's policy about corrupt records to one data set, within one process."""

    def __init__(self, config: DataConfig, num_records: int):
        self._skips, self._cap = config.on_corrupt == "skip", config.max_corrupt_fraction
        if self._cap is None:
            self._cap = MAX_CORRUPT_FRACTION
        self._num_records = num_records
        self._found: set[int] = set()
        self._too_many: str | None = None

    @property
    def num_found(self) -> int:
        """How many corrupt records are known, each counted once."""
        return len(self._found)

    def note(self, index: int, where: str, problem: str, *, say: bool = True) -> None:
        """Counts a corrupt record, once, and prints `where` it is and its `problem` if `say`.

        Raises:
          UserError: the policy is to fail, or too many records are corrupt.
        """
        if not self._skips:
            # What else to set if even one corrupt record would be too many.
            cap = ""
            if self._cap * self._num_records < 1:
                enough = max(0.01, math.ceil(100 / self._num_records) / 100)
                cap = (
                    f" --config.data.max_corrupt_fraction={enough:g} (at {self._cap:g}, one of"
                    f" {self._num_records} is too many)"
                )
            raise UserError(
                f"{where}: {problem}; replace it, or train without such records by"
                f" --config.data.on_corrupt=skip{cap}"
            )
        with _LOCK:
            if index in self._found:
                return
            self._found.add(index)
            found = len(self._found)
            # Reading threads may find more of them before the first error has arrived. They
            # all raise that error.
            if found > self._cap * self._num_records and self._too_many is None:
                self._too_many = (
                    f"{found} of {self._num_records} records are corrupt, the last"
                    f" {where} ({problem}): expected at most"
                    f" config.data.max_corrupt_fraction = {self._cap:g} of them"
                )
        if say:
            print(f"skipped: {where}: {problem}", file=sys.stderr, flush=True)
        if self._too_many is not None:
            raise UserError(self._too_many)
