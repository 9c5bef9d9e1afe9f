"""Generating samples batch by batch over the mesh, into memory or into a `SampleStore`.

Sample `i` has the label `labels[i mod len(labels)]`, by default `i mod num_classes`, and the key
`fold_in(key(seed), i)`. Its noise is therefore the same to the bit for any batch size and any
number of devices; the image is the same up to float rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from cascaded_diffusion.evaluation.samples.sample_store import Arrays, SampleStore
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.types import Params

_POLL_SECS = 0.5

# (parameters per stage, global sample indices [B]) -> images uint8 [B, H, W, C] per stage.
BatchSampler = Callable[[Sequence[Params], np.ndarray], Sequence[jax.Array]]


def class_balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """int32 [num_samples]: 0, 1, ..., K-1, 0, 1, ...; all 0 for a model without classes."""
    return labels_of(np.arange(num_samples), num_classes)


def labels_of(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """The label of each sample index: i mod K, or 0 for a model without classes."""
    return (indices % max(1, num_classes)).astype(np.int32)


def generate(
    sample_batch: BatchSampler,
    params: Sequence[Params],
    *,
    num_samples: int,
    batch_size: int,
    label: str,
) -> list[np.ndarray]:
    """All samples 0 .. num_samples - 1 in memory: uint8 [num_samples, H, W, C] per stage.

    Raises:
      ValueError: a sample is not finite.
    """

    def make(indices: np.ndarray) -> Arrays:
        images = sample_batch(params, indices)
        return {str(i): mesh_lib.host_array(x) for i, x in enumerate(images)}

    starts = range(0, num_samples, batch_size)
    rows = [np.arange(start, min(start + batch_size, num_samples)) for start in starts]
    progress = Progress(num_samples, unit="samples", label=label)
    made = [x for _, x in _batches(make, enumerate(rows), num_samples, batch_size, progress)]
    return [np.concatenate([arrays[name] for arrays in made]) for name in made[0]]


def _batches(
    make: Callable[[np.ndarray], Arrays],
    batches: Iterable[tuple[int, np.ndarray]],
    num_samples: int,
    size: int,
    progress: Progress,
    done: int = 0,
) -> Iterator[tuple[int, Arrays]]:
    """The numbers and arrays of batches, which come as number and consecutive sample indices.

    Every batch is filled up to `size` samples, the surplus of which is dropped, so that only one
    shape is compiled.
    """
    for number, rows in batches:
        arrays = make(np.arange(rows[0], rows[0] + size) % num_samples)
        yield number, {name: array[: len(rows)] for name, array in arrays.items()}
        done += len(rows)
        progress.update(done)
    progress.close()


def cascade_maker(
    sample_batch: BatchSampler, params: Sequence[Params], labels: np.ndarray
) -> Callable[[np.ndarray], Arrays]:
    """Returns a function for `fill`: indices -> `images_0`, `images_1`, ... and `labels`.

    The samples have the given labels [m] in turn.
    """

    def make(indices: np.ndarray) -> Arrays:
        images = sample_batch(params, indices)
        arrays = {f"images_{i}": np.asarray(x) for i, x in enumerate(images)}
        return {**arrays, "labels": labels[indices % len(labels)].astype(np.int64)}

    return make


def fill(
    store: SampleStore,
    make: Callable[[np.ndarray], Arrays],
    *,
    label: str,
    devices: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Makes those batches that a store lacks and that are this process's: every P-th one.

    Args:
      store: the samples.
      make: global sample indices [b] -> the arrays of a batch.
      label: of the progress line.
      devices: a batch is filled up to a multiple of their number.
      process_index: this process's number.
      process_count: P.

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
    size = -(-store.batch_size // devices) * devices
    batches = ((batch, store.rows(batch)) for batch in sorted(missing & set(mine)))
    for batch, arrays in _batches(make, batches, store.num_samples, size, progress, done):
        store.write(batch, arrays)


def fill_on_all_processes(
    store: SampleStore,
    make: Callable[[np.ndarray], Arrays],
    *,
    label: str,
    devices: int,
    name: str,
) -> None:
    """Fills a store that all processes of a job see; returns when it is full.

    Every process must call this, with the arguments of `fill` and the name of the store's place
    for error messages. If it fails in any process, all of them raise.

    Raises:
      UserError: a sample is not finite, or a batch cannot be written.
    """
    error = None
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    try:
        fill(store, make, label=label, devices=devices, **processes)
    except ValueError as e:
        error = UserError(
            f"{e}: lower config.cascade.samplers.N.guidance_scale, or set its threshold"
        )
    except OSError as e:
        error = UserError(f"{name}: cannot be written ({e.strerror or e})")
    if error is not None:
        store.note_failure()
    # This may take hours, and no collective would wait so long.
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
    below: np.ndarray | None = None,
    first: int = 0,
    keep_first_stages: bool = False,
    sample: Callable[..., list[jax.Array]] | None = None,
) -> BatchSampler:
    """Samples of a cascade from its stage `first` on.

    Given the stored samples of the stage below `first`, it makes what the whole cascade makes of
    them without truncation.

    Args:
      cascade: the stages; those below `first` are not run and may be None.
      aug_levels: one per enlargement, including those below `first`.
      seed: of the samples' keys.
      mesh: the device mesh.
      labels: [m] the samples' labels, in turn; by default every class in turn.
      below: uint8 [n, h, w, C]: row i is the low-res image of sample i. Required if `first` > 0.
      first: the place in the cascade of the first stage to run.
      keep_first_stages: keep what all but the last stage made of each batch and use it again when
        the same batch is asked for. Only the last stage's parameters may then differ between
        calls.
      sample: the result of `cascade.make_sampler()`, for several samplers to share its compiled
        programs.

    Returns:
      A sampler of the stages that are run.
    """
    key = jax.random.key(seed)
    sample = cascade.make_sampler() if sample is None else sample
    num_classes = cascade.stages[-1].config.num_classes
    labels = np.arange(num_classes) if labels is None else labels
    names = [stage.config.name for stage in cascade.stages[first:]]
    kept: dict[tuple[int, ...], list[jax.Array]] = {}

    def sample_batch(params: Sequence[Params], indices: np.ndarray) -> list[jax.Array]:
        keys, label = keys_for(key, put_batch(indices, mesh)), None
        if num_classes:
            label = put_batch(labels[indices % len(labels)].astype(np.int32), mesh)
        batch = tuple(indices.tolist())
        given: Sequence[jax.Array | None] = kept.get(batch, ())
        if below is not None:
            low_res = float_from_uint8(put_batch(below[indices], mesh))
            given = [*[None] * (first - 1), low_res]
        images = sample(params, keys, label, aug_levels, given)
        if keep_first_stages:
            kept[batch] = images[:-1]
        return [_checked_uint8(x, name) for x, name in zip(images[first:], names, strict=True)]

    return sample_batch


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
      A `BatchSampler` of the stage alone with the further keyword `aug_level`, which is None for
      a stage that has none. It is compiled once for all levels.
    """
    key = jax.random.key(seed)

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
        label = put_batch(labels[rows], mesh) if stage.config.num_classes else None
        keys = keys_for(key, put_batch(indices, mesh))
        images = sample(params[-1], keys, label, put_batch(low_res[rows], mesh), aug_level)
        return [_checked_uint8(images, stage.config.name)]

    return sample_batch


def put_batch(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array on the devices, its first axis split over the mesh."""
    return jax.device_put(x, mesh_lib.batch_sharding(mesh))


@jax.jit
def _uint8_and_finite(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    return uint8_from_float(image), jnp.isfinite(image).all()


def _checked_uint8(image: jax.Array, name: str) -> jax.Array:
    """The pixels of images [B, H, W, C] of a stage. Raises ValueError unless all are finite."""
    pixels, finite = _uint8_and_finite(image)
    if not bool(finite):
        raise ValueError(f"a sample of {name} is not finite")
    return pixels
