"""The training stream: which record is at which row of which step.

The stream is a function of (shuffle seed, step, row) alone:

    shuffle over the whole set, anew each epoch -> repeat -> augment
    -> cut into per-process batches -> give process p of P every P-th of them

so the global batch of a step, process 0's rows first, has the same records in
the same order for any number of processes. Augmentation is keyed by the position
in the stream before it is cut up. The state of the stream is the step: resuming
is seeking, and threads never change the order.
"""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from cascaded_diffusion.config import DataConfig
from cascaded_diffusion.data import transforms
from cascaded_diffusion.data.sources import Source
from cascaded_diffusion.errors import UserError


def build_stream(
    source: Source,
    config: DataConfig,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """The endless stream as a random-access data set: element `k` is step `k`.

    Elements are dicts of `image` uint8 [b, H, W, C] and `label` int32 [b], with
    b = global_batch_size / process_count.

    Raises:
      UserError: the batch is not divided by the processes, or larger than the set.
    """
    if global_batch_size % process_count:
        raise UserError(
            f"config.train.batch_size = {global_batch_size}: expected a multiple of the"
            f" {process_count} processes"
        )
    if global_batch_size > len(source):
        raise UserError(
            f"config.train.batch_size = {global_batch_size}: expected at most {len(source)}, the"
            f" size of {config.name!r}"
        )
    stream = grain.MapDataset.source(source).seed(config.shuffle_seed).shuffle().repeat(None)
    if config.random_flip:
        stream = stream.random_map(transforms.random_flip)
    stream = stream.batch(global_batch_size // process_count)
    return stream[process_index::process_count]


def iterate(
    stream: grain.MapDataset, config: DataConfig, *, start_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates a stream from `start_step` on, reading ahead in threads."""
    options = grain.ReadOptions(
        num_threads=config.read_threads, prefetch_buffer_size=2 * max(1, config.read_threads)
    )
    iterator = iter(stream.to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator
