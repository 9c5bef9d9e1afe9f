"""A trained cascade in memory: images from labels, or from smaller images."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.sampler import AnySampler
from cascaded_diffusion.commands.jax_setup import set_up_jax
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain
from cascaded_diffusion.config.schema import CascadeConfig, CascadeSection
from cascaded_diffusion.config.stage_checks import check_level
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_request import stage_as_cascade
from cascaded_diffusion.evaluation.samples.stored_images import check_labels
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
        self,
        labels: Sequence[int] | None = None,
        *,
        num: int | None = None,
        seed: int = 0,
        aug_levels: Sequence[float] | None = None,
        truncated: bool | None = None,
        samplers: Sequence[AnySampler] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Images uint8 [n, H, W, C] of the last stage.

        Args:
          labels: a class for each image; by default every class in turn.
          num: the number of images; by default as many as labels.
          seed: of the noise; image i is a function of the seed, i and its label.
          aug_levels: levels of conditioning augmentation, one for each stage above the first.
          truncated: whether a chain stops at the level of the next stage.
          samplers: one for each stage: of the config, or a `Sampler` of one's own.
          batch_size: images at a time.

        Raises UserError if a label, a level or their number cannot be.
        """
        return self.sample_stages(
            labels,
            num=num,
            seed=seed,
            aug_levels=aug_levels,
            truncated=truncated,
            samplers=samplers,
            batch_size=batch_size,
        )[-1]

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
        """Like `sample`, but the images of every stage that ran, in order of resolution.

        With `low_res`, uint8 [n, h, w, C], only the stages above that size run.
        """
        first = 0 if low_res is None else self._first_above(low_res)
        if self.stages[first] is None:
            raise UserError("this stage enlarges images: give them, by `enlarge`")
        labels, num = self._labels(labels, len(low_res) if low_res is not None else num)
        levels = tuple(self.section.aug_levels if aug_levels is None else aug_levels)
        samplers = self.section.samplers if samplers is None else samplers
        number = len(self.stages)
        for name, given, wanted in (
            ("aug_levels", levels, number - 1),
            ("samplers", samplers, number),
        ):
            if len(given) != wanted:
                raise UserError(f"{name}: expected {wanted}, got {len(given)}")
        for level, trained in zip(levels, self.stages[1:], strict=True):
            if not 0 <= level <= 1:
                raise UserError(f"aug_levels = {levels}: expected levels from 0 to 1")
            check_level("cascade.aug_levels", level, trained.stage.config)
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
        size = min(batch_size or self.section.batch_size, num)
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

        The images are noised at the level of the first stage that runs. Raises UserError if no
        stage enlarges images of that size.

            large = cascade.enlarge(small, labels=[3] * len(small))
        """
        images = np.asarray(images)
        found = self.sample_stages(labels, seed=seed, aug_levels=aug_levels, low_res=images)
        return found[-1]

    def _first_above(self, images: np.ndarray) -> int:
        sizes = [None if t is None else t.stage.config.low_res_resolution for t in self.stages]
        fits = images.ndim == 4 and images.dtype == np.uint8 and images.shape[1] == images.shape[2]
        if not fits or images.shape[1] not in sizes:
            known = ", ".join(f"{size} px" for size in sizes if size) or "none"
            raise UserError(
                f"images are {images.dtype} {images.shape}: expected uint8 (n, h, h, C) of a size"
                f" that a stage enlarges: {known}"
            )
        return sizes.index(images.shape[1])

    def _labels(
        self, labels: Sequence[int] | None, num: int | None
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
        count = num
        if count is None:
            count = num_classes if labels is None else len(labels)
        if count < 1:
            raise UserError(f"num = {num}: expected the number of images, at least 1")
        return labels, count


def load_cascade(
    workdir: str | os.PathLike[str],
    config: CascadeConfig | str | os.PathLike[str] | None = None,
    *,
    mesh: Mesh | None = None,
) -> TrainedCascade:
    """The trained stages of a cascade, at the checkpoints that evaluation chose.

    Args:
      workdir: the folder of the stages' runs, or one run.
      config: the cascade's config or its file; by default the one that a sweep wrote to the folder.
      mesh: the devices to use; by default all of this process.

    JAX is set up as the binaries do. Where evaluation has chosen no checkpoint yet, the newest one
    is taken, which is printed. Raises UserError if a run is missing or runs do not chain.

        cascade = cd.load_cascade("RUN", "configs/mnist_cascade32.py")
    """
    set_up_jax()
    alone = RunFolder(workdir)
    if config is None and alone.exists():
        run = alone.read_config()
        config = cascade_config_from(stage_as_cascade(run))
        folders = [alone] if run.stage.kind == "base" else [None, alone]
    else:
        runs = CascadeFolder(workdir)
        if config is None:
            config = cascade_config_from(runs.read_cascade())
        elif not isinstance(config, CascadeConfig):
            config = load_config(config)
        if not isinstance(config, CascadeConfig):
            raise UserError("config: the config of a stage, expected a cascade's")
        folders = list(runs.stage_folders(config.cascade))
        check_chain(config.cascade, [f.read_config().stage for f in folders])
    mesh = mesh_lib.build_mesh(config.mesh, jax.local_devices()) if mesh is None else mesh
    trained = tuple(
        None if folder is None else load_trained(folder, mesh, newest_if_none_chosen=True)
        for folder in folders
    )
    return TrainedCascade(stages=trained, section=config.cascade, mesh=mesh)
