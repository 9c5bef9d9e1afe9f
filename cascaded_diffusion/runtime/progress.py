"""Progress of a long task: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time

import tqdm

# How often a plain line is printed.
_LINE_SECS = 15.0


def _duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """A progress bar on a terminal; elsewhere a plain line from time to time.

    In a job of several processes, all but one are `silent`.
    """

    def __init__(
        self, total: int, *, unit: str, label: str, initial: int = 0, silent: bool = False
    ):
        self._total, self._unit, self._label, self._initial = total, unit, label, initial
        self._silent = silent
        self._start = self._last_line = time.monotonic()
        self._bar = None
        # A terminal that knows no width would show an empty bar.
        on_terminal = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        if on_terminal and not silent:
            self._bar = tqdm.tqdm(
                total=total, initial=initial, unit=unit, desc=label, dynamic_ncols=True
            )

    def update(self, position: int, **details: str) -> None:
        """Shows that `position` of `total` is reached."""
        text = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in details.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(position - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < _LINE_SECS and position < self._total:
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
