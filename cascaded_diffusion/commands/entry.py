"""What surrounds every binary: one-line errors, exit codes, Ctrl-C."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from cascaded_diffusion.commands.config_flags import config_argument
from cascaded_diffusion.commands.interrupts import EXIT_INTERRUPTED, INTERRUPTS, end_interrupted
from cascaded_diffusion.commands.overrides import overrides_in
from cascaded_diffusion.errors import (
    EXIT_BAD_INPUT,
    EXIT_TRY_AGAIN,
    UserError,
    is_out_of_memory,
)
from cascaded_diffusion.runtime.peers import JOB
from cascaded_diffusion.runtime.signals import START_SIGNALS

_MAX_LINE = 4000  # characters of an error: values can be long
# What asyncio says of it.
_LOOP_CLOSED = "Event loop is closed"
# What `data` advises, which knows no flags.
_OPEN_COMMAND = "prepare --config=..."


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a binary's `main(argv)` and exits with what it returns.

    A `UserError`, or an error of the operating system such as a full disk, becomes one line on
    stderr and exit code 2. Ctrl-C becomes one line and exit code 130. File names that are not
    UTF-8 are printed with escapes.
    """
    INTERRUPTS.install()
    threading.excepthook = _thread_failed
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv)
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
        _leave_job("nobody reads its output any more", code)
    except (UserError, OSError) as e:
        JOB.await_verdict()
        print(f"error: {one_line(e)}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
        _leave_job(one_line(e), code)
    except BaseException as e:
        JOB.await_verdict()
        # A library may have made another error of it.
        if isinstance(e, KeyboardInterrupt) or INTERRUPTS.seen:
            print("interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
            _leave_job("interrupted", code)
        elif (memory := _lacking_memory(e)) is not None:
            print(f"error: {memory}", file=sys.stderr)
            code = EXIT_BAD_INPUT
            _leave_job(memory, code)
        else:
            if JOB.has_peers:
                traceback.print_exc()
                _leave_job(f"{type(e).__name__}: {e}"[:_MAX_LINE], 1)
            raise
    INTERRUPTS.at_once = True
    sys.stdout.flush()
    sys.exit(code)


def _leave_job(failure: str, code: int) -> None:
    """Ends this process if it is one of several: JAX would first wait for all the others."""
    if JOB.has_peers:
        JOB.farewell(failure)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def end_at_once_before_training() -> None:
    """A trainer that gets a signal before its first step ends at once, whatever it is doing."""
    START_SIGNALS.install(_end_without_saving)


def _end_without_saving(number: int) -> None:
    if number == signal.SIGINT:
        end_interrupted()
    os.write(2, b"stopped by a signal before a step was done; run it again\n")
    os._exit(EXIT_TRY_AGAIN)


def end_at_once_upon_sigterm() -> None:
    """A binary that may be killed at any time says upon SIGTERM that it is to be run again."""
    START_SIGNALS.install(_end_upon_sigterm)


def _end_upon_sigterm(number: int) -> None:
    if number == signal.SIGTERM:
        os.write(2, b"stopped by a signal; run it again\n")
        os._exit(EXIT_TRY_AGAIN)


def _lacking_memory(error: BaseException) -> str | None:
    """A line about a device's memory, if that is what XLA's error is about."""
    if not is_out_of_memory(error):
        return None
    return (
        f"a device is out of memory ({str(error).splitlines()[0]}); expected a smaller"
        " config.eval.batch_size (evaluate) or config.cascade.batch_size (sample), or more devices"
    )


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Prints one line if a thread could not write, as TensorBoard's; else its stack trace."""
    if isinstance(args.exc_value, OSError):
        _warn(args.exc_value)
    else:
        threading.__excepthook__(args)


def _unraisable(
    print_it: Callable[[sys.UnraisableHookArgs], None], error: sys.UnraisableHookArgs
) -> None:
    """Reports an error that nobody can catch, raised in a library's thread or at the exit.

    Orbax closes its event loop as soon as one file cannot be written or read, and raises that
    error. Each thread of tensorstore that still works on another file then fails to hand over
    its result, for which nobody waits. Those errors are left out.
    """
    if isinstance(error.exc_value, OSError):  # TensorBoard's files are closed at the exit
        _warn(error.exc_value)
    elif not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == _LOOP_CLOSED):
        print_it(error)


def _warn(error: OSError) -> None:
    print(f"warning: {one_line(error)}", file=sys.stderr, flush=True)


def one_line(error: UserError | OSError) -> str:
    """The line printed about an error: limited in length, with the config that the user typed."""
    text = " ".join(_told(error).split())
    # Read the flag only if it is needed: it raises if the config file does not exist.
    if _OPEN_COMMAND in text and (config := config_argument(sys.argv)):
        given = [f"--config={config}", *overrides_in(sys.argv)]
        text = text.replace(_OPEN_COMMAND, f"prepare {shlex.join(given)}")
    half = _MAX_LINE // 2
    return text if len(text) <= _MAX_LINE else f"{text[:half]} ... {text[-half:]}"


def _told(error: UserError | OSError) -> str:
    if isinstance(error, UserError) or error.strerror is None:
        return str(error) or type(error).__name__
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}"
