"""A trained cascade in memory: images from labels, or from smaller images."""

import dataclasses
import numbers
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.sampler import AnySampler, Sampler
from cascaded_diffusion.commands.jax_setup import set_up_jax
from cascaded_diffusion.commands.run_images import check_same_run_classes
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain
from cascaded_diffusion.config.schema import (
    CascadeConfig,
    CascadeSection,
    RunConfig,
    SamplerConfig,
    StageConfig,
    to_dict,
)
from cascaded_diffusion.config.stage_checks import check_level, check_sampler
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_request import stage_as_cascade
from cascaded_diffusion.evaluation.samples.stored_images import check_labels
from cascaded_diffusion.evaluation.settings import chain_of
from cascaded_diffusion.evaluation.trained import TrainedStage, load_trained
from cascaded_diffusion.library.configs import load_config
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedCascade:
    """Trained stages in order of resolution; `load_cascade` makes it.

    cascade = cd.load_cascade("RUN", "configs/mnist_cascade32.py")
    images = cascade.sample(labels=[3, 7], seed=0)  # uint8 [2, 32, 32, 1]
    """

    # The first is None where a super-resolution stage was loaded alone.
    stages: tuple[TrainedStage | None, ...]
    section: CascadeSection  # how it is sampled, if the call says nothing else
    mesh: Mesh

    def sample(
        self, labels: Sequence[int] | None = None, *, num: int | None = None, **settings: Any
    ) -> np.ndarray:
        """Images uint8 [n, H, W, C] of the last stage.

        `settings` are the other arguments of `sample_stages`, which also raises the errors.
        """
        return self.sample_stages(labels, num=num, **settings)[-1]

    def sample_stages(
        self,
        labels: Sequence[int] | None = None,
        *,
        num: int | None = None,
        seed: int = 0,
        aug_levels: Sequence[float] | None = None,
        truncated: bool | None = None,
        samplers: Sequence[AnySampler] | None = None,
        batch_size: int | None = None,
        low_res: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Images uint8 [n, H, W, C] of every stage that ran, in order of resolution.

        Args:
          labels: a class for each image; by default every class once.
          num: the number of images, for which the labels are taken in turn; by default as many as
            labels.
          seed: of the noise, from 0 to 2^32 - 1; image i is a function of it, i and its label.
          aug_levels: levels of conditioning augmentation, one for each stage above the first.
          truncated: whether a chain stops at the level of the next stage.
          samplers: one for each stage: of the config, or a `Sampler` of one's own.
          batch_size: images at a time.
          low_res: images uint8 [n, h, w, C]; only the stages above that size run.

        Raises UserError if a value cannot be, or the numbers of values do not fit.
        """
        first = 0 if low_res is None else self._first_above(low_res)
        if self.stages[first] is None:
            raise UserError("this stage enlarges images: give them, by `enlarge`")
        labels, num = self._labels(labels, num, low_res)
        levels = self.section.aug_levels if aug_levels is None else aug_levels
        samplers = self.section.samplers if samplers is None else samplers
        check_integer("seed", seed, 0, 2**32 - 1)
        size = self.section.batch_size if batch_size is None else batch_size
        check_integer("batch_size", size, 1, 2**20)
        levels, samplers = self._checked(levels, samplers)
        sample = generate.make_cascade_sampler(
            Cascade(
                stages=[None if t is None else t.stage for t in self.stages],
                samplers=samplers,
                truncated=self.section.truncated if truncated is None else truncated,
            ),
            levels,
            seed=seed,
            mesh=self.mesh,
            labels=labels,
            below=low_res,
            first=first,
        )
        size = min(size, num)
        return generate.generate(
            sample,
            [None if t is None else t.params for t in self.stages],
            num_samples=num,
            batch_size=-(-size // self.mesh.size) * self.mesh.size,
            label="samples",
        )

    def enlarge(
        self,
        images: np.ndarray,
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        aug_levels: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Enlargements uint8 [n, H, W, C] of images uint8 [n, h, w, C], by the stages above.

        With classes, each image has its label. The images are noised at the level of the first
        stage that runs. Raises UserError if no stage enlarges images of that size.

            large = cascade.enlarge(small, labels=[3] * len(small))
        """
        images = np.asarray(images)
        found = self.sample_stages(labels, seed=seed, aug_levels=aug_levels, low_res=images)
        return found[-1]

    def _checked(
        self, levels: Sequence[float], samplers: Sequence[AnySampler]
    ) -> tuple[tuple[float, ...], tuple[AnySampler, ...]]:
        number = len(self.stages)
        if not isinstance(samplers, list | tuple) or not isinstance(levels, list | tuple):
            raise UserError("aug_levels, samplers: expected a list of each")
        for name, given, wanted in (
            ("aug_levels", levels, number - 1),
            ("samplers", samplers, number),
        ):
            if len(given) != wanted:
                raise UserError(f"{name}: expected {wanted}, got {len(given)}")
        for level, trained in zip(levels, self.stages[1:], strict=True):
            if not isinstance(level, numbers.Real) or not 0 <= level <= 1:
                raise UserError(f"aug_levels = {levels}: expected levels from 0 to 1")
            check_level("cascade.aug_levels", level, trained.stage.config)
        for i, (sampler, trained) in enumerate(zip(samplers, self.stages, strict=True)):
            if not isinstance(sampler, AnySampler):
                raise UserError(f"samplers[{i}] = {sampler!r}: expected a SamplerConfig or Sampler")
            if trained is not None:
                check_any_sampler(f"cascade.samplers[{i}]", sampler, trained.stage.config)
        return tuple(map(float, levels)), tuple(samplers)

    def _first_above(self, images: np.ndarray) -> int:
        sizes = [None if t is None else t.stage.config.low_res_resolution for t in self.stages]
        channels = self.stages[-1].stage.config.channels
        images = np.asarray(images)
        fits = images.ndim == 4 and images.dtype == np.uint8 and images.shape[1] == images.shape[2]
        if not fits or images.shape[3] != channels or images.shape[1] not in sizes:
            known = ", ".join(f"{size} px" for size in sizes if size) or "none"
            raise UserError(
                f"images are {images.dtype} {images.shape}: expected uint8 (n, h, h, {channels})"
                f" of a size that a stage enlarges: {known}"
            )
        return sizes.index(images.shape[1])

    def _labels(
        self, labels: Sequence[int] | None, num: int | None, low_res: np.ndarray | None
    ) -> tuple[np.ndarray | None, int]:
        num_classes = self.stages[-1].stage.config.num_classes
        if labels is not None:
            if not num_classes:
                raise UserError("labels: the cascade was trained without classes")
            labels = np.asarray(labels)
            if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
                raise UserError(
                    f"labels: {labels.dtype} {labels.shape}: expected a list of classes"
                )
            check_labels(labels, num_classes, "labels")
        if low_res is not None:
            given = 0 if labels is None else len(labels)
            if num_classes and given != len(low_res):
                raise UserError(f"labels: {given} for {len(low_res)} images: expected one for each")
            return labels, len(low_res)
        count = num
        if count is None:
            count = num_classes if labels is None else len(labels)
        check_integer("num", count, 1, 10**8)
        if labels is not None and len(labels) > count:
            raise UserError(
                f"labels: {len(labels)} for num = {count} images: expected at most so many"
            )
        return labels, count


def check_integer(name: str, value: object, least: int, most: int) -> None:
    """Raises UserError unless a value is an integer of a range."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or not least <= value <= most:
        raise UserError(f"{name} = {value!r}: expected an integer from {least} to {most}")


def check_any_sampler(key: str, sampler: AnySampler, stage: StageConfig) -> None:
    """Raises UserError if a sampler, the config's or one's own, cannot sample a stage."""
    if isinstance(sampler, Sampler):
        # What they have in common is checked as that of a config's.
        common = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Sampler)}
        del common["step"]
        plain = dict(variance=None, variance_interpolation=None, eta=None, churn=None)
        sampler = SamplerConfig(name="heun", **plain, **common)
    check_sampler(key, sampler, stage)


def load_cascade(
    workdir: str | os.PathLike[str],
    config: CascadeConfig | str | os.PathLike[str] | None = None,
    *,
    mesh: Mesh | None = None,
) -> TrainedCascade:
    """The trained stages of a cascade, at the checkpoints that evaluation chose.

    Args:
      workdir: the folder of the stages' runs, or one run.
      config: the cascade's config or its file; by default the one that a sweep wrote to the folder,
        or else the runs there in order of resolution, each sampled as its own config says.
      mesh: the devices to use; by default all of this process.

    JAX is set up as the binaries do. Where evaluation has chosen no checkpoint yet, the newest one
    is taken, which is printed. Raises UserError if a run is missing or runs do not chain.

        cascade = cd.load_cascade("RUN", "configs/mnist_cascade32.py")
    """
    set_up_jax()
    alone, runs = RunFolder(workdir), CascadeFolder(workdir)
    if config is not None and not isinstance(config, CascadeConfig | RunConfig):
        config = load_config(config)
    if isinstance(config, RunConfig):
        raise UserError("config: the config of a stage, expected a cascade's")
    if config is None and alone.exists():
        run = alone.read_config()
        config = cascade_config_from(stage_as_cascade(run))
        folders = [alone] if run.stage.kind == "base" else [None, alone]
    else:
        if config is None:
            config = _cascade_in(runs)
        folders = list(runs.stage_folders(config.cascade))
        check_chain(config.cascade, [f.read_config().stage for f in folders])
        check_same_run_classes(folders)
    mesh = mesh_lib.build_mesh(config.mesh, jax.local_devices()) if mesh is None else mesh
    trained = tuple(
        None if folder is None else load_trained(folder, mesh, newest_if_none_chosen=True)
        for folder in folders
    )
    return TrainedCascade(stages=trained, section=config.cascade, mesh=mesh)


def _cascade_in(runs: CascadeFolder) -> CascadeConfig:
    """The cascade that a sweep wrote, or that the runs in a folder make by themselves."""
    if runs.cascade_path.exists():
        return cascade_config_from(runs.read_cascade())
    folders = runs.runs()
    if not folders:
        raise UserError(f"{runs.path}: no runs there, nor a cascade.json; expected trained stages")
    section = to_dict(chain_of([folder.read_config() for folder in folders]))
    section["stages"] = [folder.path.name for folder in folders]
    return cascade_config_from({"cascade": section, "mesh": {"data": -1, "fsdp": 1}})
