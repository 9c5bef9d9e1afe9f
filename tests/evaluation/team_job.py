"""One process of an evaluation, to be started by test_team.py.

    python -m tests.evaluation.team_job WORKDIR ADDRESS NUM_PROCESSES PROCESS_ID

scores the checkpoints of a run of one layer, measures its final numbers and sweeps its steps, by
features that take no network. The run is in a folder of runs.
"""

import time

import numpy as np

from cascaded_diffusion.commands import entry, jax_setup
from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit
from cascaded_diffusion.evaluation.settings import make_settings
from cascaded_diffusion.runtime.cluster import Cluster
from cascaded_diffusion.runtime.meeting import meet
from cascaded_diffusion.runtime.peers import JOB
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder

_IMAGES = np.random.default_rng(0).integers(256, size=(40, 16, 16, 1), dtype=np.uint8)


def _read(rows):
    return {"image": _IMAGES[rows], "label": np.asarray(rows, np.int32) % 10}


def main(argv):
    workdir, address, count, index = argv[1:]
    cluster = None
    if int(count) > 1:
        cluster = Cluster(address, int(count), int(index))
        JOB.watch(meet(cluster, {}, timeout_secs=120), timeout_secs=30)
    jax_setup.set_up_jax(cluster)
    from cascaded_diffusion.evaluation import jobs
    from cascaded_diffusion.evaluation.samples import generate
    from tests.evaluation.stubs import WithoutNetwork, cascade_of
    from tests.one_layer import in_place_of_the_unet

    fill = generate.fill

    def slowly(store, make, **kwargs):
        def made(indices):
            time.sleep(0.05)
            print("made a batch", flush=True)
            return make(indices)

        fill(store, made, **kwargs)

    generate.fill = slowly
    split = RealSplit(data="random", split="all", size=len(_IMAGES), read=_read)
    evaluation = WithoutNetwork({"train": split, "val": split}, allow_few_samples=True)
    folder = RunFolder(workdir)
    with in_place_of_the_unet():
        best = jobs.score_checkpoints(folder, evaluation)
        record = jobs.final_numbers(folder, evaluation, num_samples=50)
        config = folder.read_config()
        cascade = cascade_of(config, num_samples=30, batch_size=10)
        settings = make_settings(cascade.cascade, 0, config.stage, num_steps=[1, 2])
        runs = CascadeFolder(folder.path.parent)
        jobs.sweep_settings(runs, cascade, evaluation, settings, index=0)
    # Of the final numbers, process 0 alone returns a record.
    assert not record or best["step"] == record["step"]
    return 0


if __name__ == "__main__":
    entry.run(main)
