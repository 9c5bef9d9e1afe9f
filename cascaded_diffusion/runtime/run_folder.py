"""The run folder: the contract between the binaries.

    RUN/config.json               the resolved config
    RUN/checkpoints/<step>/       Orbax, with a manifest of checksums
    RUN/metrics.jsonl             one line per logged step
    RUN/events.out.tfevents.*     the same for TensorBoard
    RUN/eval/results.jsonl        one line per score
    RUN/eval/best.json            the step chosen
    RUN/eval/reading.json         the step that evaluation is reading: not to be deleted
    RUN/eval/reference_*.npz      statistics of the real images
    RUN/eval/final_*.json, .md    the final numbers of the chosen checkpoint
    RUN/eval/cas.jsonl            classification accuracy scores
    RUN/eval/samples/             samples while they are made
    RUN/eval/*.png, *.npz         sample grids and samples
    RUN/eval/events.out.tfevents.*  scores for TensorBoard
    RUN/profile/                  traces of single steps (`main --profile_steps`)
    RUN/EARLY_STOP, RUN/TRAIN_COMPLETE

A folder of such runs is a cascade's:

    RUNS/<stage>/                 a run folder
    RUNS/cascade.json             the cascade with the best values that a sweep found
    RUNS/sweep/<stage>.*          its records, table and plot

Whole files appear under their name by a rename, never half-written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from cascaded_diffusion.config import CascadeConfig, CascadeSection, RunConfig, to_dict
from cascaded_diffusion.config_checks import run_config_from
from cascaded_diffusion.errors import UserError


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def append_line(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line, durably, in a single write.

    A line cut off by a crash of an earlier writer is closed first, so that it
    spoils nothing but itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as f:
        f.seek(0, os.SEEK_END)
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write(json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; what a crash cut off is passed over."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def check_writable(path: pathlib.Path, flag: str) -> None:
    """Raises UserError if the folder cannot be written; leaves no trace."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--{flag}={path}: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise UserError(
            f"--{flag}={path}: cannot write to {parent} ({e.strerror}); choose a"
            " folder that you may write to"
        ) from e


@contextlib.contextmanager
def held_lock(path: pathlib.Path, role: str, flag: str) -> Iterator[None]:
    """Holds a folder for one writer of a kind.

    The lock is the operating system's: it ends with the process that holds
    it, however that ends.

    Raises:
      UserError: another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / f".{role}.lock").open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            f.seek(0)
            holder = f.read().strip() or "unknown"
            raise UserError(
                f"--{flag}={path}: another {role} process (pid {holder}) is writing"
                " there; wait for it, or choose another folder"
            ) from e
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A checkpoint's step, and which of its EMAs."""

    step: int
    ema_decay: float


