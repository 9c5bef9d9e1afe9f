"""A training in which no step finishes ends, and says where it was."""

import subprocess
import sys
import time

from cascaded_diffusion.training.hang import HangWatch
from tests.tiny import ROOT

HANGING = """
import threading, time
from cascaded_diffusion.training.hang import HangWatch

def wait_for_data():
    threading.Event().wait()

with HangWatch(0.5) as watch:
    for _ in range(4):
        time.sleep(0.2)
        watch.begin("reading")
    print("four steps are done")
    wait_for_data()
"""


def test_a_hanging_process_ends_with_the_stacks_of_its_threads():
    result = subprocess.run(
        [sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 75
    assert result.stdout == "four steps are done\n"
    *stacks, line = result.stderr.splitlines()
    assert "in wait_for_data" in "\n".join(stacks)
    assert line == (
        "error: reading: not done after 0.5 s (config.train.hang_secs); the stacks of all threads"
        " are above; run the same command again"
    )


def test_it_ends_with_the_training():
    with HangWatch(0.2) as watch:
        for _ in range(4):
            time.sleep(0.1)
            watch.begin("the next")
    assert not watch._thread.is_alive()
    time.sleep(0.3)  # nothing ends this process
