"""The binaries as a user has them, with one device: in a process each, or in one that stays.

Starting Python and JAX takes most of the time of a small command. So `Binaries` runs commands in
one process, through the `entry.run` that `python -m cascaded_diffusion.NAME` calls.
"""

import json
import os
import subprocess
import sys
import threading

from tests.tiny import ROOT
from tests.xla import NO_OPTIMIZATION

# Of a stage on photos: the network that is compiled soonest.
TINY_NETWORK = [
    "--config.stage.network.channels=8",
    "--config.stage.network.channel_mults=(1,)",
    "--config.stage.network.num_res_blocks=(1,)",
    "--config.stage.network.attention_resolutions=()",
    "--config.stage.network.num_heads=2",
    "--config.stage.network.patch_size=4",
]


def environment(compilation=NO_OPTIMIZATION):
    """The environment of a binary: one device, no simulated ones."""
    return {**os.environ, "XLA_FLAGS": compilation, "PYTHONPATH": str(ROOT)}


def command(binary, *flags):
    """The command line of a process of its own, whose network is that of `tests.one_layer`."""
    return [sys.executable, "-m", "tests.one_layer", binary, *flags]


class Binaries:
    """Runs commands in one process, and in a new one only where a command has ended it."""

    def __init__(self):
        self._process = None

    def run(self, binary, *flags, one_layer=True, timeout=600):
        """What `subprocess.run` of the command returns, with text.

        With `one_layer`, the command's network is that of `tests.one_layer`.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.binary_server"],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        watchdog = threading.Timer(timeout, self._process.kill)
        watchdog.start()
        print(json.dumps([one_layer, binary, *flags]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        watchdog.cancel()
        assert answer, f"{binary} ended the process, or took more than {timeout} s"
        return subprocess.CompletedProcess([binary, *flags], *json.loads(answer))

    def close(self):
        """Ends the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(timeout=60)
            self._process.stdout.close()
