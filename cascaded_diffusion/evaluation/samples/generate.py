"""Generating a given number of samples, batch by batch, over the mesh.

Sample `i` has label `labels[i mod len(labels)]`, by default `i mod num_classes`, and the key
`fold_in(key(seed), i)`: its noise is the same to the bit for any batch size and number of
devices, the image but for float rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade, keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import SamplerConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.sample_store import SampleStore
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.types import Params

_POLL_SECS = 0.5

# (parameters per stage, global sample indices [B]) -> images uint8 [B, H, W, C] per stage.
BatchSampler = Callable[[Sequence[Params], np.ndarray], Sequence[jax.Array]]


def class_balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """int32 [num_samples]: 0, 1, ..., K-1, 0, 1, ... All 0 where there are no classes."""
    return labels_of(np.arange(num_samples), num_classes)


def labels_of(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """The labels of the samples of given indices: i mod K, all 0 where there are no classes."""
    return (indices % max(1, num_classes)).astype(np.int32)


def generate(
    sample_batch: BatchSampler,
    params: Sequence[Params],
    *,
    num_samples: int,
    batch_size: int,
    label: str,
) -> list[np.ndarray]:
    """All samples 0 .. num_samples - 1, uint8 [num_samples, H, W, C] per stage.

    The last batch is filled up with samples that are thrown away, so that only
    one batch shape is compiled.

    Raises:
      ValueError: a sample is not finite.
    """
    progress = Progress(num_samples, unit="samples", label=label)
    parts: list[list[np.ndarray]] = []
    for start in range(0, num_samples, batch_size):
        indices = np.arange(start, start + batch_size)
        count = min(batch_size, num_samples - start)
        images = sample_batch(params, indices % num_samples)
        parts.append([mesh_lib.host_array(x)[:count] for x in images])
        progress.update(start + count)
    progress.close()
    return [np.concatenate(images) for images in zip(*parts, strict=True)]


def fill_cascade(
    store: SampleStore,
    sample_batch: BatchSampler,
    params: Sequence[Params],
    *,
    labels: np.ndarray,
    devices: int,
    label: str,
    process_index: int,
    process_count: int,
) -> None:
    """Makes those batches of a store that are this process's and not there yet.

    Every P-th batch is; each holds `images_0`, `images_1`, ... of the stages, uint8,
    and `labels`.

    Args:
      store: the samples.
      sample_batch: makes them.
      params: one tree per stage.
      labels: [m] the samples' labels, in turn.
      devices: over which a batch is split: a multiple of it is made.
      label: of the progress.
      process_index: this process's number.
      process_count: how many there are.

    Raises:
      ValueError: a sample is not finite.
    """
    missing = set(store.missing())
    mine = range(process_index, store.num_batches, process_count)
    done = sum(len(store.rows(batch)) for batch in mine if batch not in missing)
    progress = Progress(
        sum(len(store.rows(batch)) for batch in mine),
        unit="samples",
        label=label,
        initial=done,
        silent=process_index > 0,
    )
    # The last batch is filled up, so that only one shape is compiled.
    size = -(-store.batch_size // devices) * devices
    for batch in sorted(missing & set(mine)):
        rows = store.rows(batch)
        images = sample_batch(params, np.arange(rows[0], rows[0] + size) % store.num_samples)
        arrays = {f"images_{i}": np.asarray(x)[: len(rows)] for i, x in enumerate(images)}
        store.write(batch, {**arrays, "labels": labels[rows % len(labels)].astype(np.int64)})
        done += len(rows)
        progress.update(done)
    progress.close()


def fill_together(
    store: SampleStore,
    sample_batch: BatchSampler,
    params: Sequence[Params],
    *,
    labels: np.ndarray,
    devices: int,
    label: str,
    name: str,
) -> None:
    """Fills a store that all processes of a job see, each with its part; returns when it is full.

    To be called by every process. What one cannot do, none does. Arguments as `fill_cascade`'s,
    and `name`, of the store's place in error messages.

    Raises:
      UserError: a sample is not finite, or a batch cannot be written.
    """
    error = None
    try:
        fill_cascade(
            store,
            sample_batch,
            params,
            labels=labels,
            devices=devices,
            label=label,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    except ValueError as e:
        error = UserError(
            f"{e}: lower config.cascade.samplers.N.guidance_scale, or set its threshold"
        )
    except OSError as e:
        error = UserError(f"{name}: cannot be written ({e.strerror or e})")
    if error is not None:
        store.note_failure()
    # Hours, perhaps: no collective would wait so long.
    while store.missing() and not store.has_failed():
        time.sleep(_POLL_SECS)
    mesh_lib.raise_on_all_processes(error)


def make_cascade_sampler(
    cascade: Cascade,
    aug_levels: Sequence[float],
    *,
    seed: int,
    mesh: Mesh,
    labels: np.ndarray | None = None,
    keep_first_stages: bool = False,
    sample: Callable[..., list[jax.Array]] | None = None,
) -> BatchSampler:
    """Samples of a whole cascade; with one stage, of that stage alone.

    Args:
      cascade: the stages.
      aug_levels: one per enlargement.
      seed: of the samples' keys.
      mesh: the device mesh.
      labels: [m] the samples' labels, in turn; None: every class.
      keep_first_stages: keep what all but the last stage made of each batch and
        use it again when the same batch is asked for. Only the last stage's
        parameters may then differ between calls.
      sample: from `cascade.make_sampler()`, for samplers of several levels to share
        their compiled programs.
    """
    key = jax.random.key(seed)
    sample = cascade.make_sampler() if sample is None else sample
    label_of = _labeller(cascade, labels)
    names = [stage.config.name for stage in cascade.stages]
    kept: dict[tuple[int, ...], list[jax.Array]] = {}
    place = make_placer(mesh)

    def sample_batch(params: Sequence[Params], indices: np.ndarray) -> list[jax.Array]:
        keys = keys_for(key, place(indices))
        batch = tuple(indices.tolist())
        images = sample(params, keys, place(label_of(indices)), aug_levels, kept.get(batch, ()))
        if keep_first_stages:
            kept[batch] = images[:-1]
        return [_checked_uint8(x, name) for x, name in zip(images, names, strict=True)]

    return sample_batch


def make_sampler_above(
    cascade: Cascade,
    aug_levels: Sequence[float],
    below: np.ndarray,
    *,
    first: int,
    seed: int,
    mesh: Mesh,
    labels: np.ndarray | None = None,
    sample: Callable[..., list[jax.Array]] | None = None,
) -> BatchSampler:
    """The cascade's stages from `first` on, on given images of the stage below them.

    Of stored samples of that stage it makes what `make_cascade_sampler` makes without
    truncation.

    Args:
      cascade: the stages; those below `first` are not run and may be None.
      aug_levels: one per enlargement, of those below `first` too.
      below: uint8 [n, h, w, C], what sample i is to be made of at row i.
      first: the place in the cascade of the first stage that is run, at least 1.
      seed: of the samples' keys.
      mesh: the device mesh.
      labels: as in `make_cascade_sampler`.
      sample: as in `make_cascade_sampler`.

    Returns:
      A sampler of the stages that are run.
    """
    key = jax.random.key(seed)
    sample = cascade.make_sampler() if sample is None else sample
    label_of = _labeller(cascade, labels)
    names = [stage.config.name for stage in cascade.stages[first:]]
    place = make_placer(mesh)

    def sample_batch(params: Sequence[Params], indices: np.ndarray) -> list[jax.Array]:
        low_res = float_from_uint8(place(below[indices]))
        given = [None] * (first - 1) + [low_res]
        keys = keys_for(key, place(indices))
        images = sample(params, keys, place(label_of(indices)), aug_levels, given)[first:]
        return [_checked_uint8(x, name) for x, name in zip(images, names, strict=True)]

    return sample_batch


def _labeller(
    cascade: Cascade, labels: np.ndarray | None
) -> Callable[[np.ndarray], np.ndarray | None]:
    """Returns a function: indices of samples -> their labels; None where there are no classes."""
    num_classes = cascade.stages[-1].config.num_classes
    if not num_classes:
        return lambda indices: None
    if labels is None:
        return lambda indices: labels_of(indices, num_classes)
    return lambda indices: labels[indices % len(labels)].astype(np.int32)


def make_enlarging_sampler(
    stage: Stage,
    low_res: np.ndarray,
    labels: np.ndarray,
    *,
    sampler: SamplerConfig,
    seed: int,
    mesh: Mesh,
) -> Callable[..., list[jax.Array]]:
    """Enlargements of given images, float32 [n, h, w, C]; sample `i` is of image i mod n.

    Returns:
      A `BatchSampler` of the stage alone that takes besides `aug_level`, None for a stage
      that has none; compiled once for all levels.
    """
    key = jax.random.key(seed)
    num_classes = stage.config.num_classes
    place = make_placer(mesh)

    @jax.jit
    def sample(
        params: Params, keys: jax.Array, labels: Any, low_res: jax.Array, level: Any
    ) -> jax.Array:
        return stage.sample(
            params, keys, label=labels, low_res=low_res, aug_level=level, sampler=sampler
        )

    def sample_batch(
        params: Sequence[Params], indices: np.ndarray, *, aug_level: float | None
    ) -> list[jax.Array]:
        rows = indices % len(low_res)
        label = labels[rows] if num_classes else None
        keys = keys_for(key, place(indices))
        images = sample(params[-1], keys, place(label), place(low_res[rows]), aug_level)
        return [_checked_uint8(images, stage.config.name)]

    return sample_batch


def make_placer(mesh: Mesh) -> Callable[[np.ndarray | None], jax.Array | None]:
    """Returns a function that splits an array's first axis over the mesh; None stays None."""
    sharding = mesh_lib.batch_sharding(mesh)
    return lambda x: None if x is None else jax.device_put(x, sharding)


@jax.jit
def _uint8_and_finite(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    return uint8_from_float(image), jnp.isfinite(image).all()


def _checked_uint8(image: jax.Array, name: str) -> jax.Array:
    """The pixels of what the stage of a name made."""
    pixels, finite = _uint8_and_finite(image)
    if not bool(finite):
        raise ValueError(f"a sample of {name} is not finite")
    return pixels
