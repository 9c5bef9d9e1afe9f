"""One process of a training, to be started by test_distributed.py.

    python -m tests.training.distributed_job WORKDIR IDS ADDRESS NUM_PROCESSES PROCESS_ID STEPS

trains a stage of one layer and writes which images were at which row of which step to IDS. With
SLOW_COMPILATION in the environment, compiling the step takes a minute; FAILING_PROCESS names one
that fails in its data after some steps.
"""

import json
import os
import pathlib
import sys
import time

from cascaded_diffusion.commands import entry, jax_setup
from cascaded_diffusion.errors import EXIT_TRY_AGAIN, UserError
from cascaded_diffusion.runtime.cluster import Cluster
from cascaded_diffusion.runtime.meeting import meet
from cascaded_diffusion.runtime.peers import JOB
from cascaded_diffusion.runtime.run_folder import RunFolder


def main():
    workdir, ids_path, address, count, index, steps = sys.argv[1:]
    from tests.one_layer import in_place_of_the_unet
    from tests.tiny import random_source, tiny_base

    config = tiny_base(
        train__train_steps=int(steps),
        train__warmup_steps=2,
        train__accumulation_steps=2,
        checkpoint__save_every_steps=50,
        mesh__fsdp=2,
        data__random_flip=True,
    )
    cluster = None
    if int(count) > 1:
        cluster = Cluster(address, int(count), int(index))
        JOB.watch(meet(cluster, {"config": "the same"}, timeout_secs=120), timeout_secs=4)
    jax = jax_setup.set_up_jax(cluster)
    from cascaded_diffusion.data.loader import build_stream, iterate
    from cascaded_diffusion.runtime import mesh as mesh_lib
    from cascaded_diffusion.training import loop

    source = random_source(64)
    share, shares = mesh_lib.batch_share(mesh_lib.build_mesh(config.mesh))
    stream = build_stream(
        source,
        config.data,
        global_batch_size=config.train.batch_size,
        process_index=share,
        process_count=shares,
    )

    def data_from(start):
        path = pathlib.Path(ids_path).with_suffix(f".{share}-of-{shares}")
        for step, batch in enumerate(
            iterate(stream, source, config.data, start_step=start), start=start
        ):
            # The first pixel of an image, flipped or not, spells its number.
            ids = (batch["image"][:, 0, [0, -1], 0]).tolist()
            if step > 5 and os.environ.get("FAILING_PROCESS") == index:
                raise UserError("its disk is gone")
            with path.open("a") as f:
                f.write(json.dumps([step, ids]) + "\n")
            yield batch

    if "SLOW_COMPILATION" in os.environ:
        loop.step_lib.compile_train_step = lambda *given, **named: time.sleep(60)
    raw = source.raw
    with in_place_of_the_unet():
        outcome = loop.train(
            config,
            RunFolder(workdir),
            data_from,
            image_shape=source.image_shape,
            grid_examples={"image": raw.images[:40], "label": raw.labels[:40]},
        )
    assert jax.process_count() == int(count)
    print(f"ended: {outcome.reason} at {outcome.step}", flush=True)
    return EXIT_TRY_AGAIN if outcome.reason == "preempted" else 0


if __name__ == "__main__":
    entry.end_at_once_before_training()
    entry.run(lambda argv: main())
