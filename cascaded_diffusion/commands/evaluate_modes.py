"""The modes of `evaluate`: each checks its flags, sets up JAX and calls one function."""

from collections.abc import Sequence

from absl import flags

import cascaded_diffusion as library
from cascaded_diffusion.commands import jax_setup
from cascaded_diffusion.commands.config_flags import cascade_config
from cascaded_diffusion.commands.evaluate_flags import SWEEP_FLAGS
from cascaded_diffusion.commands.evaluate_samples import (
    cas_mode,
    files_mode,
    open_evaluation,
    print_record,
    samples_mode,
)
from cascaded_diffusion.commands.flag_checks import numbers_in, require
from cascaded_diffusion.commands.overrides import refuse_overrides
from cascaded_diffusion.commands.run_images import check_same_run_classes, open_splits, real_split
from cascaded_diffusion.config.run_checks import check_chain
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages
from cascaded_diffusion.evaluation.settings import (
    bound_chain,
    checked_settings,
    final_count,
    open_low_res_samples,
    open_runs_below,
)
from cascaded_diffusion.files.paths import check_writable
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder


def run_mode(fv: flags.FlagValues, argv: Sequence[str], mode: str) -> int:
    """Runs a mode. Returns the exit code; raises UserError for bad input."""
    if mode == "samples" and fv.workdir is None:
        if fv.data_path is not None:
            raise UserError("--data_path: only with --workdir, for the images of a run")
        return files_mode(fv)
    if fv.reference is not None or fv.resize is not None:
        raise UserError(
            "--reference, --resize: only without --workdir, which has its own; leave one out"
        )
    require(fv, "workdir")
    if mode in ("sweep", "final"):
        return {"sweep": _sweep, "final": _final}[mode](fv, argv)
    folder = RunFolder(fv.workdir)
    config = folder.read_config()
    folder.check_writable()
    modes = {
        "bits_per_dim": _bits_per_dim,
        "cas": cas_mode,
        "samples": samples_mode,
        "checkpoints": _checkpoints,
    }
    return modes[mode](fv, folder, config)


def _below(
    fv: flags.FlagValues, config: RunConfig, num_samples: int
) -> tuple[list[RunFolder], StoredImages | None]:
    """The runs of --low_res_run and the images of --low_res_samples."""
    below, stored = open_runs_below(fv.low_res_run, config), None
    if fv.low_res_samples is not None:
        stored = open_low_res_samples(fv.low_res_samples, config.stage, num_samples)
    return below, stored


def _check_trained(folders: Sequence[RunFolder]) -> None:
    """Raises UserError unless runs have chosen checkpoints and the same classes."""
    check_same_run_classes(folders)
    for folder in folders:
        folder.chosen()


def _checkpoints(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    count = config.eval.num_samples
    below, stored = _below(fv, config, count)
    check_same_run_classes([*below, folder])
    if not fv.follow and not folder.has_checkpoints():
        raise UserError(
            f"--workdir={fv.workdir}: no checkpoint there; train first, or add --follow to wait for"
            " checkpoints"
        )
    evaluation = open_evaluation(fv, folder, config, count)
    library.score_checkpoints(
        folder, evaluation, below=below, low_res_samples=stored, follow=fv.follow
    )
    return 0


def _bits_per_dim(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    require(fv, "bits_per_dim")
    folder.chosen()
    num_steps, *more = numbers_in(fv, "num_steps", int) or [None]
    if more or (num_steps is not None and num_steps < 1):
        raise UserError(f"--num_steps={','.join(fv.num_steps)}: expected one number of steps")
    bound_chain(config.stage, num_steps)
    jax_setup.set_up_jax()
    name = fv.bits_per_dim
    splits = [name, config.data.train_split]
    try:
        sources = open_splits(folder, config, splits, data_path=fv.data_path)
    except UserError as e:
        raise UserError(f"--bits_per_dim={name}: {e}") from e
    split = real_split(config, name, sources[name])
    record = library.bits_per_dim(folder, split, num_images=fv.num_images, num_steps=num_steps)
    return print_record(record)


def _final(fv: flags.FlagValues, argv: Sequence[str]) -> int:
    cascade: CascadeConfig | None = None
    folder, stored = RunFolder(fv.workdir), None
    if fv.config is not None or not folder.exists():
        runs = CascadeFolder(fv.workdir)
        if fv.config is None and not runs.cascade_path.exists():
            folder.read_config()  # says that there is no run
        cascade = cascade_config(fv, argv, runs)
        folders = runs.stage_folders(cascade.cascade)
        configs = [run.read_config() for run in folders]
        check_chain(cascade.cascade, [c.stage for c in configs])
        for name in ("low_res_run", "low_res_samples"):
            if fv[name].value:
                raise UserError(f"--{name}: not with a cascade, which makes its own; leave it out")
        *below, folder = folders
        config = configs[-1]
    else:
        refuse_overrides(
            argv,
            "a run is measured by its own config, which a call of `main` with this override"
            " changes where that is allowed",
        )
        config = folder.read_config()
    section = None if cascade is None else cascade.cascade
    count = fv.num_samples or final_count(config, section)
    if cascade is None:
        below, stored = _below(fv, config, count)
        if below and stored is not None:
            raise UserError(
                "--low_res_run, --low_res_samples: one of them at a time with `evaluate final`"
            )
    _check_trained([*below, folder])
    folder.check_writable()
    evaluation = open_evaluation(fv, folder, config, count)
    record = library.final_numbers(
        folder, evaluation, cascade=cascade, below=below, low_res_samples=stored, num_samples=count
    )
    if not record:  # of a process that has helped another
        return 0
    return print_record({"stage": record["stage"], **record["metrics"]})


def _sweep(fv: flags.FlagValues, argv: Sequence[str]) -> int:
    runs = CascadeFolder(fv.workdir)
    config = cascade_config(fv, argv, runs)
    section = config.cascade
    name = fv.stage or section.stages[-1]
    if name not in section.stages:
        known = ", ".join(section.stages)
        raise UserError(f"--stage={name}: expected one of config.cascade.stages, {known}")
    index = section.stages.index(name)
    all_folders = runs.stage_folders(section)
    folders = all_folders[: index + 1]
    configs = [folder.read_config() for folder in (all_folders if fv.write_best else folders)]
    kinds = {"aug_levels": float, "num_steps": int, "guidance_scales": float}
    choices = {flag: fv[flag].value for flag in SWEEP_FLAGS}
    choices |= {flag: numbers_in(fv, flag, kind) for flag, kind in kinds.items()}
    words = [text.lower() for text in fv.truncated]
    if not set(words) <= {"true", "false"}:
        given = ",".join(fv.truncated)
        raise UserError(f"--truncated={given}: expected true, false, or both between commas")
    choices["truncated"] = [word == "true" for word in words]
    settings = checked_settings(config, index, [c.stage for c in configs], **choices)
    _check_trained(folders)
    check_writable(runs.path, "workdir")
    evaluation = open_evaluation(fv, folders[-1], configs[index], section.num_samples)
    library.sweep_settings(
        runs, config, evaluation, settings, index=index, write_best=fv.write_best
    )
    return 0
