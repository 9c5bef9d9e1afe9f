"""How fast data is read, where the time goes, and how many examples each class has."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import grain
import numpy as np

from cascaded_diffusion.config.schema import DataConfig
from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.loader import iterate
from cascaded_diffusion.data.processing import ProcessedSource
from cascaded_diffusion.data.records import Source

_MAX_IMAGES, _MAX_SECS = 512, 5.0


def measure_parts(source: Source) -> tuple[dict[str, float], int]:
    """Milliseconds per image for each part of reading, and the number of images measured."""
    seconds: Counter[str] = Counter()
    count, start = len(source), time.monotonic()
    indices = np.unique(np.linspace(0, count - 1, min(count, _MAX_IMAGES)).astype(int))
    done = 0
    for index in np.random.default_rng(0).permutation(indices).tolist():
        try:
            seconds.update(_seconds_of_parts(source, index))
        except CorruptRecord:
            continue
        done += 1
        if time.monotonic() - start > _MAX_SECS:
            break
    return {name: 1000 * secs / max(done, 1) for name, secs in seconds.items()}, done


def _seconds_of_parts(source: Source, index: int) -> dict[str, float]:
    start = time.perf_counter()
    if not isinstance(source, ProcessedSource):
        source.read(index)
        return {"read a prepared record": time.perf_counter() - start}
    image, label = source.raw.read(index)
    read = time.perf_counter()
    pixels = source.decoded(image, index)
    decoded = time.perf_counter()
    source.sized(pixels, label)
    return {
        "read the file or record": read - start,
        "decode": decoded - read,
        "crop and resize": time.perf_counter() - decoded,
    }


def measure_loader(
    stream: grain.MapDataset, source: Source, config: DataConfig, *, max_secs: float
) -> tuple[float, float]:
    """Runs the loader from step 0. Returns images/s after the first batch, and its seconds."""
    start = time.monotonic()
    batches = iterate(stream, source, config, start_step=0)
    try:
        images, batch_size = 0, len(next(batches)["image"])
        first = last = time.monotonic()
        while last - first <= max_secs and images < 1_000_000:
            next(batches)
            images += batch_size
            last = time.monotonic()
    finally:
        batches.close()
    return images / max(last - first, 1e-9), first - start


def class_counts(
    source: Source, *, max_examples: int, say: Callable[[int], None]
) -> tuple[np.ndarray, int]:
    """How many examples each class has, int [K], and the number of examples that were counted.

    If that is not known without reading, at most `max_examples` spread over the data set are
    read, and `say` is told how many have been.
    """
    if source.class_counts is not None:
        return source.class_counts, len(source)
    count, labels = min(len(source), max_examples), []
    for done in range(1, count + 1):
        index = (done - 1) * len(source) // count
        try:
            label = source.raw.read(index).label
        except CorruptRecord as e:
            source.guard.note(index, source.describe(index), str(e))
            continue
        source.check_label(label, index)
        labels.append(label)
        say(done)
    return np.bincount(np.asarray(labels, np.int64), minlength=source.num_classes), len(labels)
