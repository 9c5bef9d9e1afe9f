"""Several processes that evaluate one run: one decides and records, all make samples and features.

Process 0 orders the samples that it needs, by a file in the run folder, RUN/eval/work.json. Every
process makes every P-th batch of them, with the features of its images, in a `SampleStore` that
all see, and process 0 adds the batches up in their order. So the sums do not depend on the number
of processes, to the last bit. What may take hours is awaited by looking at files, since no
collective would wait so long.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor, Features
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_store import Arrays, SampleStore
from cascaded_diffusion.files.json_files import Record, readable_record, write_json
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.run_folder import RunFolder

_POLL_SECS = 0.2
_PREFIX = "features_"
# Features are trained or loaded by process 0 first, and then by the others.
_READY, _SAMPLES, _END = "ready", "samples", "end"


def with_features(make: generate.BatchMaker, extractor: FeatureExtractor) -> generate.BatchMaker:
    """Batches with the features of their images."""

    def made(indices: np.ndarray) -> Arrays:
        arrays = make(indices)
        found = dataclasses.asdict(extractor(arrays["images"]))
        features = {f"{_PREFIX}{k}": x for k, x in found.items() if x is not None}
        return {**arrays, **features}

    return made


def features_in(arrays: Arrays) -> Features:
    """The features of a batch that `with_features` has made."""
    names = [field.name for field in dataclasses.fields(Features)]
    return Features(**{name: arrays.get(f"{_PREFIX}{name}") for name in names})


@dataclasses.dataclass(frozen=True)
class Order:
    """Samples that are wanted: the store that they go to, and how a batch is made."""

    store: SampleStore
    make: generate.BatchMaker


class Team:
    """The processes that evaluate a run. Every process makes one, at the same time."""

    def __init__(self, folder: RunFolder):
        self._path, self._folder = folder.eval / "work.json", folder
        self.leads, self._several = jax.process_index() == 0, jax.process_count() > 1
        self._number = 0
        # Nothing of an earlier job is mistaken for an order of this one.
        (self._job,) = mesh_lib.broadcast_from_process_0([np.random.SeedSequence().entropy % 2**31])
        mesh_lib.check_shared(folder.path, "workdir")

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Process 0: while it is open the others wait for orders; then they end."""
        try:
            self._write(_READY)
            yield
        except BaseException:
            # The error must not hide behind one of this file, which a full disk gives, too.
            with contextlib.suppress(OSError):
                self._write(_END, {"failed": True})
            raise
        self._write(_END)

    def fill(
        self, store: SampleStore, make: generate.BatchMaker, what: Record, *, label: str
    ) -> None:
        """Process 0: fills a store, together with the others, who learn from `what` how.

        What another process could not do is raised here: ValueError for samples that are not
        finite, else OSError.
        """
        store.failed.unlink(missing_ok=True)
        self._write(_SAMPLES, {**what, "store": store.number})
        generate.fill(store, make, label=label)
        while store.missing():
            if (failure := readable_record(store.failed)) is not None:
                error = ValueError if failure.get("samples") is True else OSError
                raise error(failure.get("error"))
            time.sleep(_POLL_SECS)

    def await_ready(self) -> None:
        """The others: returns when process 0 has prepared what all need."""
        # It may have ordered samples already, which is left for `help`.
        while self._latest() is None:
            time.sleep(_POLL_SECS)

    def help(self, understand: Callable[[Record], Order]) -> None:
        """The others: fill stores as process 0 orders, until it ends.

        `understand` finds out what an order is about; it may raise UserError.
        """
        for record in self._orders():
            if record["kind"] == _SAMPLES:
                self._carry_out(record, understand)

    def _carry_out(self, record: Record, understand: Callable[[Record], Order]) -> None:
        order = understand(record)
        if order.store.number != record["store"]:
            raise UserError(
                f"{self._folder.path}: this process has found other samples to make than process 0,"
                " as other checkpoints were chosen meanwhile: run the same command again"
            )
        try:
            generate.fill(order.store, order.make, label="")
        except (UserError, ValueError, OSError) as e:
            # Process 0 has read the same checkpoint: all but the samples is this process's matter.
            samples = isinstance(e, ValueError)
            about = str(e) if samples else f"process {jax.process_index()}: {e}"
            try:
                write_json(order.store.failed, {"samples": samples, "error": about})
            except OSError:  # on a full disk, for one; process 0 learns it by this process's end
                raise e from None

    def _orders(self) -> Iterator[Record]:
        """Each order once, as it comes, until the last."""
        while True:
            record = self._latest()
            if record is None or record["number"] <= self._number:
                time.sleep(_POLL_SECS)
                continue
            self._number = record["number"]
            if record["kind"] != _END:
                yield record
            elif "failed" in record:
                raise UserError("process 0 failed, see what it printed")
            else:
                return

    def _latest(self) -> Record | None:
        record = readable_record(self._path, {"job": int, "number": int, "kind": str})
        return record if record is not None and record["job"] == self._job else None

    def _write(self, kind: str, what: Record | None = None) -> None:
        if not self._several:
            return
        self._number += 1
        record = {"job": self._job, "number": self._number, "kind": kind}
        write_json(self._path, {**record, **(what or {})}, indent=None)
