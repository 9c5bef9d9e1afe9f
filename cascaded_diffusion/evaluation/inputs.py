"""The checked inputs of an evaluation. Nothing here needs JAX, so mistakes are named at once."""

from __future__ import annotations

from collections.abc import Sequence

from cascaded_diffusion.config.run_checks import check_chain
from cascaded_diffusion.config.schema import CascadeSection, RunConfig, StageConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import (
    StoredImages,
    check_images,
    open_images,
)
from cascaded_diffusion.runtime.run_folder import RunFolder


def open_runs_below(paths: Sequence[str], config: RunConfig) -> list[RunFolder]:
    """The runs of the stages below one that is evaluated, in order.

    Raises:
      UserError: a run is missing or has no chosen checkpoint, or the stages are no chain.
    """
    folders = [RunFolder(path, flag="low_res_run") for path in paths]
    if not folders:
        return []
    given = f"--low_res_run={','.join(paths)}"
    configs = [folder.read_config() for folder in folders]
    if config.stage.kind != "super_resolution":
        raise UserError(
            f"{given}: only for super-resolution stages; the run to score,"
            f" {config.stage.name!r}, is a base model"
        )
    stages = [*(c.stage for c in configs), config.stage]
    chain = CascadeSection(
        stages=tuple(s.name for s in stages),
        configs=("",) * len(stages),
        aug_levels=(*(c.eval.aug_level for c in configs[1:]), config.eval.aug_level),
        truncated=False,
        samplers=tuple(s.sampler for s in stages),
        num_samples=config.eval.num_samples,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
    )
    try:
        check_chain(chain, stages)
    except UserError as e:
        raise UserError(f"{given}: {e}") from e
    for folder in folders:
        folder.chosen()
    return folders


def open_low_res_samples(path: str, stage: StageConfig, num_samples: int) -> StoredImages:
    """Stored images for a stage to enlarge.

    Raises:
      UserError: they cannot be read, are of another size or kind, or fewer than `num_samples`; or
        the stage enlarges nothing.
    """
    given = f"--low_res_samples={path}"
    if stage.kind != "super_resolution":
        raise UserError(f"{given}: {stage.name!r} is a base model, without a low-res input")
    stored = open_images(path, flag="low_res_samples")
    size = stage.low_res_resolution
    check_images(stored, stage, size, f"{stage.name!r} enlarges", flag="low_res_samples")
    if len(stored) < num_samples:
        raise UserError(
            f"{given}: {len(stored)} images, expected the {num_samples} that are asked for"
        )
    return stored
