"""Scoring a run's checkpoints as they appear, and choosing the best."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import early_stopping, health
from cascaded_diffusion.evaluation.evaluator import Evaluator, evaluated_labels
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor
from cascaded_diffusion.evaluation.measure import Measurement, counted, metric_name
from cascaded_diffusion.evaluation.samples.sample_sources import SampleSource
from cascaded_diffusion.evaluation.samples.sample_store import (
    Arrays,
    DamagedBatchError,
    SampleStore,
)
from cascaded_diffusion.evaluation.team import Order, Team, features_in, with_features
from cascaded_diffusion.evaluation.trained import abstract_params, checkpoint_digest
from cascaded_diffusion.files.bucket import AnyPath, OverwrittenError
from cascaded_diffusion.files.json_files import Record, append_line, write_json
from cascaded_diffusion.files.whole import generation_of
from cascaded_diffusion.runtime import checkpoint, pictures
from cascaded_diffusion.runtime.manifest import finished_steps, is_finished, pinned
from cascaded_diffusion.runtime.metric_writer import ScoreCurves
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.types import Params

_GRID_ROWS, _GRID_COLUMNS = 5, 20


@dataclasses.dataclass(frozen=True)
class _Weights:
    """One EMA of a checkpoint; a step that was trained again has another digest."""

    step: int
    ema_decay: float
    digest: str


@dataclasses.dataclass
class SampleWork:
    """How samples of a run's checkpoints are made, by whichever process."""

    config: RunConfig
    folder: RunFolder
    sources: Sequence[SampleSource]
    extractor: FeatureExtractor
    mesh: Mesh

    def __post_init__(self) -> None:
        self._abstract_params = abstract_params(build_stage(self.config.stage), self.mesh)
        self._loaded: tuple[_Weights, Params] | None = None

    def params(self, weights: _Weights) -> Params:
        """The parameters, loaded once in a row. Raises UserError like `load_ema_params`."""
        if self._loaded is None or self._loaded[0] != weights:
            self._loaded = None  # two at a time may not fit
            which = (weights.step, weights.ema_decay)
            params = checkpoint.load_ema_params(self.folder, *which, self._abstract_params)
            self._loaded = weights, params
        return self._loaded[1]

    def order(self, weights: _Weights, source: SampleSource) -> Order:
        """The samples of a source."""
        store = SampleStore(self.folder.samples, self._identity(weights, source), **self._sizes())

        def make(indices: np.ndarray) -> Arrays:
            return source.make(self.params(weights), indices)

        return Order(store, with_features(make, self.extractor))

    def discard(self, weights: _Weights, source: SampleSource) -> None:
        """Deletes what a process has left that was killed after it had recorded the samples."""
        identity = self._identity(weights, source)
        SampleStore.discard(self.folder.samples, identity, **self._sizes())

    def _identity(self, weights: _Weights, source: SampleSource) -> Record:
        of_weights = {"weights": weights.digest, "ema": weights.ema_decay}
        features = self.extractor.identity
        return {**source.record, "seed": self.config.eval.seed, **of_weights, "features": features}

    def _sizes(self) -> dict[str, int]:
        settings = self.config.eval
        return {"num_samples": settings.num_samples, "batch_size": settings.batch_size}

    def understand(self, record: Record) -> Order:
        """The samples that `RunScorer` orders."""
        weights = _Weights(record["step"], record["ema_decay"], record["weights"])
        return self.order(weights, self.sources[record["source"]])


