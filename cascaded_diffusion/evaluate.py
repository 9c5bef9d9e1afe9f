"""Scores a run's checkpoints and picks the best; or scores a stored set of samples.

    python -m cascaded_diffusion.evaluate --workdir=RUN/base16
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --low_res_run=RUN/base16
    python -m cascaded_diffusion.evaluate --workdir=RUN/sr32 --samples=RUN/samples/samples.npz

A process of its own, beside the trainer or after it. It reads the run folder and
writes RUN/eval/results.jsonl, RUN/eval/best.json, sample grids, and RUN/EARLY_STOP
when scores have stopped to improve. What is scored already is not scored again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion import cli
from cascaded_diffusion.config import CascadeSection, RunConfig, check_chain, check_devices
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.runtime.samples import load_samples

_POLL_SECS = 5.0


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run folder to score", flag_values=fv)
    flags.DEFINE_string(
        "low_res_run",
        None,
        "run folder of the stage below: score enlargements of its samples too",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "samples", None, "score this .npz (arr_0 uint8 NHWC, arr_1 labels) instead", flag_values=fv
    )
    flags.DEFINE_bool(
        "follow", False, "keep scoring new checkpoints until training ends", flag_values=fv
    )
    cli.parse(fv, argv, __doc__)
    cli.require(fv, "workdir")
    folder = RunFolder(fv.workdir)
    config = folder.read_config()
    folder.check_writable()
    previous_folder = None
    if fv.low_res_run is not None:
        previous_folder = RunFolder(fv.low_res_run, flag="low_res_run")
        _check_previous(previous_folder, config)
    stored = None
    if fv.samples is not None:
        if fv.follow or fv.low_res_run is not None:
            raise UserError("--samples scores a file: leave out --follow and --low_res_run")
        stored = load_samples(fv.samples, config.stage)

    jax = cli.set_up_jax()
    from cascaded_diffusion.data.sources import examples, load_source
    from cascaded_diffusion.evaluation import score
    from cascaded_diffusion.runtime.mesh import build_mesh

    data = config.data
    sources = [
        load_source(data, split, config.stage) for split in (data.train_split, data.eval_split)
    ]
    train, held_out = (
        score.LabelledImages(*examples(source, range(len(source))).values()) for source in sources
    )
    check_devices(config, jax.device_count())
    mesh = build_mesh(config.mesh)
    with folder.writer_lock("eval"):
        judge = score.build_judge(config, folder, train, held_out)
        print(
            f"{config.stage.name}: classifier at {config.stage.resolution} px recognises"
            f" {100 * judge.classifier.accuracy:.1f} % of the {len(held_out.labels)} held-out real"
            " images",
            flush=True,
        )
        if stored is not None:
            record = score.record_for_samples(judge, fv.samples, *stored)
            print(json.dumps(record), flush=True)
            return 0
        previous = None
        if previous_folder is not None:
            previous = score.load_previous(previous_folder, mesh)
        scorer = score.RunScorer(config, folder, judge, held_out, mesh, previous=previous)
        while True:
            # Asked before scoring: what is saved before the end is then seen by
            # the scoring that follows.
            ended = not fv.follow or folder.complete_path.exists()
            scored = scorer.score_new_checkpoints()
            if ended:
                best = folder.best()
                if best is None:
                    raise UserError(
                        f"--workdir={fv.workdir}: no checkpoint could be scored; train first, or"
                        " add --follow to wait for checkpoints"
                    )
                if not scored:
                    scorer.say_best(best)
                return 0
            time.sleep(_POLL_SECS)


def _check_previous(folder: RunFolder, config: RunConfig) -> None:
    below = folder.read_config().stage
    if config.stage.kind != "super_resolution":
        raise UserError(
            f"--low_res_run={folder.path}: only for super-resolution stages; the run to score,"
            f" {config.stage.name!r}, is a base model"
        )
    sampler = (below.sampler, config.stage.sampler)
    chain = CascadeSection(
        stages=(below.name, config.stage.name),
        aug_levels=(config.eval.aug_level if config.stage.augment.name != "none" else 0.0,),
        truncated=False,
        samplers=tuple(s.name for s in sampler),
        num_steps=tuple(s.num_steps for s in sampler),
        guidance_scales=tuple(s.guidance_scale for s in sampler),
        num_samples=config.eval.num_samples,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
    )
    try:
        check_chain(chain, (below, config.stage))
    except UserError as e:
        raise UserError(f"--low_res_run={folder.path}: {e}") from e
    folder.best_step()


if __name__ == "__main__":
    cli.run(main)
