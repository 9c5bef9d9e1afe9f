"""Generating a given number of samples, batch by batch, over the mesh.

Sample `i` has label `i mod num_classes` and the key `fold_in(key(seed), i)`: its
noise is the same to the bit for any batch size and number of devices, the image but
for float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade, keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config import SamplerConfig
from cascaded_diffusion.evaluation.sample_store import SampleStore
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.logging import Progress
from cascaded_diffusion.types import Params

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
    num_classes: int,
    process_index: int,
    process_count: int,
) -> None:
    """Makes those batches of a store that are this process's and not there yet.

    Every P-th batch is; each holds `images_0`, `images_1`, ... of the stages, uint8,
    and `labels`.

    Raises:
      ValueError: a sample is not finite.
    """
    mine = [batch for batch in store.missing() if batch % process_count == process_index]
    progress = Progress(
        len(mine) * store.batch_size, unit="samples", label="cascade", silent=process_index > 0
    )
    for done, batch in enumerate(mine):
        rows = store.rows(batch)
        # The last batch is filled up, so that only one shape is compiled.
        padded = np.arange(rows[0], rows[0] + store.batch_size) % store.num_samples
        images = sample_batch(params, padded)
        arrays = {f"images_{i}": np.asarray(x)[: len(rows)] for i, x in enumerate(images)}
        store.write(batch, {**arrays, "labels": labels_of(rows, num_classes).astype(np.int64)})
        progress.update((done + 1) * store.batch_size)
    progress.close()


def make_cascade_sampler(
    cascade: Cascade,
    aug_levels: Sequence[float],
    *,
    seed: int,
    mesh: Mesh,
    keep_first_stages: bool = False,
    sample: Callable[..., list[jax.Array]] | None = None,
) -> BatchSampler:
    """Samples of a whole cascade; with one stage, of that stage alone.

    Args:
      cascade: the stages.
      aug_levels: one per enlargement.
      seed: of the samples' keys.
      mesh: the device mesh.
      keep_first_stages: keep what all but the last stage made of each batch and
        use it again when the same batch is asked for. Only the last stage's
        parameters may then differ between calls.
      sample: from `cascade.make_sampler()`, for samplers of several levels to share
        their compiled programs.
    """
    key = jax.random.key(seed)
    sample = cascade.make_sampler() if sample is None else sample
    num_classes = cascade.stages[0].config.num_classes
    kept: dict[tuple[int, ...], list[jax.Array]] = {}
    place = make_placer(mesh)

    def sample_batch(params: Sequence[Params], indices: np.ndarray) -> list[jax.Array]:
        labels = labels_of(indices, num_classes) if num_classes else None
        keys = keys_for(key, place(indices))
        batch = tuple(indices.tolist())
        images = sample(params, keys, place(labels), aug_levels, kept.get(batch, ()))
        if keep_first_stages:
            kept[batch] = images[:-1]
        return [_checked_uint8(x) for x in images]

    return sample_batch


def make_last_stage_sampler(
    cascade: Cascade,
    aug_levels: Sequence[float],
    below: np.ndarray,
    *,
    seed: int,
    mesh: Mesh,
    sample: Callable[..., list[jax.Array]] | None = None,
) -> BatchSampler:
    """The cascade's last stage alone, on stored samples of the stage below it.

    What it makes of them is what `make_cascade_sampler` makes without truncation.

    Args:
      cascade: the stages.
      aug_levels: one per enlargement.
      below: uint8 [n, h, w, C], sample i of the stage below at row i.
      seed: of the samples' keys.
      mesh: the device mesh.
      sample: as in `make_cascade_sampler`.
    """
    key = jax.random.key(seed)
    sample = cascade.make_sampler() if sample is None else sample
    num_classes = cascade.stages[0].config.num_classes
    place = make_placer(mesh)

    def sample_batch(params: Sequence[Params], indices: np.ndarray) -> list[jax.Array]:
        labels = labels_of(indices, num_classes) if num_classes else None
        low_res = float_from_uint8(place(below[indices]))
        given = [None] * (len(cascade.stages) - 2) + [low_res]
        keys = keys_for(key, place(indices))
        images = sample(params, keys, place(labels), aug_levels, given)
        return [_checked_uint8(images[-1])]

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
        return [_checked_uint8(images)]

    return sample_batch


def make_placer(mesh: Mesh) -> Callable[[np.ndarray | None], jax.Array | None]:
    """Returns a function that splits an array's first axis over the mesh; None stays None."""
    sharding = mesh_lib.batch_sharding(mesh)
    return lambda x: None if x is None else jax.device_put(x, sharding)


@jax.jit
def _uint8_and_finite(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    return uint8_from_float(image), jnp.isfinite(image).all()


def _checked_uint8(image: jax.Array) -> jax.Array:
    pixels, finite = _uint8_and_finite(image)
    if not bool(finite):
        raise ValueError("a sample is not finite")
    return pixels
