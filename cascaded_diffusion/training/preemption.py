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
        self._noted = False
        self._previous: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}
        self._distributed = jax.process_count() > 1

    def __enter__(self) -> StopRequest:
        if self._distributed:
            # JAX notices SIGTERM only.
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        else:
            handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self._noted = True

    def seen(self, step: int) -> bool:
        """Whether to stop after `step`. Every process calls it at every step."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted
