"""The training stream: which record is at which position of the batch of which step.

The stream is a function of (shuffle seed, step, position) alone:

    shuffle the whole set, anew each epoch -> repeat
    -> cut into per-process batches -> read and augment
    -> give process p of P every P-th of them

The global batch of a step, process 0's part first, therefore has the same records in the same
order for any number of processes. Augmentation is keyed by the position in the stream. grain
handles record indices only; a batch of them is read at once, which costs a fraction of passing
records one by one. The state of the stream is the step, so that resuming is seeking. Threads and
worker processes read whole batches ahead of time, and never change the order.
"""

import functools
import operator
from collections.abc import Iterator

import grain
import numpy as np

from cascaded_diffusion.config.convert import fail
from cascaded_diffusion.config.schema import DataConfig
from cascaded_diffusion.data import transforms, workers
from cascaded_diffusion.data.records import CorruptionGuard, Source

Stream = grain.MapDataset


def build_stream(
    source: Source,
    config: DataConfig,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Stream:
    """The endless stream as a random-access data set: element `k` is step `k`.

    Elements are dicts of `image` uint8 [b, H, W, C], `label` int32 [b], `low_res` uint8
    [b, h, w, C] where the data has it, and `index` and `skipped` int64 [b] (see
    `records.Record`), with b = global_batch_size / process_count. Raises UserError if the batch
    size is no multiple of the processes, or larger than the data set.
    """
    if global_batch_size % process_count:
        fail("train.batch_size", global_batch_size, f"a multiple of the {process_count} processes")
    if global_batch_size > len(source):
        expected = f"at most {len(source)}, the size of {config.name!r}"
        fail("train.batch_size", global_batch_size, expected)
    stream = _shuffled(source, config).batch(global_batch_size // process_count)
    stream = stream.map_with_index(functools.partial(_read_batch, source, config))
    return stream[process_index::process_count]


def _shuffled(source: Source, config: DataConfig) -> Stream:
    """The number of the record at every position of the stream."""
    return grain.MapDataset.range(len(source)).seed(config.shuffle_seed).shuffle().repeat(None)


def _read_batch(
    source: Source, config: DataConfig, number: int, indices: np.ndarray
) -> dict[str, np.ndarray]:
    records = [source[i] for i in indices.tolist()]
    batch = {name: np.stack([r[name] for r in records]) for name in records[0]}
    if config.random_flip:
        positions = number * len(indices) + np.arange(len(indices))
        transforms.flip(batch, transforms.coins(config.shuffle_seed, positions))
    return batch


class Batches(Iterator[dict[str, np.ndarray]]):
    """A process's batches from a step on: `image`, `label`, and `low_res` if there is one.

    Threads or processes of the config read ahead.
    """

    def __init__(self, stream: Stream, source: Source, config: DataConfig, *, start_step: int):
        self._source, self._config = source, config
        # The source's own guard counts in each reading process.
        self._guard = CorruptionGuard(config, len(source))
        if config.read_workers:
            # The order and state of grain's own processes depend on their number, and they
            # leave shared memory behind.
            self._iterator = workers.in_order(
                operator.getitem, stream, num_workers=config.read_workers, start=start_step
            )
        else:
            threads = config.read_threads
            options = grain.ReadOptions(threads, prefetch_buffer_size=2 * max(threads, 1))
            self._iterator = iter(stream[start_step:].to_iter_dataset(options))

    @property
    def num_skipped(self) -> int:
        """How many corrupt records this process has met, each counted once."""
        return self._guard.num_found

    def records_of(self, step: int, batch_size: int) -> list[int]:
        """The numbers of the records in the global batch of `step`, from 0, in order."""
        order = _shuffled(self._source, self._config)
        return [int(order[i]) for i in range(step * batch_size, (step + 1) * batch_size)]

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises UserError for a corrupt record, or too many, as the config says."""
        batch = dict(next(self._iterator))
        del batch["index"]
        for index in batch.pop("skipped").tolist():
            if index >= 0:
                # The process that read it has printed it.
                self._guard.note(index, f"record {index}", "see above", say=False)
        return batch

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        self._iterator.close()


def iterate(stream: Stream, source: Source, config: DataConfig, *, start_step: int) -> Batches:
    """Iterates a stream from `start_step` on."""
    return Batches(stream, source, config, start_step=start_step)
