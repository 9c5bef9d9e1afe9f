"""Processes that read and prepare data beside this one, and what shows how far they are."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from cascaded_diffusion.errors import UserError

T = TypeVar("T")
What = TypeVar("What")


class NoProgress:
    """Shows no progress bar. `runtime.progress.Progress`, which shows one, is called alike."""

    def __init__(self, total: int, *, unit: str, label: str, initial: int = 0): ...

    def update(self, position: int) -> None: ...

    def close(self) -> None: ...


MakeProgress = Callable[..., NoProgress]
# In a worker process, what it works with.
_given: Any = None


def call(function: Callable[[Any, int], T], number: int) -> T:
    """In a worker process, `function(what, number)` of what `worker_pool` was called with."""
    return function(_given, number)


def _start(what: object) -> None:
    global _given
    _given = what
    # The main process handles Ctrl-C, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed process cannot end its workers, which would wait for it forever.
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def worker_pool(num_workers: int, what: object) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that share nothing with this one and end with it. `call` knows `what` there."""
    return concurrent.futures.ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(what,),
    )


def in_order(
    function: Callable[[What, int], T], what: What, *, num_workers: int, start: int
) -> Generator[T, None, None]:
    """Calls `function(what, start)`, `function(what, start + 1)`, ... in worker processes, ahead.

    The results come in that order, whichever is done first. `close` ends the workers, once they
    have finished what they have begun.
    """
    pool = worker_pool(num_workers, what)
    waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    try:
        for number in itertools.count(start):
            waiting.append(pool.submit(call, function, number))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
            "a process that reads data died (out of memory?): lower config.data.read_workers"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
