"""`evaluate --bits_per_dim=SPLIT`: how likely a run's chosen checkpoint finds real images."""

from __future__ import annotations

import dataclasses
import json

from absl import flags

from cascaded_diffusion.commands import flag_checks, jax_setup
from cascaded_diffusion.commands.run_images import open_splits, real_split
from cascaded_diffusion.config.run_checks import evaluation_mesh
from cascaded_diffusion.config.schema import RunConfig, SamplerConfig, StageConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import RunFolder


def _bound_chain(fv: flags.FlagValues, stage: StageConfig) -> SamplerConfig:
    """The chain whose bound is computed: all steps of the process unless told otherwise.

    The bound is one of ancestral steps, however the stage is sampled otherwise.
    """
    steps = stage.schedule.num_timesteps or 1000
    if fv.num_steps:
        given = flag_checks.numbers_in(fv, "num_steps", int)
        if len(given) != 1 or given[0] < 1:
            raise UserError(f"--num_steps={','.join(fv.num_steps)}: expected one number of steps")
        (steps,) = given
    chain = dataclasses.replace(
        stage.sampler,
        name="ancestral",
        num_steps=steps,
        grid="uniform",
        variance="learned" if stage.diffusion.variance == "learned" else "large",
        variance_interpolation=None,
        eta=None,
        guidance_scale=1.0,
        threshold="static",
        threshold_percentile=None,
    )
    if (stage.schedule.discrete_timesteps or steps) < steps:
        raise UserError(
            f"--num_steps={steps}: expected at most {stage.schedule.discrete_timesteps}, the"
            f" config.stage.schedule.num_timesteps of {stage.name!r}"
        )
    return chain


def evaluate_bound(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    """Computes and records bits/dim. Returns the exit code; raises UserError."""
    folder.chosen()
    chain = _bound_chain(fv, config.stage)
    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation.likelihood import bits_per_dim
    from cascaded_diffusion.evaluation.trained import load_trained
    from cascaded_diffusion.files.json_files import append_line
    from cascaded_diffusion.runtime.mesh import build_mesh

    names = [fv.bits_per_dim, config.data.train_split]
    try:
        sources = open_splits(folder, config, names, data_path=fv.data_path)
    except UserError as e:
        raise UserError(f"--bits_per_dim={fv.bits_per_dim}: {e}") from e
    split = real_split(config, fv.bits_per_dim, sources[fv.bits_per_dim])
    count = min(len(split), fv.num_images or len(split))
    # Spread over the split, which may be sorted by class.
    images = split.raw([i * len(split) // count for i in range(count)])
    mesh = build_mesh(evaluation_mesh(config, jax.device_count()))
    trained = load_trained(folder, mesh)
    print(f"{trained.name}: the bound of {chain.num_steps} steps, variance {chain.variance}")
    values = bits_per_dim(
        trained,
        images,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
        aug_level=config.eval.aug_level,
        sampler=chain,
        mesh=mesh,
    )
    stage = config.stage
    record = {
        "step": trained.chosen.step,
        "ema_decay": trained.chosen.ema_decay,
        "metric": "bits_per_dim",
        "value": values["bits_per_dim"],
        "standard_error": values["bits_per_dim_error"],
        "num_images": count,
        "reference": f"{config.data.name}:{fv.bits_per_dim}:{stage.resolution}px",
        "aug_level": config.eval.aug_level if stage.has_aug_level else None,
        "chain": to_dict(chain),
        "seed": config.eval.seed,
    }
    with folder.writer_lock("eval"):
        append_line(folder.results_path, record)
    print(json.dumps(record), flush=True)
    return 0
