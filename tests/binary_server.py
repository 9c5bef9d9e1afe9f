"""Runs one binary after another in one process; see `tests.binaries`.

    python -m tests.binary_server

Each line of stdin is a command, `[true, "evaluate", "--workdir=..."]`; true says that the network
is that of `tests.one_layer`. Each line of stdout is the answer: the exit code, and what the command
wrote to the descriptors 1 and 2.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import traceback
from unittest import mock

from tests.xla import QUICK, compiled_with


def run(binary, *flags):
    """The exit code of `python -m cascaded_diffusion.BINARY FLAGS`."""
    from cascaded_diffusion.commands import entry

    home = {"data": "commands.show_data"}.get(binary, binary)
    sys.argv = [binary, *flags]
    try:
        entry.run(importlib.import_module(f"cascaded_diffusion.{home}").main)
    except SystemExit as e:
        return e.code
    except BaseException:
        traceback.print_exc()
        return 1


def _captured(binary, flags):
    kept = [os.dup(fd) for fd in (1, 2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            for fd, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), fd)
            code = run(binary, *flags)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            for fd, old in zip((1, 2), kept, strict=True):
                os.dup2(old, fd)
                os.close(old)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    return [code, *texts]


@contextlib.contextmanager
def _with_shorter_classifiers():
    """A classifier takes 8 of 14 epochs, and is the only program that XLA optimizes here."""
    from cascaded_diffusion.evaluation.features import classifier_training as lib

    small = dataclasses.replace(lib.RECIPES["small"], epochs=8)
    optimized = compiled_with(QUICK)(lib.train_classifier)
    with (
        mock.patch.dict(lib.RECIPES, small=small),
        mock.patch.object(lib, "train_classifier", optimized),
    ):
        yield


def main():
    from tests.one_layer import in_place_of_the_unet

    # Descriptor 1 is another file while a command runs.
    with _with_shorter_classifiers(), os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            one_layer, binary, *flags = json.loads(line)
            with in_place_of_the_unet() if one_layer else contextlib.nullcontext():
                answer = _captured(binary, flags)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
