"""A report on a split of a config's data: a picture, the classes, and the speed of reading."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from cascaded_diffusion.cascade.augment import (
    Damage,
    GaussianAugment,
    NoAugment,
    condition,
    gaussian_weights,
)
from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.config.schema import AugmentConfig, RunConfig, StageConfig
from cascaded_diffusion.data.loader import Batches, build_stream, iterate
from cascaded_diffusion.data.records import Source
from cascaded_diffusion.data.sized import class_counts, measure_parts
from cascaded_diffusion.data.sources import load_splits
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.paths import printable
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.progress import Progress

_say = functools.partial(print, flush=True)
# Fractions of the largest augmentation level in training.
_LEVELS = (0.1, 0.25, 0.5, 1.0)
_MAX_CLASSES_LISTED = 20
_MAX_LABELS_READ = 10_000


def report_data(
    config: RunConfig, split: str, *, picture: AnyPath, num_images: int, loader_secs: float
) -> None:
    """Writes the PNG `picture` of the first batches, and prints class counts and images/s.

    Raises UserError if the data cannot be read, or does not fit the config.
    """
    data = config.data
    splits = load_splits(data, [split, data.train_split, data.eval_split], config.stage)
    source = splits[split]
    batch_size = min(config.train.batch_size, len(source))
    stream = build_stream(source, data, global_batch_size=batch_size)
    shape = " x ".join(map(str, source.image_shape))
    _say(f"{source.identity}: {len(source):,} images, shown to the model as {shape}")
    _print_counts(source)

    batches = [stream[k] for k in range(-(-min(num_images, len(source)) // batch_size))]
    seen = {key: np.concatenate([b[key] for b in batches])[:num_images] for key in batches[0]}
    pictures.save_png(picture, batch_picture(config.stage, seen, source.class_names))
    _say(f"{picture}: {len(seen['image'])} images of step 0 on")

    parts, measured = measure_parts(source, _say)
    parts["copy to the device"] = 1000 * _put_secs(seen["image"]) / len(seen["image"])
    read = functools.partial(iterate, stream, source, data, start_step=0)
    rate, first_secs = _measure_loader(read, loader_secs)
    how = f"{data.read_threads} threads"
    if data.read_workers:
        how = f"{data.read_workers} processes of {how}"
    _say(f"loader: {rate:,.0f} images/s by {how}, the first batch after {first_secs:.1f} s")
    _say(f"in one thread, of {measured} images:")
    total = sum(parts.values())
    for name, millis in parts.items():
        _say(f"  {millis:7.3f} ms/image  {100 * millis / total:3.0f} %  {name}")
    if source.guard.num_found:
        _say(f"{source.guard.num_found} corrupt records were skipped")


def _measure_loader(batches_from: Callable[[], Batches], max_secs: float) -> tuple[float, float]:
    """Images/s after the first batch, and the seconds until it came."""
    start = time.monotonic()
    with contextlib.closing(batches_from()) as batches:
        images, batch_size = 0, len(next(batches)["image"])
        first = last = time.monotonic()
        while last - first <= max_secs and images < 1_000_000:
            next(batches)
            images += batch_size
            last = time.monotonic()
    return images / max(last - first, 1e-9), first - start


def _put_secs(images: np.ndarray) -> float:
    jax.device_put(images).block_until_ready()
    start = time.perf_counter()
    jax.device_put(images).block_until_ready()
    return time.perf_counter() - start


def _print_counts(source: Source) -> None:
    if not source.num_classes:
        _say("no classes")
        return
    total = min(len(source), _MAX_LABELS_READ)
    progress = Progress(total, unit="labels", label="count classes")
    counts, of = class_counts(source, max_examples=_MAX_LABELS_READ, say=progress.update)
    progress.close()
    of_what = "" if of == len(source) else f" of {of:,} examples spread over the set"
    each = f"{counts.min():,} to {counts.max():,} images each"
    _say(f"{source.num_classes} classes, {each}{of_what}:")
    names = list(map(printable, source.class_names))
    for k, name in enumerate(names[:_MAX_CLASSES_LISTED]):
        _say(f"  {k:4d}  {counts[k]:9,}  {name}")
    if len(counts) > _MAX_CLASSES_LISTED:
        _say(f"   ...  and {len(counts) - _MAX_CLASSES_LISTED} more")
    if of == len(source) and not counts.all():
        empty = int(np.argmin(counts))
        _say(f"class {empty} ({names[empty]}) has no images")


def batch_picture(
    config: StageConfig, batch: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> np.ndarray:
    """Draws what a stage gets of a batch, one row per kind of image, with a caption.

    Returns uint8 [height, width, 3]. The batch has `image` uint8 [b, H, W, C], `label` int [b],
    and `low_res` if it is stored.
    """
    stage = build_stage(config)
    images = float_from_uint8(batch["image"])
    target = stage.target_from(images)
    resolution = target.shape[1]
    rows = [(f"image, {resolution} px", target)]
    if stage.augment is not None:
        stored = batch.get("low_res")
        low_res = stage.low_res_from(images) if stored is None else float_from_uint8(stored)
        rows.append((f"low-res input, {low_res.shape[1]} px", low_res))
        for caption, damage in _damages(config.augment, stage.augment, low_res.shape):
            rows.append((caption, condition(low_res, damage, label=None).low_res))
    rows = [
        (caption, pictures.enlarge_nearest(np.asarray(uint8_from_float(row)), resolution))
        for caption, row in rows
    ]
    names = []
    if class_names and config.num_classes:
        names = [printable(class_names[k]) for k in batch["label"]]
    return pictures.labelled_rows(rows, scale=max(1, 96 // resolution), names=names)


def _damages(
    config: AugmentConfig, augment: NoAugment | GaussianAugment, shape: tuple[int, ...]
) -> list[tuple[str, Damage]]:
    """Captions and damages at several strengths, as training may draw them."""
    damages = []
    if config.name == "gaussian":
        keys = jax.random.split(jax.random.key(0), shape[0])
        for level in [config.max_level * part for part in _LEVELS]:
            damage = augment.for_sampling(keys, shape, level)
            damages.append((f"damaged, aug_level {level:.2g}", damage))
    elif config.name == "blur":
        low, high = config.blur_sigmas
        for sigma in np.linspace(low, high, 2 if high > low else 1):
            weights = gaussian_weights(np.full(shape[:1], sigma), config.blur_kernel_size)
            damages.append((f"blurred, sigma {sigma:.2g} px", Damage(blur_weights=weights)))
    return damages
