"""How fast data is read, where the time goes, and how many examples each class has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.loader import Batches
from cascaded_diffusion.data.processing import ProcessingReader
from cascaded_diffusion.data.records import Source


def measure_parts(
    source: Source, *, max_images: int, max_secs: float
) -> tuple[dict[str, float], int]:
    """Milliseconds per image for each part of reading, and the number of images measured."""
    seconds: dict[str, float] = {}
    count, start = len(source), time.monotonic()
    indices = np.unique(np.linspace(0, count - 1, min(count, max_images)).astype(int))
    done = 0
    for index in np.random.default_rng(0).permutation(indices):
        try:
            for name, secs in _timed_parts(source, int(index)):
                seconds[name] = seconds.get(name, 0.0) + secs
        except CorruptRecord:
            continue
        done += 1
        if time.monotonic() - start > max_secs:
            break
    return {name: 1000 * secs / max(done, 1) for name, secs in seconds.items()}, done


def _timed_parts(source: Source, index: int) -> Iterator[tuple[str, float]]:
    reader = source.reader
    start = time.perf_counter()
    if not isinstance(reader, ProcessingReader):
        reader.read(index)
        yield "read a prepared record", time.perf_counter() - start
        return
    image, label = reader.raw.read(index)
    read = time.perf_counter()
    pixels = reader.decoded(image, index)
    decoded = time.perf_counter()
    reader.sized(pixels, label)
    yield "read the file or record", read - start
    yield "decode", decoded - read
    yield "crop and resize", time.perf_counter() - decoded


def measure_loader(
    make_batches: Callable[[], Batches], *, max_batches: int, max_secs: float
) -> tuple[float, float]:
    """Runs the loader from step 0. Returns images/s after the first batch, and its seconds."""
    start = time.monotonic()
    batches = make_batches()
    try:
        next(batches)
        first = last = time.monotonic()
        images = 0
        for _ in range(max_batches):
            images += len(next(batches)["image"])
            last = time.monotonic()
            if last - first > max_secs:
                break
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
    counts = source.reader.class_counts()
    if counts is not None:
        return counts, len(source)
    count, labels = min(len(source), max_examples), []
    for done, i in enumerate(range(count), start=1):
        index = i * len(source) // count
        try:
            label = source.reader.raw.read(index).label
        except CorruptRecord as e:
            source.guard.note(index, source.reader.describe(index), str(e))
            continue
        source.reader.check_label(label, index)
        labels.append(label)
        say(done)
    counts = np.bincount(np.asarray(labels, np.int64), minlength=source.num_classes)
    return counts, len(labels)
