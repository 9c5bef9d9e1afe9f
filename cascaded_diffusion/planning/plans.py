"""What a stage or a cascade costs before it is run. Nothing is allocated.

FLOPs are those of convolutions and matrix products; a multiply-add is two. Training is counted
as three forward passes, without rematerialization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import CascadeSection, RunConfig, SamplerConfig
from cascaded_diffusion.networks.flops import count_flops


def stage_plan(config: RunConfig, sampler: SamplerConfig, *, stop_t: float = 0.0) -> dict[str, Any]:
    """The costs of one stage, sampled by `sampler` from t = 1 to `stop_t`."""
    stage, train = build_stage(config.stage), config.train
    params = jax.eval_shape(stage.init, jax.random.key(0))
    parameters = int(sum(leaf.size for leaf in jax.tree.leaves(params)))
    inputs = jax.eval_shape(lambda: stage.example_inputs(batch_size=1))
    flops = count_flops(stage.network.apply, params, *inputs)
    evaluations = stage.evaluations(sampler, stop_t=stop_t)
    images = train.batch_size * train.train_steps
    # The parameters, their EMAs and Adam's two moments, in float32.
    copies = 1 + len(train.ema_decays) + 2
    return {
        "name": config.stage.name,
        "resolution": config.stage.resolution,
        "parameters": parameters,
        "flops_per_image": flops,
        "sampler": sampler.name,
        "num_steps": sampler.num_steps,
        "calls_per_sample": evaluations,
        "flops_per_sample": flops * evaluations,
        "training_images": images,
        "training_flops": 3 * flops * images,
        "state_bytes": 4 * copies * parameters,
    }


def cascade_plans(section: CascadeSection, configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """The costs of each stage of a cascade, with truncated chains counted as they run."""
    # A stage is stopped where the next one's augmentation begins, if that has a level.
    stops = [
        level if section.truncated and above.stage.has_aug_level else 0.0
        for level, above in zip(section.aug_levels, configs[1:], strict=True)
    ]
    return [
        stage_plan(config, sampler, stop_t=stop_t)
        for config, sampler, stop_t in zip(configs, section.samplers, [*stops, 0.0], strict=True)
    ]


def summed(name: str, plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plan of a cascade: the sums of its stages' costs, and the stages."""
    costs = ("parameters", "flops_per_image", "calls_per_sample", "flops_per_sample")
    sums = {key: sum(stage[key] for stage in plans) for key in (*costs, "training_flops")}
    return {"name": name, **sums, "stages": list(plans)}
