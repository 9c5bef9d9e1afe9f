"""What a run tells its user: progress lines, metrics.jsonl, TensorBoard. The only home of clu."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tqdm
from clu import parameter_overview

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime.run_folder import RunFolder


def print_parameter_overview(params: Any) -> None:
    """A table of every parameter: path, shape, size. Takes arrays or their shapes."""
    print(parameter_overview.get_parameter_overview(params, include_stats=False), flush=True)


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and TensorBoard, images to TensorBoard.

    Args:
      folder: the run folder.
      resume_step: the step the run goes on from. What an earlier, interrupted
        process logged after it is dropped: those steps are run again.
    """

    def __init__(self, folder: RunFolder, *, resume_step: int = 0):
        # Imported here: it costs half a second, and readers of runs do not log.
        from tensorboardX import SummaryWriter

        self._folder = folder
        if folder.metrics_path.exists():
            lines = folder.metrics(say=print)
            kept = [record for record in lines if record["step"] <= resume_step]
            write_whole(folder.metrics_path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._tensorboard = SummaryWriter(str(folder.path), purge_step=resume_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of JSON (floats exact) and one point per curve.

        Raises:
          UserError: the run folder is not there any more, or the disk is full.
        """
        self._folder.check_held()
        with self._writing():
            append_line(self._folder.metrics_path, {"step": step, **scalars})
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """An image grid, uint8 [H, W, C]. Raises UserError where the disk is full."""
        with self._writing():
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
            self._tensorboard.flush()

    def close(self) -> None:
        with self._writing():
            self._tensorboard.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"{self._folder.path}: metrics cannot be written ({e.strerror}); make room and run"
                " the same command again"
            ) from e


class ScoreCurves:
    """Scores over checkpoints for TensorBoard, in RUN/eval.

    Made anew from the committed records by each process that adds to them, so that what
    is shown is those records, each once.

    Args:
      folder: the run folder.
    """

    def __init__(self, folder: RunFolder):
        from tensorboardX import SummaryWriter

        for path in folder.eval.glob("events.out.tfevents.*"):
            path.unlink()
        self._tensorboard = SummaryWriter(str(folder.eval))
        for record in folder.scores(say=print):
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a score: one curve per metric, low-res input and EMA."""
        if record.get("value") is None or "low_res" not in record:
            return
        source = str(record["low_res"]).partition(":")[0]
        name = f"{record['metric']}/low_res_{source}_ema_{record['ema_decay']:g}"
        self._tensorboard.add_scalar(name, record["value"], record["step"])
        self._tensorboard.flush()

    def close(self) -> None:
        self._tensorboard.close()


def _duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every `line_secs`.

    Shows position, rate, time left, and whatever `update` is given. Of several processes
    all but one are `silent`.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        label: str,
        initial: int = 0,
        line_secs: float = 15.0,
        silent: bool = False,
    ):
        self._silent = silent
        self._total, self._unit, self._label, self._initial = total, unit, label, initial
        self._line_secs = line_secs
        self._start = self._last_line = time.monotonic()
        self._bar = None
        # A terminal that knows no width would show an empty bar.
        if (
            not silent
            and sys.stderr.isatty()
            and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        ):
            self._bar = tqdm.tqdm(
                total=total, initial=initial, unit=unit, desc=label, dynamic_ncols=True
            )

    def update(self, position: int, **details: str) -> None:
        """Tells that `position` of `total` is reached."""
        text = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in details.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(position - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < self._line_secs and position < self._total:
            return
        self._last_line = now
        done, elapsed = position - self._initial, now - self._start
        left = elapsed / done * (self._total - position) if done else 0.0
        self.say(
            f"{self._label}: {position}/{self._total} {self._unit}"
            f"{', ' + text if text else ''}, {_duration(elapsed)} gone, {_duration(left)} left"
        )

    def say(self, line: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(line)
        elif not self._silent:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
