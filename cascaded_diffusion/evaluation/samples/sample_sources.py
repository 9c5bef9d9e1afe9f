"""Where the samples under evaluation come from: a stage alone, or fed with low-res images.

A super-resolution stage enlarges the low-res versions of real images, images of a file
(the stored samples of the stage before it), or what a live cascade hands on. Which of
them is said in every record.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import SamplerConfig, to_dict
from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.real_images import RealSplit
from cascaded_diffusion.evaluation.samples.sample_store import Arrays, SampleStore
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages
from cascaded_diffusion.evaluation.trained import TrainedStage
from cascaded_diffusion.runtime.mesh import host_array
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSource:
    """A way to make samples of one stage.

    Attributes:
      kind: "none" (a base model), "real", "file", "samples" (the stages below, each at
        its own sampler) or "cascade" (as a cascade's config says); for file names.
      record: what says of it all that the samples depend on besides the stage's
        parameters and the seed.
      make: (the stage's parameters, global sample indices [b]) -> arrays of a batch.
      about: what people are told of it.
      notes: what a record says besides, which is no part of what is compared.
    """

    kind: str
    record: dict[str, Any]
    make: Callable[[Params, np.ndarray], Arrays]
    about: str
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LevelSource:
    """Enlargements of the same few images at any level of conditioning augmentation.

    Attributes:
      low_res: the images, uint8 [n, h, w, C].
      make: (the stage's parameters, level) -> uint8 [n, H, W, C].
    """

    low_res: np.ndarray
    make: Callable[[Params, float], np.ndarray]


def _record(
    low_res: str,
    sampler: SamplerConfig,
    *,
    aug_level: float | None,
    below: Any = None,
    truncated: bool = False,
) -> dict[str, Any]:
    return {
        "low_res": low_res,
        "low_res_sampler": below,
        "aug_level": aug_level,
        "truncated": truncated,
        "sampler": to_dict(sampler),
    }


def of_base(stage: Stage, sampler: SamplerConfig, *, seed: int, mesh: Mesh) -> SampleSource:
    """Samples of a base model."""
    cascade = Cascade(stages=[stage], samplers=[sampler], truncated=False)
    sample = generate.make_cascade_sampler(cascade, [], seed=seed, mesh=mesh)
    num_classes = stage.config.num_classes

    def make(params: Params, indices: np.ndarray) -> Arrays:
        (images,) = sample([params], indices)
        return {"images": host_array(images), "labels": _labels(indices, num_classes)}

    record = _record("none", sampler, aug_level=None)
    return SampleSource(kind="none", record=record, make=make, about="none")


def of_real_images(
    stage: Stage,
    sampler: SamplerConfig,
    split: RealSplit,
    *,
    num_samples: int,
    aug_level: float,
    seed: int,
    mesh: Mesh,
) -> SampleSource:
    """Enlargements of `num_samples` real images, spread over a split.

    Where the split has fewer, each is enlarged several times, by other noise, and so it is said.
    """
    real = split.spread(num_samples, stage.config.low_res_resolution)
    source = _enlargements("real", stage, sampler, real, aug_level=aug_level, seed=seed, mesh=mesh)
    num_real = min(num_samples, len(split))
    about = "real"
    if num_real < num_samples:
        about = f"real ({num_real} images, enlarged {num_samples / num_real:.3g} times each)"
    return dataclasses.replace(source, about=about, notes={"num_real_low_res": num_real})


def of_file(
    stage: Stage,
    sampler: SamplerConfig,
    stored: StoredImages,
    *,
    num_samples: int,
    aug_level: float,
    seed: int,
    mesh: Mesh,
) -> SampleSource:
    """Enlargements of the first `num_samples` images of a file."""
    labels = np.zeros(len(stored), np.int32) if stored.labels is None else stored.labels
    low_res = LabelledImages(
        np.asarray(stored.images[:num_samples]), labels[:num_samples].astype(np.int32)
    )
    name = f"file:{pathlib.Path(stored.path).name}:{stored.digest()}"
    return _enlargements(name, stage, sampler, low_res, aug_level=aug_level, seed=seed, mesh=mesh)


def _enlargements(
    name: str,
    stage: Stage,
    sampler: SamplerConfig,
    low_res: LabelledImages,
    *,
    aug_level: float,
    seed: int,
    mesh: Mesh,
) -> SampleSource:
    sample = generate.make_enlarging_sampler(
        stage,
        np.asarray(float_from_uint8(low_res.images)),
        low_res.labels,
        sampler=sampler,
        seed=seed,
        mesh=mesh,
    )
    level = aug_level if stage.config.has_aug_level else None

    def make(params: Params, indices: np.ndarray) -> Arrays:
        return {
            "images": host_array(sample([params], indices, aug_level=level)[-1]),
            "labels": low_res.labels[indices].astype(np.int64),
            "low_res": low_res.images[indices],
        }

    kind = name.partition(":")[0]
    record = _record(name, sampler, aug_level=level)
    return SampleSource(kind=kind, record=record, make=make, about=kind)


def of_stages(
    below: Sequence[TrainedStage],
    stage: Stage,
    samplers: Sequence[SamplerConfig],
    aug_levels: Sequence[float],
    *,
    truncated: bool,
    kind: str,
    seed: int,
    mesh: Mesh,
) -> SampleSource:
    """A live cascade: the stages below at their chosen checkpoints, this one on top.

    With the kind "samples", what the stages below make is kept and used again for the
    next checkpoint.
    """
    cascade = Cascade(
        stages=[*(t.stage for t in below), stage], samplers=samplers, truncated=truncated
    )
    sample = generate.make_cascade_sampler(
        cascade, aug_levels, seed=seed, mesh=mesh, keep_first_stages=kind == "samples"
    )
    num_classes = stage.config.num_classes
    stops_below = truncated and stage.config.has_aug_level
    names = "; ".join(t.identity for t in below)
    record = _record(
        f"{kind}:{names}",
        samplers[-1],
        aug_level=aug_levels[-1] if stage.config.has_aug_level else None,
        below={
            "samplers": [to_dict(s) for s in samplers[:-1]],
            "aug_levels": list(aug_levels[:-1]),
        },
        truncated=truncated,
    )

    def make(params: Params, indices: np.ndarray) -> Arrays:
        *_, low_res, images = sample([*(t.params for t in below), params], indices)
        arrays = {"images": host_array(images), "labels": _labels(indices, num_classes)}
        # A chain that was stopped leaves noise, with which no image can be compared.
        return arrays if stops_below else {**arrays, "low_res": host_array(low_res)}

    return SampleSource(kind=kind, record=record, make=make, about=kind)


def at_levels(
    stage: Stage,
    sampler: SamplerConfig,
    split: RealSplit,
    *,
    num_images: int,
    seed: int,
    mesh: Mesh,
) -> LevelSource:
    """Enlargements of at least `num_images` real images, with the same noise at every level."""
    num_images = -(-num_images // mesh.size) * mesh.size  # as many for every device
    real = split.spread(num_images, stage.config.low_res_resolution)
    sample = generate.make_enlarging_sampler(
        stage,
        np.asarray(float_from_uint8(real.images)),
        real.labels,
        sampler=sampler,
        seed=seed,
        mesh=mesh,
    )

    def make(params: Params, level: float) -> np.ndarray:
        return host_array(sample([params], np.arange(num_images), aug_level=level)[-1])

    return LevelSource(real.images, make)


def _labels(indices: np.ndarray, num_classes: int) -> np.ndarray:
    return generate.labels_of(indices, num_classes).astype(np.int64)


def fill(store: SampleStore, source: SampleSource, params: Params, *, label: str) -> None:
    """Makes the batches that a store lacks.

    Every batch has the store's size, the last one too: what is too much is thrown away,
    so that only one batch shape is compiled.

    Raises:
      ValueError: a sample is not finite.
    """
    missing = store.missing()
    done = store.num_samples - sum(len(store.rows(batch)) for batch in missing)
    progress = Progress(store.num_samples, unit="samples", label=label, initial=done)
    for batch in missing:
        rows = store.rows(batch)
        padded = np.arange(rows[0], rows[0] + store.batch_size) % store.num_samples
        arrays = source.make(params, padded)
        store.write(batch, {name: array[: len(rows)] for name, array in arrays.items()})
        done += len(rows)
        progress.update(done)
    progress.close()
