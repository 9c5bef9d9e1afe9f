"""What a run logs: metrics.jsonl, TensorBoard, the table of parameters. The only home of clu."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping

import numpy as np
from clu import parameter_overview
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import BucketPath
from cascaded_diffusion.files.json_files import Record, append_line, write_lines
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params

_MAX_QUEUE = 1000  # events of TensorBoard; a step that is logged makes about 20


class _EventParts:
    """A file of events in a bucket: a new object for each flush, all of which TensorBoard reads.

    tensorboardX would write the whole file anew each time.
    """

    def __init__(self, path: str):
        self._path, self._number, self._data = path, 0, bytearray()

    @staticmethod
    def open(path: str) -> "_EventParts":
        return _EventParts(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """Folders need not be made."""

    def write(self, data: bytes) -> None:
        self._data += data

    def flush(self) -> None:
        if self._data:
            BucketPath(f"{self._path}.{self._number:06d}").write_bytes(bytes(self._data))
            self._number, self._data = self._number + 1, bytearray()

    def close(self) -> None:
        self.flush()


register_writer_factory("gs", _EventParts)


def print_parameter_overview(params: Params) -> None:
    """A table of every parameter: path, shape, size. Takes arrays or their shapes."""
    print(parameter_overview.get_parameter_overview(params, include_stats=False), flush=True)


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and TensorBoard, images to TensorBoard.

    What an earlier, interrupted process logged after `resume_step` is dropped, since those steps
    are run again.
    """

    def __init__(self, folder: RunFolder, *, resume_step: int = 0):
        self._folder = folder
        if folder.metrics_path.exists():
            lines = folder.metrics(say=print)
            kept = [record for record in lines if record["step"] <= resume_step]
            write_lines(folder.metrics_path, kept)
        before = set(threading.enumerate())
        self._tensorboard = SummaryWriter(
            str(folder.path), purge_step=resume_step + 1, max_queue=_MAX_QUEUE
        )
        # A thread writes the events. If it ends, as on a full disk, its queue is never read again,
        # and who puts more into it than it holds waits forever.
        self._threads = set(threading.enumerate()) - before

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of JSON (floats exact) and one point per curve. Raises like `write_image`."""
        self._folder.check_held()
        with self._writing():
            if not all(thread.is_alive() for thread in self._threads):
                raise OSError("TensorBoard's events, see above")
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
            # Not `strerror`, to which the writer of metrics.jsonl has added its own words.
            reason = os.strerror(e.errno) if e.errno else e
            raise UserError(
                f"{self._folder.path}: metrics cannot be written ({reason}); make room and run the"
                " same command again"
            ) from e


class ScoreCurves:
    """Scores over checkpoints for TensorBoard, in RUN/eval.

    Each process that adds scores rewrites the curves from the committed records, so that each
    record is shown once.
    """

    def __init__(self, folder: RunFolder):
        for path in folder.eval.glob("events.out.tfevents.*"):
            path.unlink()
        self._tensorboard = SummaryWriter(str(folder.eval))
        for record in folder.scores(say=print):
            self._add(record)
        self._tensorboard.flush()

    def add(self, record: Record) -> None:
        """Adds a score: one curve per metric, low-res input and EMA."""
        self._add(record)
        self._tensorboard.flush()

    def _add(self, record: Record) -> None:
        if record.get("value") is None or "low_res" not in record:
            return
        source = str(record["low_res"]).partition(":")[0]
        name = f"{record['metric']}/low_res_{source}_ema_{record['ema_decay']:g}"
        self._tensorboard.add_scalar(name, record["value"], record["step"])

    def close(self) -> None:
        self._tensorboard.close()
