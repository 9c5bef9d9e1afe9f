"""Scores a run's checkpoints again and again, each time killed at a random moment.

    python -m tests.evaluation.killed_job RUN NUM_KILLS [RUN NUM_KILLS ...]

A script of its own: it forks, which wants a process whose JAX has not begun to work.
The samples are a function of (step, index) that takes no network; all else, the
checkpoints, the store, the sums and the records, is what `evaluate` does.
"""

import os
import random
import signal
import sys
import time

import numpy as np

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.evaluation.evaluator import Evaluator
from cascaded_diffusion.evaluation.reference import measure_reference
from cascaded_diffusion.evaluation.samples.sample_sources import SampleSource
from cascaded_diffusion.evaluation.score import RunScorer
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.evaluation.stubs import Extractor
from tests.one_layer import in_place_of_the_unet


def _images(seed, indices):
    return np.stack(
        [np.random.default_rng((seed, i)).integers(0, 256, (16, 16, 1), np.uint8) for i in indices]
    )


def score(path, pause_secs):
    """One call of `evaluate`, with a pause before each batch."""
    folder = RunFolder(path)
    config = folder.read_config()
    extractor = Extractor()
    reference = measure_reference(
        [_images(-1 % 2**32, range(200))],
        extractor,
        num_images=200,
        label="reference",
        data="random",
        split="",
        crop="none",
        resize="none",
    )
    evaluator = Evaluator(extractor=extractor, references={"train": reference}, classes=True)

    def make(params, indices):
        time.sleep(pause_secs)
        seed = abs(float(np.asarray(next(iter(_leaves(params)))).sum()))
        return {"images": _images(int(seed * 1e6), indices), "labels": indices % 10}

    source = SampleSource(record={"low_res": "none"}, about="no network", make=make)
    with folder.writer_lock("eval"):
        scorer = RunScorer(
            config, folder, evaluator, [source], build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
        )
        scorer.score_new_checkpoints()
        scorer.close()


def _leaves(tree):
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from _leaves(tree[key])
    else:
        yield tree


def main(path, num_kills):
    rng, kills = random.Random(0), 0
    while True:
        child = os.fork()
        if child == 0:
            score(path, 0.03 if num_kills else 0.0)
            os._exit(0)
        status, deadline = None, time.monotonic() + rng.uniform(0.1, 1.6)
        while time.monotonic() < deadline or kills >= num_kills:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            status = None
            time.sleep(0.01)
        if status is not None:
            if status != 0:
                sys.exit(f"a call of evaluate failed: {status}")
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    print(f"kills {kills}", flush=True)


if __name__ == "__main__":
    with in_place_of_the_unet():
        for path, num_kills in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            main(path, int(num_kills))
