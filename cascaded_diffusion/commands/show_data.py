"""Shows what a model will see of its data, and how fast it comes.

    python -m cascaded_diffusion.data --config=configs/sr64.py --show
    python -m cascaded_diffusion.data --config=configs/sr64.py --show --split=validation

Writes a picture, by default data.png: the images of the first batches as the model trains on them,
and below each what a super-resolution stage gets: its low-res input, clean and damaged by
conditioning augmentation at several strengths. Prints counts per class, and images/s with
where the time goes.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from cascaded_diffusion.commands import config_flags, flag_checks, jax_setup
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError

if TYPE_CHECKING:
    from cascaded_diffusion.data.sources import Source

# Of the largest level in training.
_LEVELS = (0.1, 0.25, 0.5, 1.0)
_MAX_CLASSES_LISTED = 20
_MAX_LABELS_READ = 10_000
_PART_IMAGES, _PART_SECS = 512, 5.0


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, e.g. configs/sr64.py")
    flags.DEFINE_bool("show", False, "write the picture and print what is there", flag_values=fv)
    flags.DEFINE_string("split", None, "which split; train_split of the config", flag_values=fv)
    flags.DEFINE_string("output", "data.png", "the picture to write", flag_values=fv)
    flags.DEFINE_integer(
        "images", 8, "how many images in the picture", lower_bound=1, upper_bound=64,
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_float(
        "secs", 10.0, "how long to measure the loader", lower_bound=0.1, upper_bound=3600.0,
        flag_values=fv,
    )  # fmt: skip
    config_flags.parse(fv, argv, __doc__)
    flag_checks.require(fv, "config")
    if not fv.show:
        raise UserError("nothing to do: add --show")
    config = run_config_from(config_flags.config_values(fv, argv))
    flag_checks.check_paths(fv, "output")
    output = pathlib.Path(fv.output)
    if output.suffix != ".png":
        raise UserError(f"--output={fv.output}: expected a name that ends with .png")
    split = fv.split or config.data.train_split

    from cascaded_diffusion.files.folders import check_writable

    check_writable(output.absolute().parent, "output")
    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.data.loader import build_stream, iterate
    from cascaded_diffusion.data.sources import load_splits
    from cascaded_diffusion.data.throughput import measure_loader, measure_parts
    from cascaded_diffusion.runtime.pictures import save_png

    source = load_splits(
        config.data,
        [split, config.data.train_split, config.data.eval_split],
        config.stage,
    )[split]
    batch_size = min(config.train.batch_size, len(source))
    stream = build_stream(source, config.data, global_batch_size=batch_size)
    shape = " x ".join(map(str, source.image_shape))
    print(f"{source.identity}: {len(source):,} images, shown to the model as {shape}", flush=True)
    _say_counts(source)

    batches = iterate(stream, source, config.data, start_step=0)
    try:
        seen = next(batches)
        while len(seen["image"]) < min(fv.images, len(source)):
            more = next(batches)
            seen = {name: np.concatenate([seen[name], more[name]]) for name in seen}
    finally:
        batches.close()
    seen = {name: values[: fv.images] for name, values in seen.items()}
    save_png(output, _picture(config, source, seen))
    print(f"{output}: {len(seen['image'])} images of step 0 on", flush=True)

    put_secs = _put_secs(jax, seen["image"])
    parts, measured = measure_parts(source, max_images=_PART_IMAGES, max_secs=_PART_SECS)
    rate, first_secs = measure_loader(
        lambda: iterate(stream, source, config.data, start_step=0),
        max_batches=max(1, 1_000_000 // batch_size),
        max_secs=fv.secs,
    )
    parts["copy to the device"] = 1000 * put_secs / len(seen["image"])
    _say_throughput(config, rate, first_secs, parts, measured)
    if source.guard.num_found:
        print(f"{source.guard.num_found} corrupt records were skipped", flush=True)
    return 0


def _put_secs(jax: Any, images: np.ndarray) -> float:
    jax.device_put(images).block_until_ready()
    start = time.perf_counter()
    jax.device_put(images).block_until_ready()
    return time.perf_counter() - start


def _say_counts(source: Source) -> None:
    from cascaded_diffusion.data.raw import printable
    from cascaded_diffusion.data.throughput import class_counts
    from cascaded_diffusion.runtime.progress import Progress

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


def _say_throughput(
    config: RunConfig, rate: float, first_secs: float, parts: dict[str, float], measured: int
) -> None:
    data = config.data
    how = (
        f"{data.read_workers} processes of {data.read_threads} threads"
        if data.read_workers
        else f"{data.read_threads} threads"
    )
    print(
        f"loader: {rate:,.0f} images/s by {how}, the first batch after {first_secs:.1f} s",
        flush=True,
    )
    total = sum(parts.values())
    print(f"in one thread, of {measured} images:", flush=True)
    for name, millis in parts.items():
        print(f"  {millis:7.3f} ms/image  {100 * millis / total:3.0f} %  {name}", flush=True)


def _picture(config: RunConfig, source: Source, seen: dict[str, np.ndarray]) -> np.ndarray:
    """What the stage gets of a batch, one row per kind of image."""
    import jax

    from cascaded_diffusion.cascade.augment import condition
    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
    from cascaded_diffusion.data.raw import printable
    from cascaded_diffusion.runtime.pictures import enlarge_nearest, labelled_rows, with_names

    stage = build_stage(config.stage)
    images = float_from_uint8(seen["image"])
    target = np.asarray(uint8_from_float(stage.target_from(images)))
    resolution = target.shape[1]
    rows = [(f"image, {resolution} px", target)]
    if stage.augment is not None:
        low_res = (
            float_from_uint8(seen["low_res"]) if "low_res" in seen else stage.low_res_from(images)
        )
        size = low_res.shape[1]
        rows.append((f"low-res input, {size} px", np.asarray(uint8_from_float(low_res))))
        for caption, damage in _damages(config, stage.augment, low_res.shape, jax):
            shown = condition(low_res, damage, label=None).low_res
            rows.append((caption, np.asarray(uint8_from_float(shown))))
    rows = [(caption, enlarge_nearest(row, resolution)) for caption, row in rows]
    picture = labelled_rows(rows, scale=max(1, 96 // resolution))
    if source.class_names and config.stage.num_classes:
        names = [printable(source.class_names[label]) for label in seen["label"]]
        picture = with_names(picture, names)
    return picture


def _damages(
    config: RunConfig, augment: Any, shape: tuple[int, ...], jax: Any
) -> list[tuple[str, Any]]:
    """Captions and damages at several strengths, as training may draw them."""
    from cascaded_diffusion.cascade.augment import Damage, gaussian_weights

    section, key = config.stage.augment, jax.random.key(0)
    if section.name == "gaussian":
        keys = jax.random.split(key, shape[0])
        levels = [section.max_level * part for part in _LEVELS]
        return [
            (f"damaged, aug_level {level:.2g}", augment.for_sampling(keys, shape, level))
            for level in levels
        ]
    if section.name == "blur":
        low, high = section.blur_sigmas
        damages = []
        for sigma in np.linspace(low, high, 2 if high > low else 1):
            weights = gaussian_weights(np.full(shape[:1], sigma), section.blur_kernel_size)
            damages.append((f"blurred, sigma {sigma:.2g} px", Damage(blur_weights=weights)))
        return damages
    return []
