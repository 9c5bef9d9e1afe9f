"""Where the time of reading data goes, and what is in a data set: for `data --show`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.loader import Batches
from cascaded_diffusion.data.sources import ProcessingReader, Source


def measure_parts(source: Source, *, max_images: int, max_secs: float) -> tuple[dict, int]:
    """Milliseconds per image of each part of reading, on images spread over the set.

    Returns:
      The parts, and on how many images they were measured.
    """
    seconds: dict[str, float] = {}
    count, start = len(source), time.monotonic()
    rows = np.unique(np.linspace(0, count - 1, min(count, max_images)).astype(int))
    done = 0
    for index in np.random.default_rng(0).permutation(rows):
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
    if not isinstance(reader, ProcessingReader):
        start = time.perf_counter()
        reader.read(index)
        yield "read a prepared record", time.perf_counter() - start
        return
    start = time.perf_counter()
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
    """How many examples each class has.

    Where labels are not known without reading, at most `max_examples` spread over the set
    are read.

    Args:
      source: with classes.
      max_examples: see above.
      say: told how many have been read.

    Returns:
      int [num_classes], and of how many examples that is.
    """
    known = getattr(source.reader, "class_counts", None)
    if known is not None:
        return np.asarray(known), len(source)
    labels = source.reader.known_labels()
    if labels is None:
        count = min(len(source), max_examples)
        found = []
        for done, i in enumerate(range(count), start=1):
            index = i * len(source) // count
            try:
                raw = source.reader.raw.read(index)
            except CorruptRecord as e:
                source.guard.note(index, source.reader.describe(index), str(e))
                continue
            source.reader.check_label(raw.label, index)
            found.append(raw.label)
            say(done)
        labels = np.asarray(found, np.int64)
    return np.bincount(labels, minlength=source.num_classes), len(labels)
