"""Stopping on a signal, at the same step in all processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Notes SIGTERM and SIGINT, so that the loop can stop at the end of a step.

    Several processes must all stop at the same step, so there JAX's preemption notice is asked
    instead: a signal to one process stops all.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}
        self._distributed = jax.process_count() > 1

    def __enter__(self) -> StopRequest:
        if self._distributed:
            # JAX notices SIGTERM only.
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._as_sigterm)
        else:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _as_sigterm(self, number: int, frame: object) -> None:
        del number, frame
        os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, frame: object) -> None:
        del frame
        self._signal = number

    def seen(self, step: int) -> bool:
        """Whether to stop after `step`. Every process calls it at every step."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None