@dataclasses.dataclass
class RunScorer:
    """Scores every EMA of every finished checkpoint of a run that has no score yet.

    Checkpoints are chosen by the first source of samples: for a super-resolution stage that should
    be real low-res images, since stages are trained independently of each other (paper, section 4).
    """

    config: RunConfig
    folder: RunFolder
    evaluator: Evaluator
    sources: Sequence[SampleSource]
    mesh: Mesh
    team: Team | None = None  # None: this process alone

    def __post_init__(self) -> None:
        num_samples, extractor = self.config.eval.num_samples, self.evaluator.extractor
        self._metric = metric_name("fid", extractor.name, num_samples)
        self._work = SampleWork(self.config, self.folder, self.sources, extractor, self.mesh)
        self._team = Team(self.folder) if self.team is None else self.team
        self._curves = ScoreCurves(self.folder)
        self._unreadable: set[_Weights] = set()  # which this process has tried to read

    def score_new_checkpoints(self) -> int:
        """Scores new checkpoints, updates best.json and EARLY_STOP; returns how many were new."""
        scored, looked_at = 0, set()
        # The trainer may delete checkpoints before their turn; newer ones then take their place.
        while steps := set(finished_steps(self.folder)) - looked_at:
            looked_at |= steps
            outcomes = [self._score(step) for step in sorted(steps)]
            scored += outcomes.count("scored")
            if scored or "known" in outcomes:
                break
        best = self._decide()
        if scored and best is not None:
            self.say_best(best)
        return scored

    def say_best(self, best: Record) -> None:
        """Prints which checkpoint is the best so far."""
        which = f"step {best['step']}, EMA {best['ema_decay']:g}"
        score = f"{best['metric']} {best['value']:.3f}"
        print(f"{self.config.stage.name}: best is {which} ({score})", flush=True)

    def close(self) -> None:
        """Closes the file of the curves."""
        self._curves.close()

    def _identity(self, source: SampleSource) -> Record:
        """The part of a record that says what was measured, without the step."""
        return {
            "num_samples": self.config.eval.num_samples,
            "reference": self.evaluator.reference,
            "features": self.evaluator.extractor.identity,
            **source.record,
            "seed": self.config.eval.seed,
        }

    def _score(self, step: int) -> str:
        """Scores what is missing of a checkpoint; returns "scored", "known" or "gone".

        A checkpoint that cannot be read, or whose samples are not finite, is recorded as failed
        once and is not chosen. The next process tries again to read it, as it may be repaired.
        """
        with pinned(self.folder, step) as is_there:
            if not is_there:
                return self._gone(step)
            try:
                digest = checkpoint_digest(self.folder, self.config.stage, step)
            except OSError:
                return self._gone(step)
            weights = [_Weights(step, decay, digest) for decay in self.config.eval.ema_decays]
            outcomes = list(map(self._score_ema, weights))
            if "scored" in outcomes:
                # The checkpoint cannot be deleted yet, and the best one is kept from here on.
                self._decide()
        return next((o for o in ("gone", "scored") if o in outcomes), "known")

    def _gone(self, step: int) -> str:
        print(f"{self.config.stage.name} step {step}: gone, the trainer kept newer ones")
        return "gone"

    def _score_ema(self, weights: _Weights) -> str:
        missing = []
        for source in self.sources:
            if self._recorded(weights, source, self._metric):
                self._work.discard(weights, source)
                continue
            order, readable = self._work.order(weights, source), False
            try:
                self._work.params(weights)
                readable = True
                try:
                    values = self._score_source(weights, source, order)
                except DamagedBatchError:  # what was damaged is made again
                    values = self._score_source(weights, source, order)
            except (UserError, ValueError, OSError) as e:
                if not is_finished(self.folder, weights.step):  # somebody removed it
                    return self._gone(weights.step)
                if isinstance(e, OSError):  # a full disk, say: not the checkpoint's fault
                    raise UserError(f"{self.folder.eval}: {e}; run the same command again") from e
                print(f"{self.config.stage.name} step {weights.step}: failed ({e})", flush=True)
                if not readable:
                    self._unreadable.add(weights)
                    if self._recorded(weights, source, self._metric):
                        continue  # by an earlier process, and it is as it was
                missing.append(source)
                failed = dict(failed=str(e), unreadable=not readable)
                self._record(weights, source, {self._metric: None}, **failed)
                continue
            missing.append(source)
            self._record(weights, source, values)
            order.store.remove()
        return "scored" if missing else "known"

    def _recorded(self, weights: _Weights, source: SampleSource, metric: str) -> bool:
        like, decays = self._identity(source), [weights.ema_decay]
        comparable = early_stopping.series(self.folder.scores(), metric, like, decays)
        wanted = (weights.step, weights.digest)
        found = [r for r in comparable if (r["step"], r.get("weights")) == wanted]
        return any(not r.get("unreadable") or weights in self._unreadable for r in found)

    def _record(
        self,
        weights: _Weights,
        source: SampleSource,
        values: dict[str, float | None],
        **extra: str | bool,
    ) -> None:
        # The metric that marks a source as done comes last. If this process ends before it, no
        # other metric is lost or recorded twice.
        for metric in sorted(values, key=lambda name: name == self._metric):
            if self._recorded(weights, source, metric):
                continue
            self.folder.check_held()
            record = {
                "step": weights.step,
                "ema_decay": weights.ema_decay,
                "metric": metric,
                "value": values[metric],
                "weights": weights.digest,
                **self._identity(source),
                **source.notes,
                **extra,
            }
            append_line(self.folder.results_path, record)
            self._curves.add(record)

    def _score_source(
        self, weights: _Weights, source: SampleSource, order: Order
    ) -> dict[str, float]:
        store = order.store
        about = f"step {weights.step}, EMA {weights.ema_decay:g}, low-res {source.about}"
        what = {"step": weights.step, "ema_decay": weights.ema_decay, "weights": weights.digest}
        what["source"] = self.sources.index(source)
        self._team.fill(store, order.make, what, label=about)
        measurement, errors = measure_store(self.evaluator, store, self.config.stage.num_classes)
        values = {**measurement.distances(self.evaluator.references["train"]), **measurement.own()}
        if errors is not None:
            values[counted("psnr_low_res", store.num_samples)] = health.psnr(errors.mean())
        several = f"_ema_{weights.ema_decay:g}" if len(self.config.eval.ema_decays) > 1 else ""
        save_grid(self.folder.eval / f"step_{weights.step}{several}_{source.kind}.png", store)
        shown = [f"{name} {x:.4g}" for name, x in values.items() if "_std_" not in name]
        print(f"{self.config.stage.name} {about}: {', '.join(shown)}", flush=True)
        return values

    def _decide(self) -> Record | None:
        """Writes best.json, and EARLY_STOP if patience has run out, from the stored records."""
        settings, like = self.config.eval, self._identity(self.sources[0])
        seen = generation_of(self.folder.best_path)
        scores, decays = self.folder.scores(), settings.ema_decays
        comparable = early_stopping.series(scores, self._metric, like, decays)
        # The trainer keeps the best and the latest ones; a checkpoint that it removed before it
        # had a score cannot be chosen.
        on_disk = set(finished_steps(self.folder))
        best = early_stopping.best_record([r for r in comparable if r["step"] in on_disk])
        if best is not None:
            try:
                write_json(self.folder.best_path, best, expected=seen)
            except OverwrittenError:  # the trainer has moved a damaged one away
                return self._decide()
        of_steps = early_stopping.lowest_per_step(comparable)
        if early_stopping.should_stop(of_steps, settings.patience_evals):
            self.folder.ask_to_stop(settings.patience_evals)
        return best


def measure_store(
    evaluator: Evaluator, store: SampleStore, num_classes: int
) -> tuple[Measurement, np.ndarray | None]:
    """The sums over a full store, and `low_res_errors` of its images if they are enlargements.

    Its batches are of `with_features`.
    """
    measurement, errors = evaluator.measurement(store.num_samples), []
    for arrays in store.batches():
        labels = evaluated_labels(arrays["labels"], num_classes)
        measurement.add(arrays["images"], labels, features_in(arrays))
        if "low_res" in arrays:
            errors.append(health.low_res_errors(arrays["images"], arrays["low_res"]))
    return measurement, np.concatenate(errors) if errors else None


def save_grid(path: AnyPath, store: SampleStore) -> None:
    """Writes a picture of the first samples of a store."""
    images = store.first(_GRID_ROWS * _GRID_COLUMNS)["images"]
    pictures.save_png(path, pictures.grid(images, columns=_GRID_COLUMNS), scale=2)
