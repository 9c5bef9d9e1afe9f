"""Preparing data without worker processes, which take seconds to start."""

import concurrent.futures

import pytest

from cascaded_diffusion.data import workers


def prepare_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are made by a thread of this process."""

    def pool(num_workers, what):
        monkeypatch.setattr(workers, "_given", what)
        return concurrent.futures.ThreadPoolExecutor(1)

    monkeypatch.setattr(workers, "worker_pool", pool)
