"""The origin of the samples under evaluation: a stage alone, or one fed with low-res images.

A super-resolution stage enlarges the low-res versions of real images, the images of a file (the
stored samples of the stage below it), or what the stages below it make at that moment. Every
record says which.
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
from cascaded_diffusion.config.schema import CascadeSection, RunConfig, SamplerConfig, to_dict
from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.real_images import RealSplit
from cascaded_diffusion.evaluation.samples.sample_store import Arrays
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages
from cascaded_diffusion.evaluation.trained import TrainedStage, load_trained
from cascaded_diffusion.runtime.mesh import host_array
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSource:
    """A way to make samples of one stage.

    Attributes:
      kind: "none" (a base model), "real", "file", "samples" (the stages below, each with its own
        sampler) or "cascade" (as a cascade's config says); part of file names.
      record: everything that the samples depend on besides the stage's parameters and the seed.
      make: (the stage's parameters, global sample indices [b]) -> the arrays of a batch.
      about: a description for people.
      notes: further fields of a record, which are not compared.
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


def run_source(
    config: RunConfig,
    stage: Stage,
    sampler: SamplerConfig,
    *,
    held_out: RealSplit,
    num_samples: int,
    seed: int,
    mesh: Mesh,
    below: Sequence[RunFolder] = (),
    low_res: StoredImages | None = None,
    cascade: CascadeSection | None = None,
) -> SampleSource:
    """The source of a run's samples: the most specific one that the arguments describe.

    Args:
      config: the run's.
      stage: the run's.
      sampler: of the stage.
      held_out: real images, whose low-res versions are enlarged if nothing else is given.
      num_samples: how many samples there will be.
      seed: of the samples' noise.
      mesh: the device mesh.
      below: the runs of the stages below. Without a `cascade` they are sampled as they are scored
        themselves: with their own samplers and levels.
      low_res: stored images to enlarge.
      cascade: how the whole chain is sampled.
    """
    how = dict(seed=seed, mesh=mesh)
    if below:
        trained = [load_trained(folder, mesh) for folder in below]
        if cascade is not None:
            samplers, levels = cascade.samplers, cascade.aug_levels
            how |= dict(truncated=cascade.truncated, kind="cascade")
        else:
            configs = [folder.read_config() for folder in below]
            samplers = [*(c.stage.sampler for c in configs), sampler]
            levels = [*(c.eval.aug_level for c in configs[1:]), config.eval.aug_level]
            how |= dict(truncated=False, kind="samples")
        return of_stages(trained, stage, samplers, levels, **how)
    if config.stage.kind == "base":
        return of_base(stage, sampler, **how)
    how |= dict(num_samples=num_samples, aug_level=config.eval.aug_level)
    if low_res is not None:
        return of_file(stage, sampler, low_res, **how)
    return of_real_images(stage, sampler, held_out, **how)


def _record(
    low_res: str,
    sampler: SamplerConfig,
    *,
    aug_level: float | None,
    below: dict[str, Any] | None = None,
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

    def make(params: Params, indices: np.ndarray) -> Arrays:
        (images,) = sample([params], indices)
        return {"images": host_array(images), "labels": _labels(indices, stage)}

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

    If the split has fewer images, each is enlarged several times with other noise, and `about`
    and `notes` say so.
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
    sample = _enlarger(stage, sampler, low_res, seed=seed, mesh=mesh)
    level = aug_level if stage.config.has_aug_level else None

    def make(params: Params, indices: np.ndarray) -> Arrays:
        return {
            "images": sample(params, indices, level),
            "labels": low_res.labels[indices].astype(np.int64),
            "low_res": low_res.images[indices],
        }

    kind = name.partition(":")[0]
    record = _record(name, sampler, aug_level=level)
    return SampleSource(kind=kind, record=record, make=make, about=kind)


def _enlarger(
    stage: Stage, sampler: SamplerConfig, low_res: LabelledImages, *, seed: int, mesh: Mesh
) -> Callable[[Params, np.ndarray, float | None], np.ndarray]:
    images = np.asarray(float_from_uint8(low_res.images))
    sample = generate.make_enlarging_sampler(
        stage, images, low_res.labels, sampler=sampler, seed=seed, mesh=mesh
    )
    return lambda params, indices, level: host_array(sample([params], indices, aug_level=level)[-1])


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

    With the kind "samples", the images of the stages below are kept for the next checkpoint.
    """
    cascade = Cascade(
        stages=[*(t.stage for t in below), stage], samplers=samplers, truncated=truncated
    )
    sample = generate.make_cascade_sampler(
        cascade, aug_levels, seed=seed, mesh=mesh, keep_first_stages=kind == "samples"
    )
    has_level = stage.config.has_aug_level
    record = _record(
        f"{kind}:{'; '.join(t.identity for t in below)}",
        samplers[-1],
        aug_level=aug_levels[-1] if has_level else None,
        below={
            "samplers": [to_dict(s) for s in samplers[:-1]],
            "aug_levels": list(aug_levels[:-1]),
        },
        truncated=truncated,
    )

    def make(params: Params, indices: np.ndarray) -> Arrays:
        *_, low_res, images = sample([*(t.params for t in below), params], indices)
        arrays = {"images": host_array(images), "labels": _labels(indices, stage)}
        # A chain that was stopped early leaves noise, which no image can be compared with.
        return arrays if truncated and has_level else {**arrays, "low_res": host_array(low_res)}

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
    sample = _enlarger(stage, sampler, real, seed=seed, mesh=mesh)
    rows = np.arange(num_images)
    return LevelSource(real.images, lambda params, level: sample(params, rows, level))


def _labels(indices: np.ndarray, stage: Stage) -> np.ndarray:
    return generate.labels_of(indices, stage.config.num_classes).astype(np.int64)
