"""A report on a split of a config's data: a picture, the classes, and the speed of reading."""

from __future__ import annotations

import pathlib
import time

import jax
import numpy as np

from cascaded_diffusion.config.schema import DataConfig, RunConfig
from cascaded_diffusion.data.loader import build_stream, iterate
from cascaded_diffusion.data.records import Source
from cascaded_diffusion.data.sources import load_splits
from cascaded_diffusion.data.throughput import class_counts, measure_loader, measure_parts
from cascaded_diffusion.files.paths import printable
from cascaded_diffusion.reporting.batch_picture import batch_picture
from cascaded_diffusion.runtime.pictures import save_png
from cascaded_diffusion.runtime.progress import Progress

_MAX_CLASSES_LISTED = 20
_MAX_LABELS_READ = 10_000
_PART_IMAGES, _PART_SECS = 512, 5.0


def report_data(
    config: RunConfig,
    split: str,
    *,
    picture: pathlib.Path,
    num_images: int = 8,
    loader_secs: float = 10.0,
) -> None:
    """Writes a picture of the first batches, and prints class counts and images/s.

    Args:
      config: of the run.
      split: the split to show.
      picture: the PNG to write.
      num_images: how many images it shows.
      loader_secs: how long the loader is measured.

    Raises:
      UserError: the data cannot be read, or does not fit the config.
    """
    data = config.data
    splits = load_splits(data, [split, data.train_split, data.eval_split], config.stage)
    source = splits[split]
    batch_size = min(config.train.batch_size, len(source))
    stream = build_stream(source, data, global_batch_size=batch_size)
    shape = " x ".join(map(str, source.image_shape))
    print(f"{source.identity}: {len(source):,} images, shown to the model as {shape}", flush=True)
    _print_counts(source)

    batches = iterate(stream, source, data, start_step=0)
    try:
        seen = next(batches)
        while len(seen["image"]) < min(num_images, len(source)):
            more = next(batches)
            seen = {name: np.concatenate([seen[name], more[name]]) for name in seen}
    finally:
        batches.close()
    seen = {name: values[:num_images] for name, values in seen.items()}
    save_png(picture, batch_picture(config.stage, seen, source.class_names))
    print(f"{picture}: {len(seen['image'])} images of step 0 on", flush=True)

    put_secs = _put_secs(seen["image"])
    parts, measured = measure_parts(source, max_images=_PART_IMAGES, max_secs=_PART_SECS)
    rate, first_secs = measure_loader(
        lambda: iterate(stream, source, data, start_step=0),
        max_batches=max(1, 1_000_000 // batch_size),
        max_secs=loader_secs,
    )
    parts["copy to the device"] = 1000 * put_secs / len(seen["image"])
    how = _readers(data)
    print(
        f"loader: {rate:,.0f} images/s by {how}, the first batch after {first_secs:.1f} s",
        flush=True,
    )
    print(f"in one thread, of {measured} images:", flush=True)
    total = sum(parts.values())
    for name, millis in parts.items():
        print(f"  {millis:7.3f} ms/image  {100 * millis / total:3.0f} %  {name}", flush=True)
    if source.guard.num_found:
        print(f"{source.guard.num_found} corrupt records were skipped", flush=True)


def _readers(data: DataConfig) -> str:
    threads = f"{data.read_threads} threads"
    return f"{data.read_workers} processes of {threads}" if data.read_workers else threads


def _put_secs(images: np.ndarray) -> float:
    jax.device_put(images).block_until_ready()
    start = time.perf_counter()
    jax.device_put(images).block_until_ready()
    return time.perf_counter() - start


def _print_counts(source: Source) -> None:
    if not source.num_classes:
        print("no classes", flush=True)
        return
    total = min(len(source), _MAX_LABELS_READ)
    progress = Progress(total, unit="labels", label="count classes")
    counts, of = class_counts(source, max_examples=_MAX_LABELS_READ, say=progress.update)
    progress.close()
    of_what = "" if of == len(source) else f" of {of:,} examples spread over the set"
    print(
        f"{source.num_classes} classes, {counts.min():,} to {counts.max():,} images each{of_what}:",
        flush=True,
    )
    for k in range(min(len(counts), _MAX_CLASSES_LISTED)):
        print(f"  {k:4d}  {counts[k]:9,}  {printable(source.class_names[k])}", flush=True)
    if len(counts) > _MAX_CLASSES_LISTED:
        print(f"   ...  and {len(counts) - _MAX_CLASSES_LISTED} more", flush=True)
    if of == len(source) and not counts.all():
        empty = int(np.flatnonzero(counts == 0)[0])
        print(f"class {empty} ({printable(source.class_names[empty])}) has no images", flush=True)