class RunFolder:
    """Paths and small files of one run. Opening it writes nothing.

    Args:
      path: the folder.
      flag: the flag that named it, for error messages.
    """

    def __init__(self, path: str | os.PathLike[str], *, flag: str = "workdir"):
        self.path = pathlib.Path(path)
        self._flag = flag
        self.config_path = self.path / "config.json"
        self.data_path = self.path / "data.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics_path = self.path / "metrics.jsonl"
        self.eval = self.path / "eval"
        self.results_path = self.eval / "results.jsonl"
        self.best_path = self.eval / "best.json"
        self.reading_path = self.eval / "reading.json"
        self.cas_path = self.eval / "cas.jsonl"
        self.samples = self.eval / "samples"
        self.profile = self.path / "profile"
        self.early_stop_path = self.path / "EARLY_STOP"
        self.complete_path = self.path / "TRAIN_COMPLETE"

    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.config_path.exists()

    def has_checkpoints(self) -> bool:
        """Whether there is a checkpoint, finished or not."""
        return self.checkpoints.is_dir() and any(
            p.name.isdecimal() for p in self.checkpoints.iterdir()
        )

    def read_config(self) -> RunConfig:
        """The run's config, checked like a new one. JSON only: nothing is executed.

        Raises:
          UserError: there is no run here, or its config cannot be read.
        """
        if not self.exists():
            raise UserError(
                f"--{self._flag}={self.path}: no run there (no config.json); expected a folder that"
                " `python -m cascaded_diffusion.main --workdir=...` has written"
            )
        try:
            values = json.loads(self.config_path.read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{self.config_path}: cannot be read as JSON ({e})") from e
        try:
            return run_config_from(values)
        except UserError as e:
            raise UserError(f"{self.config_path}: {e}") from e

    def check_writable(self) -> None:
        """Raises UserError if the folder cannot be written; leaves no trace."""
        check_writable(self.path, self._flag)

    def write_config(self, config: RunConfig) -> None:
        """Stores the resolved config."""
        write_whole(self.config_path, json.dumps(to_dict(config), indent=2).encode() + b"\n")

    def check_data(self, identity: Mapping[str, str]) -> None:
        """Checks that a run goes on with the images that it began with.

        Args:
          identity: what the images are, by split.

        Raises:
          UserError: others, or more or fewer of them.
        """
        if not self.data_path.exists():
            return
        try:
            begun_with = json.loads(self.data_path.read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{self.data_path}: cannot be read as JSON ({e}); remove it") from e
        for split, now in identity.items():
            before = begun_with.get(split, now) if isinstance(begun_with, dict) else now
            if now != before:
                raise UserError(
                    f"config.data: split {split!r} is {now!r}, but the run in {self.path} was"
                    f" started with {before!r}; bring those images back, or choose another"
                    f" --{self._flag}"
                )

    def write_data(self, identity: Mapping[str, str]) -> None:
        """Stores which images a run is trained on."""
        write_whole(self.data_path, json.dumps(dict(identity), indent=2).encode() + b"\n")

    def best(self) -> dict[str, Any] | None:
        """The record of the checkpoint that evaluation chose, if it has."""
        if not self.best_path.exists():
            return None
        try:
            record = json.loads(self.best_path.read_text())
            return record if record["step"] >= 0 and record["ema_decay"] >= 0 else None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{self.best_path}: not a record of evaluation; remove it and run"
                f" `python -m cascaded_diffusion.evaluate --workdir={self.path}`"
            ) from e

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Keeps the trainer from deleting a checkpoint while it is read.

        What a killed reader leaves behind keeps that one checkpoint until the next.
        """
        write_whole(self.reading_path, json.dumps({"step": step}).encode() + b"\n")
        try:
            yield
        finally:
            self.reading_path.unlink(missing_ok=True)

    def read_step(self) -> int | None:
        """The step that is being read, if any."""
        try:
            return int(json.loads(self.reading_path.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def ask_to_stop(self, patience_evals: int) -> None:
        """Writes EARLY_STOP, saying which patience ran out."""
        record = {"patience_evals": patience_evals}
        write_whole(self.early_stop_path, json.dumps(record).encode() + b"\n")

    def asked_to_stop(self, patience_evals: int) -> bool:
        """Whether EARLY_STOP holds for a run with this patience.

        A run that goes on with more patience than the file speaks of goes on.
        """
        try:
            record = json.loads(self.early_stop_path.read_text())
            return record["patience_evals"] >= patience_evals
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            return True  # somebody's own file: its being there says enough

    def chosen(self) -> Chosen:
        """The checkpoint that evaluation chose.

        Raises:
          UserError: none was chosen yet.
        """
        best = self.best()
        if best is None:
            raise UserError(
                f"{self.path}: no checkpoint was chosen yet; run"
                f" `python -m cascaded_diffusion.evaluate --workdir={self.path}` first"
            )
        return Chosen(step=best["step"], ema_decay=best["ema_decay"])

    def writer_lock(self, role: str) -> contextlib.AbstractContextManager[None]:
        """Holds the folder for one writer of a kind ("train", "eval"): see `held_lock`."""
        return held_lock(self.path, role, self._flag)


class CascadeFolder:
    """A folder of runs that make a cascade. Opening it writes nothing.

    Args:
      path: the folder; a stage's run is the folder of its name in there.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self.sweep = self.path / "sweep"
        self.cascade_path = self.path / "cascade.json"

    def stage_folders(self, section: CascadeSection) -> list[RunFolder]:
        """The runs of a cascade's stages.

        Raises:
          UserError: one is missing; says which command trains it.
        """
        folders = [RunFolder(self.path / name) for name in section.stages]
        for folder, config in zip(folders, section.configs, strict=True):
            if not folder.exists():
                raise UserError(
                    f"--workdir={self.path}: no run {folder.path.name!r} there; train it with"
                    f" `python -m cascaded_diffusion.main --config=configs/{config}"
                    f" --workdir={folder.path}`"
                )
        return folders

    def check_writable(self) -> None:
        """Raises UserError if the folder cannot be written; leaves no trace."""
        check_writable(self.path, "workdir")

    def sweep_lock(self) -> contextlib.AbstractContextManager[None]:
        """Holds the folder for one sweep: see `held_lock`."""
        return held_lock(self.path, "sweep", "workdir")

    def read_cascade(self) -> dict[str, Any]:
        """The cascade that a sweep wrote, as plain values, to be checked like a new one."""
        try:
            return json.loads(self.cascade_path.read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{self.cascade_path}: cannot be read as JSON ({e})") from e

    def write_cascade(self, config: CascadeConfig) -> None:
        """Stores a cascade's config."""
        write_whole(self.cascade_path, json.dumps(to_dict(config), indent=2).encode() + b"\n")
