"""The origin of the samples under evaluation: a stage alone, or one fed with low-res images.

A super-resolution stage enlarges the low-res versions of real images, the images of a file (the
stored samples of the stage below it), or what the stages below it make at that moment. Every
record says which.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.pixels import area_downsample, float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import CascadeSection, SamplerConfig, to_dict
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages
from cascaded_diffusion.evaluation.trained import TrainedStage, load_trained
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.runtime.mesh import host_array
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params

# (the stage's parameters, global sample indices [b]) -> the arrays of a batch.
Maker = Callable[[Params, np.ndarray], generate.Arrays]
_CHUNK = 500  # images that are shrunk at a time


@dataclasses.dataclass(frozen=True)
class RealSplit:
    """A split of a data set."""

    data: str  # the data set's name
    split: str  # the split's name
    size: int  # the number of its images
    # Indices -> `image` uint8 [n, H, W, C], `label` int32 [n] and, where low-res images are
    # stored, `low_res` uint8 [n, h, w, C].
    read: Callable[[Sequence[int]], Mapping[str, np.ndarray]]
    crop: str = "none"  # how the images became square, for fingerprints
    resize: str = "area"  # how they get to a stage's resolution, for fingerprints

    def __len__(self) -> int:
        return self.size

    def rows(self, rows: Sequence[int], resolution: int) -> LabelledImages:
        """Chosen images at a resolution."""
        return _joined(self.chunks(resolution, rows))

    def whole(self, resolution: int) -> LabelledImages:
        """All images at a resolution, in memory."""
        return self.rows(range(self.size), resolution)

    def chunks(
        self, resolution: int, rows: Sequence[int] | None = None
    ) -> Iterator[LabelledImages]:
        """All images, or chosen ones, at a resolution, in order."""
        rows = range(self.size) if rows is None else rows
        for i in range(0, len(rows), _CHUNK):
            yield shrunk(self.raw(rows[i : i + _CHUNK]), resolution)

    def low_res(self, rows: Sequence[int], resolution: int) -> LabelledImages:
        """A stage's low-res input for chosen images, as in training: stored, or shrunk."""

        def part(rows: Sequence[int]) -> LabelledImages:
            examples = self.read(rows)
            if "low_res" in examples:
                return LabelledImages(examples["low_res"], examples["label"])
            return shrunk(LabelledImages(examples["image"], examples["label"]), resolution)

        return _joined(part(rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK))

    def spread_low_res(self, count: int, resolution: int) -> LabelledImages:
        """The low-res input for images spread over the split, often sorted by class.

        Of fewer than `count` images, all are taken in turn.
        """
        rows = np.arange(count)
        rows = rows % self.size if count > self.size else rows * self.size // count
        return self.low_res(rows, resolution)

    def raw(self, rows: Sequence[int]) -> LabelledImages:
        """Chosen images at the data set's resolution."""
        examples = self.read(rows)
        return LabelledImages(examples["image"], examples["label"])


def _joined(parts: Iterable[LabelledImages]) -> LabelledImages:
    arrays = zip(*((part.images, part.labels) for part in parts), strict=True)
    return LabelledImages(*map(np.concatenate, arrays))


