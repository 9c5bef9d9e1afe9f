"""What a model costs, before it is run: nothing is allocated, nothing is compiled.

    python -m cascaded_diffusion.plan --config=configs/sr256.py
    python -m cascaded_diffusion.plan --config=configs/cascade256.py --json

Prints, for a stage or for every stage of a cascade: parameters, FLOPs of one network
evaluation for one image (a multiply-add is two), network evaluations and FLOPs of one
sample, and FLOPs of the whole training. A cascade's are the sums of its stages'.
--json prints the same as one JSON object.

FLOPs are those of convolutions and matrix products. Training is counted as three
forward passes, without rematerialization.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from cascaded_diffusion import cli
from cascaded_diffusion.config import RunConfig, SamplerConfig
from cascaded_diffusion.config_checks import cascade_config_from, check_chain, run_config_from


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    cli.define_config(fv, argv, "a stage's or a cascade's config file")
    flags.DEFINE_bool("json", False, "print one JSON object instead of a table", flag_values=fv)
    cli.parse(fv, argv, __doc__)
    cli.require(fv, "config")
    values = cli.config_values(fv, argv)
    if "cascade" not in values:
        config = run_config_from(values)
        cli.set_up_jax()
        plan = stage_plan(config, config.stage.sampler)
        print(json.dumps(plan) if fv.json else _table([plan]))
        return 0
    section = cascade_config_from(values).cascade
    folder = pathlib.Path(cli.config_path(argv)).parent
    configs = [run_config_from(cli.load_config_file(folder, name)) for name in section.configs]
    check_chain(section, [c.stage for c in configs])
    cli.set_up_jax()
    stages = []
    for i, (config, sampler) in enumerate(zip(configs, section.samplers, strict=True)):
        is_cut = section.truncated and i + 1 < len(configs) and configs[i + 1].stage.has_level
        stop_t = section.aug_levels[i] if is_cut else 0.0
        stages.append(stage_plan(config, sampler, stop_t=stop_t))
    plan = {
        key: sum(stage[key] for stage in stages)
        for key in (
            "parameters",
            "flops_per_image",
            "calls_per_sample",
            "flops_per_sample",
            "training_flops",
        )
    }
    plan = {"name": pathlib.Path(cli.config_path(argv)).stem, **plan, "stages": stages}
    print(json.dumps(plan) if fv.json else _table([*stages, plan]))
    return 0


def stage_plan(config: RunConfig, sampler: SamplerConfig, *, stop_t: float = 0.0) -> dict[str, Any]:
    """The costs of one stage, sampled by `sampler` from t = 1 to `stop_t`."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.networks.flops import count_flops

    stage, train = build_stage(config.stage), config.train
    params = jax.eval_shape(stage.init, jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    inputs = jax.eval_shape(lambda: stage.example_inputs(batch_size=1))
    flops = count_flops(stage.network.apply, params, *inputs)
    evaluations = stage.evaluations(sampler, stop_t=stop_t)
    images = train.batch_size * train.train_steps
    # Parameters, their EMAs and Adam's two moments, float32.
    copies = 1 + len(train.ema_decays) + 2
    return {
        "name": config.stage.name,
        "resolution": config.stage.resolution,
        "parameters": int(parameters),
        "flops_per_image": flops,
        "sampler": sampler.name,
        "num_steps": sampler.num_steps,
        "calls_per_sample": evaluations,
        "flops_per_sample": flops * evaluations,
        "training_images": images,
        "training_flops": 3 * flops * images,
        "state_bytes": 4 * copies * int(parameters),
    }


_COLUMNS = (
    ("name", "stage", "{}"),
    ("resolution", "px", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("state_bytes", "state, GB", "{:.1f}"),
    ("flops_per_image", "GFLOP per evaluation", "{:,.1f}"),
    ("sampler", "sampler", "{}"),
    ("calls_per_sample", "evaluations per sample", "{:,}"),
    ("flops_per_sample", "TFLOP per sample", "{:,.2f}"),
    ("training_images", "training images", "{:.3g}"),
    ("training_flops", "training FLOP", "{:.2e}"),
)
_UNITS = {"state_bytes": 1e9, "flops_per_image": 1e9, "flops_per_sample": 1e12}


def _table(plans: Sequence[dict[str, Any]]) -> str:
    """One row per quantity, one column per stage."""
    rows = [[title] + [_cell(plan, key, form) for plan in plans] for key, title, form in _COLUMNS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def _cell(plan: dict[str, Any], key: str, form: str) -> str:
    if key not in plan:
        return ""
    value = plan[key]
    return form.format(value / _UNITS[key] if key in _UNITS else value)


if __name__ == "__main__":
    cli.run(main)
