"""Runs a training again and again until it ends by itself, for a test that kills it.

    python -m tests.storage.killed_training FOLDER FLAGS...

FOLDER/pid holds the number of the process that trains, FOLDER/log what it printed. Prints how often
it was killed and its last exit code.
"""

import json
import pathlib
import signal
import sys

from cascaded_diffusion.drilling.children import Child
from tests.one_layer import in_place_of_the_unet


def main() -> None:
    folder, flags = pathlib.Path(sys.argv[1]), sys.argv[2:]
    # Imported once, for all of them; no device and no bucket is touched here.
    import cascaded_diffusion.commands.train_stage  # noqa: F401

    kills = 0
    with in_place_of_the_unet():
        while True:
            pid = folder / "pid"
            pid.unlink(missing_ok=True)
            child = Child("main", flags, folder / "log")
            pid.write_text(str(child.pid))
            ended = child.wait()
            if ended.code != -signal.SIGKILL:
                break
            kills += 1
    print(json.dumps([kills, ended.code]))


if __name__ == "__main__":
    main()