def shrunk(data: LabelledImages, resolution: int) -> LabelledImages:
    """Data shrunk by the cascade's own area operator and rounded by its own rule."""
    images = uint8_from_float(area_downsample(float_from_uint8(data.images), resolution))
    return LabelledImages(np.asarray(images), data.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSource:
    """A way to make samples of one stage."""

    # Everything that the samples depend on besides the stage's parameters and the seed.
    record: Record
    make: Maker
    about: str  # for people
    notes: dict[str, int] = dataclasses.field(default_factory=dict)  # for records, not compared

    @property
    def kind(self) -> str:
        """Part of file names: "none" (a base model), "real", "file", "samples" or "cascade"."""
        return self.record["low_res"].partition(":")[0]


@dataclasses.dataclass(frozen=True)
class LevelSource:
    """Enlargements of the same few images at any level of conditioning augmentation."""

    low_res: np.ndarray  # uint8 [n, h, w, C]
    make: Callable[[Params, float], np.ndarray]  # (parameters, level) -> uint8 [n, H, W, C]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSampling:
    """How a stage is sampled for its evaluation, whatever it enlarges."""

    stage: Stage
    sampler: SamplerConfig
    aug_level: float  # of the low-res input, if the stage has a level
    num_samples: int
    seed: int  # of the samples' noise
    mesh: Mesh

    def alone(self, split: RealSplit) -> SampleSource:
        """Samples of a base model, or enlargements of real images spread over a split.

        Of too few images, each is enlarged several times with other noise, as `about` says.
        """
        if self.stage.config.kind == "base":
            return self.of_stages([], [self.sampler], [], truncated=False, kind="none")
        real = split.spread_low_res(self.num_samples, self.stage.config.low_res_resolution)
        num_real, about = min(self.num_samples, len(split)), "real"
        if num_real < self.num_samples:
            times = self.num_samples / num_real
            about = f"real ({num_real} images, enlarged {times:.3g} times each)"
        images = StoredImages(f"{split.data}:{split.split}", real.images, real.labels)
        which = {"low_res_images": f"{images.path}:{images.digest()}"}
        source = self._enlargements("real", real)
        return dataclasses.replace(
            source,
            record={**source.record, **which},
            about=about,
            notes={"num_real_low_res": num_real},
        )

    def of_file(self, stored: StoredImages) -> SampleSource:
        """Enlargements of the first `num_samples` images of a file."""
        labels = np.zeros(len(stored)) if stored.labels is None else stored.labels
        first = slice(self.num_samples)
        low_res = LabelledImages(np.asarray(stored.images[first]), labels[first].astype(np.int32))
        name = f"file:{path_of(stored.path).name}:{stored.digest()}"
        return self._enlargements(name, low_res)

    def of_runs(
        self, folders: Sequence[RunFolder], cascade: CascadeSection | None = None
    ) -> SampleSource:
        """A live cascade with the runs of the stages below, in order.

        `cascade` says how the whole chain is sampled, "cascade". Without it every stage is sampled
        as it is scored itself, with its own sampler and level: "samples".
        """
        below = [load_trained(folder, self.mesh) for folder in folders]
        if cascade is not None:
            samplers, levels, truncated = cascade.samplers, cascade.aug_levels, cascade.truncated
            return self.of_stages(below, samplers, levels, truncated=truncated, kind="cascade")
        samplers = [*(t.stage.config.sampler for t in below), self.sampler]
        levels = [*(f.read_config().eval.aug_level for f in folders[1:]), self.aug_level]
        return self.of_stages(below, samplers, levels, truncated=False, kind="samples")

    def of_stages(
        self,
        below: Sequence[TrainedStage],
        samplers: Sequence[SamplerConfig],
        aug_levels: Sequence[float],
        *,
        truncated: bool,
        kind: str,
    ) -> SampleSource:
        """A live cascade: the stages below at their chosen checkpoints, this one on top.

        There is a sampler per stage and a level per enlargement. With the kind "samples", the
        images of the stages below are kept for the next checkpoint.
        """
        stages = [*(t.stage for t in below), self.stage]
        sample = generate.make_cascade_sampler(
            Cascade(stages=stages, samplers=samplers, truncated=truncated),
            aug_levels,
            seed=self.seed,
            mesh=self.mesh,
            keep_first_stages=kind == "samples",
        )

        def make(params: Params, indices: np.ndarray) -> generate.Arrays:
            *lower, images = sample([*(t.params for t in below), params], indices)
            labels = generate.labels_of(indices, self.stage.config.num_classes)
            arrays = {"images": host_array(images), "labels": labels.astype(np.int64)}
            # A chain that was stopped early leaves noise, which no image can be compared with.
            if lower and not (truncated and self.stage.config.has_aug_level):
                arrays["low_res"] = host_array(lower[-1])
            return arrays

        if not below:
            return self._source(kind, make, None)
        name = f"{kind}:{'; '.join(t.identity for t in below)}"
        lower_samplers = [to_dict(s) for s in samplers[:-1]]
        how_below = {"samplers": lower_samplers, "aug_levels": list(aug_levels[:-1])}
        of_cascade = {"low_res_sampler": how_below, "truncated": truncated}
        return self._source(name, make, aug_levels[-1], **of_cascade)

    def at_levels(self, split: RealSplit, *, num_images: int) -> LevelSource:
        """Enlargements of at least `num_images` real images, with the same noise at every level."""
        num_images = -(-num_images // self.mesh.size) * self.mesh.size  # as many for every device
        real = split.spread_low_res(num_images, self.stage.config.low_res_resolution)
        enlarge, rows = self._enlarger(real), np.arange(num_images)
        return LevelSource(
            real.images, lambda params, level: host_array(enlarge(params, rows, level))
        )

    def _enlarger(self, low_res: LabelledImages) -> generate.Enlarger:
        return generate.make_enlarger(
            self.stage, low_res, sampler=self.sampler, seed=self.seed, mesh=self.mesh
        )

    def _enlargements(self, name: str, low_res: LabelledImages) -> SampleSource:
        enlarge = self._enlarger(low_res)

        def make(params: Params, indices: np.ndarray) -> generate.Arrays:
            return {
                "images": host_array(enlarge(params, indices, self.aug_level)),
                "labels": low_res.labels[indices].astype(np.int64),
                "low_res": low_res.images[indices],
            }

        return self._source(name, make, self.aug_level)

    def _source(
        self, low_res: str, make: Maker, aug_level: float | None, **of_cascade: object
    ) -> SampleSource:
        record = {
            "low_res": low_res,
            "low_res_sampler": None,
            "aug_level": aug_level if self.stage.config.has_aug_level else None,
            "truncated": False,
            "sampler": to_dict(self.sampler),
            **of_cascade,
        }
        return SampleSource(record=record, make=make, about=low_res.partition(":")[0])
