"""The run folder: the contract between the binaries.

    RUN/config.json               the resolved config
    RUN/data.json                 which images it is trained on (`run_data`)
    RUN/environment.json          versions, devices and mesh it was last trained with
    RUN/imported.json             where weights are from that others trained (`interchange`)
    RUN/checkpoints/<step>/       Orbax (`checkpoint`), with checksums (`manifest`)
    RUN/saved.json                the step of the newest checkpoint that was completed
    RUN/metrics.jsonl             one line per logged step
    RUN/events.out.tfevents.*     the same for TensorBoard
    RUN/eval/results.jsonl        one line per score
    RUN/eval/best.json            the step chosen
    RUN/eval/reading/<step>.*     checkpoints that are being read (`manifest`)
    RUN/eval/reference_*.npz      statistics of the real images
    RUN/eval/final_*.json, .md    the final numbers of the chosen checkpoint
    RUN/eval/cas.jsonl            classification accuracy scores
    RUN/eval/samples/             samples while they are made
    RUN/eval/*.png, *.npz         sample grids and samples
    RUN/eval/events.out.tfevents.*  scores for TensorBoard
    RUN/nonfinite.jsonl           one line per step that was skipped (`training.nonfinite`)
    RUN/nonfinite/<step>/         the state before a step that ended the training
    RUN/profile/                  traces of single steps (`main --profile_steps`)
    RUN/EARLY_STOP, RUN/TRAIN_COMPLETE

A folder of such runs is a cascade's:

    RUNS/<stage>/                 a run folder
    RUNS/cascade.json             the cascade with the best values that a sweep found
    RUNS/sweep/<stage>.*          its records, table and plot

Files appear under their name whole. Both kinds of folder may be in a bucket, where a `.jsonl` file
consists of parts (`files.line_parts`).
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import CascadeSection, RunConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files import json_files
from cascaded_diffusion.files.bucket import AnyPath, BucketPath, path_of
from cascaded_diffusion.files.locks import Held, held_lock
from cascaded_diffusion.files.paths import check_writable
from cascaded_diffusion.files.whole import move

# What a record must have: best.json, a line of eval/results.jsonl.
_CHOSEN: json_files.Types = {"step": int, "ema_decay": (int, float)}
_SCORE: json_files.Types = {**_CHOSEN, "metric": str, "value": (int, float, type(None))}
# The metric of a checkpoint that was chosen because it was imported.
IMPORTED = "imported"
CONFIG_REMEDY = (
    "bring it back from a backup, or copy the file that the run's command writes into another"
    " --workdir"
)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A checkpoint's step, and which of its EMAs."""

    step: int
    ema_decay: float


