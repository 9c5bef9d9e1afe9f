"""Generating samples batch by batch over the mesh, into memory or into a `SampleStore`.

Sample `i` has the label `labels[i mod len(labels)]`, by default `i mod num_classes`, and the key
`fold_in(key(seed), i)`. Its noise is therefore the same to the bit for any batch size and any
number of devices; the image is the same up to float rounding.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade, keys_for, sampling_program
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import SamplerConfig
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages
from cascaded_diffusion.evaluation.samples.sample_store import Arrays, SampleStore
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.types import Params

# (parameters per stage, global sample indices [B]) -> images uint8 [B, H, W, C] per stage.
BatchSampler = Callable[[Sequence[Params], np.ndarray], Sequence[jax.Array]]
# Global sample indices [b] -> the arrays of a batch.
BatchMaker = Callable[[np.ndarray], Arrays]
# (the stage's parameters, global sample indices [B], aug_level) -> images uint8 [B, H, W, C].
Enlarger = Callable[[Params, np.ndarray, float], jax.Array]


def labels_of(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """The label of each sample index: i mod K, or 0 for a model without classes."""
    return (indices % max(1, num_classes)).astype(np.int32)


def generate(
    sample: BatchSampler, params: Sequence[Params], *, num_samples: int, batch_size: int, label: str
) -> list[np.ndarray]:
    """All samples, uint8 [num_samples, H, W, C] per stage. Raises ValueError unless finite."""
    progress = Progress(num_samples, unit="samples", label=label)
    made = []
    for start in range(0, num_samples, batch_size):
        images = sample(params, np.arange(start, start + batch_size) % num_samples)
        made.append([mesh_lib.host_array(x)[: num_samples - start] for x in images])
        progress.update(min(start + batch_size, num_samples))
    progress.close()
    return [np.concatenate(batches) for batches in zip(*made, strict=True)]


def cascade_maker(sample: BatchSampler, params: Sequence[Params], labels: np.ndarray) -> BatchMaker:
    """A function for `fill`: indices -> `images_0`, ... and `labels`, those [m] given in turn."""

    def make(indices: np.ndarray) -> Arrays:
        images = sample(params, indices)
        arrays = {f"images_{i}": np.asarray(x) for i, x in enumerate(images)}
        return {**arrays, "labels": labels[indices % len(labels)].astype(np.int64)}

    return make


def fill(store: SampleStore, make: BatchMaker, *, label: str, devices: int = 1) -> None:
    """Makes those batches that a store lacks and that are this process's: every P-th one.

    They are filled up to one size, a multiple of the number of devices, so that only one shape is
    compiled. `make` fails if a sample is not finite.
    """
    missing, process = set(store.missing()), jax.process_index()
    mine = {i: store.rows(i) for i in range(process, store.num_batches, jax.process_count())}
    done = sum(len(rows) for batch, rows in mine.items() if batch not in missing)
    total, silent = sum(map(len, mine.values())), process > 0
    progress = Progress(total, unit="samples", label=label, initial=done, silent=silent)
    size = -(-store.batch_size // devices) * devices
    for batch in sorted(missing & mine.keys()):
        rows = mine[batch]
        arrays = make(np.arange(rows[0], rows[0] + size) % store.num_samples)
        store.write(batch, {name: array[: len(rows)] for name, array in arrays.items()})
        done += len(rows)
        progress.update(done)
    progress.close()


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
) -> BatchSampler:
    """A sampler of a cascade's stages from `first` on; those below are not run and may be None.

    There is a level per enlargement, including those below `first`. The samples have the `labels`
    [m] in turn, by default every class in turn. If `first` > 0, row i of `below`, uint8
    [n, h, w, C], is the low-res image of sample i; with the stored samples of the stage below, the
    samples are those of the whole cascade without truncation.

    With `keep_first_stages`, what all but the last stage made of each batch is kept and used when
    the same batch is asked for. Only the last stage's parameters may then change.
    """
    key = jax.random.key(seed)
    num_classes = cascade.stages[-1].config.num_classes
    labels = np.arange(num_classes) if labels is None else labels
    ran = cascade.stages[first:]
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
        images = cascade.sample(params, keys, label, aug_levels, given)
        if keep_first_stages:
            kept[batch] = images[:-1]
        return [_checked_uint8(x, s.config.name) for x, s in zip(images[first:], ran, strict=True)]

    return sample_batch


def make_enlarger(
    stage: Stage, low_res: LabelledImages, *, sampler: SamplerConfig, seed: int, mesh: Mesh
) -> Enlarger:
    """Enlargements of n given images by one stage; sample `i` is of image i mod n.

    It is compiled once for all levels, which a stage without a level ignores.
    """
    key, sample = jax.random.key(seed), sampling_program(stage, sampler, False)

    def enlarge(params: Params, indices: np.ndarray, aug_level: float) -> jax.Array:
        rows = indices % len(low_res.images)
        label = put_batch(low_res.labels[rows], mesh) if stage.config.num_classes else None
        keys = keys_for(key, put_batch(indices, mesh))
        given = float_from_uint8(put_batch(low_res.images[rows], mesh))
        # With the arguments of a cascade, whose program it is then.
        images = sample(params, keys, label=label, low_res=given, aug_level=aug_level, stop_t=0.0)
        return _checked_uint8(images, stage.config.name)

    return enlarge


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
