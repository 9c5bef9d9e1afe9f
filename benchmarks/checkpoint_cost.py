"""What saving a checkpoint of about 1 GB costs a training, and at which interval that is 2 %.

    python benchmarks/checkpoint_cost.py [--saves=3] [--channels=256] [--workdir=gs://BUCKET/FOLDER]

A network of 65 million parameters is trained on noise, at a size at which a step takes a part of a
second. The state is copied when a save begins, which blocks the step; then it is written, opened
again, hashed and the older one deleted in threads, while steps go on a little slower. Both are
counted against steps without a save.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time

import machine
import numpy as np

from cascaded_diffusion.commands import jax_setup

ROOT = pathlib.Path(__file__).resolve().parents[1]
_OVERRIDES = {
    "stage.resolution": 8,
    "stage.network.channels": 256,
    "stage.network.channel_mults": (1, 2),
    "stage.network.num_res_blocks": (2, 2),
    "stage.network.attention_resolutions": (4,),
    "stage.network.num_heads": 4,
    "stage.network.num_head_channels": None,
    "train.batch_size": 8,
    "train.accumulation_steps": None,
    "checkpoint.max_to_keep": 1,
}
_BASELINE_STEPS = 20


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--channels", type=int, default=_OVERRIDES["stage.network.channels"])
    parser.add_argument("--workdir", help="an empty folder; default: a temporary one")
    flags = parser.parse_args()
    overrides = {**_OVERRIDES, "stage.network.channels": flags.channels}
    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.config.schema import MeshConfig
    from cascaded_diffusion.library.configs import load_config
    from cascaded_diffusion.runtime import mesh as mesh_lib
    from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
    from cascaded_diffusion.runtime.run_folder import RunFolder
    from cascaded_diffusion.training import step as step_lib

    config = load_config(ROOT / "configs" / "cifar10_base16.py", overrides)
    stage, mesh = (
        build_stage(config.stage),
        mesh_lib.build_mesh(MeshConfig(data=1, fsdp=1, tensor=1)),
    )
    abstract = step_lib.abstract_state(stage, config.train, mesh)
    shape = (config.stage.resolution, config.stage.resolution, config.stage.channels)
    train_step = step_lib.compile_train_step(stage, config.train, mesh, abstract, shape)
    state = step_lib.init_state(stage, config.train, mesh)
    rng, batch = np.random.default_rng(0), config.train.batch_size
    records = {
        "image": rng.integers(256, size=(batch, *shape), dtype=np.uint8),
        "label": rng.integers(config.stage.num_classes, size=batch, dtype=np.int32),
    }
    records = mesh_lib.global_batch(records, mesh)
    arrays = jax.tree.leaves(state.params)
    num_bytes = sum(
        x.nbytes for x in jax.tree.leaves((state.params, state.ema_params, state.opt_state))
    )

    def timed() -> float:
        nonlocal state
        start = time.monotonic()
        state, metrics = train_step(state, records)
        jax.block_until_ready(metrics)
        return time.monotonic() - start

    timed()
    usual = statistics.median(timed() for _ in range(_BASELINE_STEPS))
    blocked, written, slower = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(RunFolder(flags.workdir or folder), config.checkpoint)
        with contextlib.closing(writer):
            for number in range(1, flags.saves + 1):
                start = time.monotonic()
                writer.save(number, state)
                blocked.append(time.monotonic() - start)
                steps = []
                while not writer.is_complete():
                    steps.append(timed())
                written.append(time.monotonic() - start)
                slower.append(sum(steps) - usual * len(steps))
            writer.wait(flags.saves)
    cost = statistics.median(a + b for a, b in zip(blocked, slower, strict=True))
    count = sum(x.size for x in arrays)
    print("\n| state | step | a save blocks | is written after | slows steps by, in all | costs |")
    print("|---|---|---|---|---|---|")
    cells = [f"{num_bytes / 1e9:.2f} GB, {count / 1e6:.0f} M parameters", f"{usual:.2f} s"]
    cells += [f"{statistics.median(x):.2f} s" for x in (blocked, written, slower)]
    print(f"| {' | '.join([*cells, f'{cost:.2f} s'])} |")
    print(f"\nAt 2 % of the time: a save every {cost / 0.02:.0f} s or more.")
    print(f"Measured on: {machine.describe()}.")


if __name__ == "__main__":
    main()