class RunFolder:
    """The paths and small files of one run; errors name its `flag`. Opening it writes nothing.

    run = cd.RunFolder("RUN/base16")
    print(run.read_config().stage.name, run.chosen().step)
    """

    def __init__(self, path: str | os.PathLike[str], *, flag: str = "workdir"):
        self.path = path_of(path)
        self._flag = flag
        self._held: list[Held] = []
        self.config_path = self.path / "config.json"
        self.data_path = self.path / "data.json"
        self.environment_path = self.path / "environment.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics_path = self.path / "metrics.jsonl"
        self.eval = self.path / "eval"
        self.reading = self.eval / "reading"
        self.damaged = self.path / "checkpoints_damaged"
        self.results_path = self.eval / "results.jsonl"
        self.best_path = self.eval / "best.json"
        self.saved_path = self.path / "saved.json"
        self.cas_path = self.eval / "cas.jsonl"
        self.samples = self.eval / "samples"
        self.profile = self.path / "profile"
        self.nonfinite = self.path / "nonfinite"
        self.nonfinite_log = self.path / "nonfinite.jsonl"
        self.early_stop_path = self.path / "EARLY_STOP"
        self.complete_path = self.path / "TRAIN_COMPLETE"

    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.config_path.exists()

    def has_checkpoints(self) -> bool:
        """Whether there is a checkpoint, finished or not."""
        there = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return any(path.name.isdecimal() for path in there)

    def read_config(self) -> RunConfig:
        """The run's config, checked like a new one. Raises UserError if it cannot be read."""
        if not self.exists():
            raise UserError(
                f"--{self._flag}={self.path}: no run there (no config.json); expected a folder that"
                " `python -m cascaded_diffusion.main --workdir=...` has written"
            )
        values = json_files.read_json(self.config_path, remedy=CONFIG_REMEDY)
        try:
            return run_config_from(values)
        except UserError as e:
            raise UserError(f"{self.config_path}: {e}") from e

    def check_writable(self) -> None:
        """Raises UserError if the folder cannot be written; leaves no trace."""
        check_writable(self.path, self._flag)

    def write_config(self, config: RunConfig) -> None:
        """Stores the resolved config."""
        json_files.write_json(self.config_path, to_dict(config))

    def best(self) -> json_files.Record | None:
        """The record of the checkpoint that evaluation chose, or None if it has chosen none."""
        if not self.best_path.exists():
            return None
        remedy = f"remove it and run `python -m cascaded_diffusion.evaluate --workdir={self.path}`"
        what = "not a record of evaluation"
        record = json_files.read_record(self.best_path, _CHOSEN, otherwise=what, remedy=remedy)
        return record if record["step"] >= 0 else None

    def best_step(self, *, say: Callable[[str], None] = print) -> int | None:
        """The step of `best`, for a trainer, which sets aside a file that cannot be read."""
        try:
            best = self.best()
        except UserError as e:
            aside = self.best_path.with_name("best.json.damaged")
            say(f"{e}; moved to {aside}")
            move(self.best_path, aside)
            return None
        return None if best is None else best["step"]

    def metrics(self, *, say: Callable[[str], None] | None = None) -> list[json_files.Record]:
        """The lines of metrics.jsonl that have a `step`. `say` is told of other lines."""
        return json_files.read_lines(self.metrics_path, {"step": int}, say=say)

    def scores(self, *, say: Callable[[str], None] | None = None) -> list[json_files.Record]:
        """The scores of checkpoints in eval/results.jsonl. `say` is told of other lines."""
        return json_files.read_lines(self.results_path, _SCORE, say=say)

    def check_held(self) -> None:
        """Raises UserError if a folder that this process has locked has disappeared."""
        if not any(lock.is_lost() for lock in self._held):
            return
        if isinstance(self.path, BucketPath):
            what = "another process has taken its lock over, or removed it, while this one slept"
            raise UserError(f"--{self._flag}={self.path}: {what}; only one may write there")
        raise UserError(
            f"--{self._flag}={self.path}: the folder was moved or removed while this"
            " process was writing to it; bring it back and run the same command again"
        )

    def ask_to_stop(self, patience_evals: int) -> None:
        """Writes EARLY_STOP, saying which patience ran out."""
        json_files.write_json(self.early_stop_path, {"patience_evals": patience_evals}, indent=None)

    def asked_to_stop(self, patience_evals: int) -> bool:
        """Whether EARLY_STOP is there. A run with more patience than the file states goes on."""
        if not self.early_stop_path.exists():
            return False
        patience = self._stop_patience()
        return patience is None or patience >= patience_evals

    def how_to_resume(self) -> str:
        """What the user does to resume a run in spite of EARLY_STOP."""
        if self._stop_patience() is None:  # somebody's own file
            return f"remove {self.early_stop_path}"
        return "run it with a larger --config.eval.patience_evals"

    def _stop_patience(self) -> float | None:
        """The patience that EARLY_STOP states; None if evaluation did not write the file."""
        types = {"patience_evals": (int, float)}
        record = json_files.readable_record(self.early_stop_path, types)
        return None if record is None else record["patience_evals"]

    def forget_imported(self) -> None:
        """Takes the choice back that importing weights made: they are trained further now."""
        best = json_files.readable_record(self.best_path)
        if best is not None and best.get("metric") == IMPORTED:
            self.best_path.unlink(missing_ok=True)

    def chosen(self) -> Chosen:
        """The checkpoint that evaluation chose. Raises UserError if none was chosen yet."""
        best = self.best()
        if best is None:
            raise UserError(
                f"{self.path}: no checkpoint was chosen yet; run"
                f" `python -m cascaded_diffusion.evaluate --workdir={self.path}` first"
            )
        return Chosen(step=best["step"], ema_decay=best["ema_decay"])

    @contextlib.contextmanager
    def writer_lock(self, role: str) -> Iterator[None]:
        """Holds the folder for one writer of a role, as "train" or "eval": see `held_lock`."""
        with held_lock(self.path, role, self._flag) as lock:
            self._held.append(lock)
            try:
                yield
            finally:
                self._held.remove(lock)


def level_picture(final: AnyPath, level: float) -> AnyPath:
    """Where the final numbers in a file have the enlargements at a level of augmentation."""
    return final.with_name(f"{final.stem}_level_{level:g}.png")


class CascadeFolder:
    """A folder of runs that make a cascade, each in a folder of its stage's name."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path_of(path)
        self.sweep = self.path / "sweep"
        self.cascade_path = self.path / "cascade.json"

    def runs(self) -> list[RunFolder]:
        """All runs in folders here, in order of resolution."""
        children = self.path.iterdir() if self.path.is_dir() else ()
        found = [RunFolder(p) for p in children if p.is_dir() and RunFolder(p).exists()]
        return sorted(found, key=lambda f: (f.read_config().stage.resolution, f.path.name))

    def stage_folders(self, section: CascadeSection) -> list[RunFolder]:
        """The runs of a cascade's stages. Raises UserError if one is missing."""
        folders = [RunFolder(self.path / name) for name in section.stages]
        for folder, config in zip(folders, section.configs, strict=True):
            if not folder.exists():
                raise UserError(
                    f"--workdir={self.path}: no run {folder.path.name!r} there; train it with"
                    f" `python -m cascaded_diffusion.main --config=configs/{config}"
                    f" --workdir={folder.path}`"
                )
        return folders

    def read_cascade(self) -> json_files.Record:
        """The cascade that a sweep wrote, as plain values, to be checked like a new one."""
        what, remedy = "not a cascade", "have `evaluate sweep --write_best` write it again"
        return json_files.read_record(self.cascade_path, {}, otherwise=what, remedy=remedy)
