"""Prints what a model costs before it is run. Nothing is allocated.

    python -m cascaded_diffusion.plan --config=configs/sr256.py
    python -m cascaded_diffusion.plan --config=configs/cascade256.py --json
    python -m cascaded_diffusion.plan --config=configs/sr256.py --topology=v5e:16x16

For a stage, or for every stage of a cascade: parameters, FLOPs of one network evaluation for
one image, network evaluations and FLOPs of one sample, and FLOPs of the whole training. The
costs of a cascade are the sums of its stages'. --json prints the same as one JSON object.

--topology adds what a training step costs on a slice of accelerators: bytes per device,
collectives, seconds per step at an assumed efficiency, days and chip-hours to the config's
train_steps. Where config.mesh.fsdp is None, the smallest division that fits by estimate is
chosen, as `main` chooses it for the devices it finds. With the [tpu] extra installed, the TPU's
own compiler also compiles the step, which takes some minutes per stage, and says whether it
fits. If it does not, the plan names what to change, and the exit code is 1.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, entry, jax_setup, plan_flags
from cascaded_diffusion.planning.topologies import set_up_tpu_compiler


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "a stage's or a cascade's config file")
    plan_flags.define(fv)
    config_flags.parse(fv, argv, __doc__, "config")
    topology, compile_step = plan_flags.topology(fv)
    section, configs = config_flags.stage_configs(fv, argv)
    if topology is not None and compile_step:
        set_up_tpu_compiler(topology)
    jax_setup.set_up_jax(platform="cpu")
    from cascaded_diffusion.planning import plans, step_cost

    if section is None:
        found = [plans.stage_plan(configs[0], configs[0].stage.sampler)]
        whole, columns = found[0], found
    else:
        found = plans.cascade_plans(section, configs)
        whole = plans.summed(pathlib.Path(config_flags.config_path(argv)).stem, found)
        columns = [*found, whole]
    if topology is not None:
        for config, plan in zip(configs, found, strict=True):
            plan["on_topology"] = step_cost.on_topology(
                config,
                topology,
                efficiency=fv.efficiency,
                flops_per_image=plan["flops_per_image"],
                compile_step=compile_step,
            )
    if fv.json:
        print(json.dumps(whole))
    else:
        lines = [plans.described(plan) for plan in found if topology is not None]
        print("\n\n".join([plans.table(columns), *lines]))
    return 0 if all(plan["on_topology"]["fits"] for plan in found if topology is not None) else 1


if __name__ == "__main__":
    entry.run(main)
