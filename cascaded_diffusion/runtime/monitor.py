"""What JAX does behind a run: programs compiled, memory used, traces of a few steps."""

import os
import pathlib
import resource
import tempfile
import time
from typing import Self

import jax

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.whole import files_below, write_whole

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def secs_since_start() -> float | None:
    """Seconds since this process started; None if the system does not tell."""
    try:
        # The 22nd field, counted after the name, which may have spaces.
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


class CompileWatch:
    """Counts compilations while it is open; after the first steps there should be none."""

    def __init__(self) -> None:
        self._count, self._secs = 0, 0.0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *exc: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration: float, **details: object) -> None:
        del details
        if event == _COMPILE_EVENT:
            self._count, self._secs = self._count + 1, self._secs + duration

    def take(self) -> tuple[int, float]:
        """Compilations and their seconds since the last call."""
        found, self._count, self._secs = (self._count, self._secs), 0, 0.0
        return found


def peak_memory() -> dict[str, float]:
    """The peak so far in GB: this process's, and the fullest local device's if it is known."""
    peak = {"host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        peak["device_peak_gb"] = max(peaks) / 1e9
    return peak


class StepProfiler:
    """Traces `steps`, the first to the last (from 1), for TensorBoard's profiler or Perfetto."""

    def __init__(self, folder: AnyPath, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps
        self._running = False
        # What is written here goes to a bucket when it is complete.
        self._local: tempfile.TemporaryDirectory[str] | None = None

    def check(self, first: int, last: int) -> None:
        """Raises UserError unless the steps to trace are there, up to `last`.

        Those that a resumed run has behind it, before `first`, are not traced, which is printed:
        the same command goes on.
        """
        if self._steps is None:
            return
        given = f"--profile_steps={self._steps[0]}:{self._steps[1]}"
        if self._steps[1] > last:
            raise UserError(f"{given}: expected steps of this run, which has {last}")
        if self._steps[0] < first:
            if jax.process_index() == 0:
                print(f"{given}: not traced, the run resumes at step {first}", flush=True)
            self._steps = None

    def before(self, step: int) -> None:
        """Starts the trace if `step` is the first; called before `step` is dispatched."""
        if self._steps is not None and not self._running and step == self._steps[0]:
            if isinstance(self._folder, BucketPath):
                self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name if self._local else str(self._folder))
            self._running, self._started = True, time.monotonic()

    def after(self, step: int, result: object) -> str | None:
        """Called after `step`: at the last one waits for `result` and says where the trace is."""
        if not self._running or step < self._steps[1]:
            return None
        jax.block_until_ready(result)
        self.close()
        secs = time.monotonic() - self._started
        return f"traced steps {self._steps[0]} to {step} ({secs:.1f} s): {self._folder}"

    def close(self) -> None:
        """Ends a running trace."""
        if self._running:
            jax.profiler.stop_trace()
            if self._local is not None:
                for name, path in files_below(pathlib.Path(self._local.name)).items():
                    write_whole(self._folder / name, path.read_bytes())
                self._local.cleanup()
            self._running = False
