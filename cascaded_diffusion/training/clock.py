"""How fast training runs, and what slows it down."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

# A step is slow if it takes this many times the median of the recent ones. A process is a
# straggler if its share of time without data exceeds the median process's by this much.
_SLOW_STEP, _RECENT_STEPS, _MIN_STEPS = 3.0, 50, 10
_STRAGGLER_FRACTION = 0.2


class Clock:
    """Rates between two readings, with pauses (saving, sampling) left out.

    `batch_size` is the global one, `flops_per_step` are model FLOPs (a multiply-add counts as two),
    and `peak_flops` are those of all devices together, per second.
    """

    def __init__(
        self,
        batch_size: int,
        flops_per_step: float,
        *,
        peak_flops: float | None,
        say: Callable[[str], None],
    ):
        self._batch_size, self._flops_per_step = batch_size, flops_per_step
        self._peak_flops, self._say = peak_flops, say
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._start, self._steps, self._waited = time.monotonic(), 0, 0.0

    def step_done(self, step: int) -> None:
        """Counts a step; warns if it took several times as long as the recent ones."""
        now = time.monotonic()
        if self._last is not None:
            secs = now - self._last
            usual = statistics.median(self._recent) if len(self._recent) >= _MIN_STEPS else secs
            if secs > _SLOW_STEP * usual and secs > 1.0:
                self._say(f"step {step} took {secs:.1f} s, the ones before it {usual:.2f} s")
            self._recent.append(secs)
        self._last = now
        self._steps += 1

    def data_waited(self, seconds: float) -> None:
        """Counts time spent waiting for data."""
        self._waited += seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside the block."""
        began = time.monotonic()
        yield
        self._start += time.monotonic() - began
        self._last = None

    def read(self) -> dict[str, float]:
        """Rates since the last reading. Every process calls it at the same step."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        waited = min(1.0, self._waited / elapsed)
        flops = self._steps * self._flops_per_step / elapsed
        rates = {
            "images_per_sec": self._steps * self._batch_size / elapsed,
            "step_secs": elapsed / max(self._steps, 1),
            "data_wait_fraction": waited,
            "model_flops_per_sec": flops,
        }
        if self._peak_flops is not None:
            rates["model_flops_utilization"] = flops / self._peak_flops
        if jax.process_count() > 1:
            shares = multihost_utils.process_allgather(np.float32(waited)).ravel()
            if (line := straggler(shares)) is not None:
                self._say(line)
        self._restart()
        return rates


def straggler(waited: np.ndarray) -> str | None:
    """A warning that names the process which holds up the others, or None.

    Since devices synchronize, a step takes equally long on all processes; they differ in `waited`
    [process], the share of the time in which a process had no data.
    """
    slowest, usual = int(np.argmax(waited)), float(np.median(waited))
    if waited[slowest] - usual < _STRAGGLER_FRACTION:
        return None
    return (
        f"straggler: process {slowest} waits {waited[slowest]:.0%} of its time for data, the"
        f" median process {usual:.0%}: all wait for it"
    )
