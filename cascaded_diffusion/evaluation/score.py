"""Scoring the checkpoints of a run, and sets of samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.resize import area_resize
from cascaded_diffusion.cascade.stage import Stage, build_stage
from cascaded_diffusion.config import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import early_stopping, generate
from cascaded_diffusion.evaluation.classifier import Classifier, LabelledImages, load_or_train
from cascaded_diffusion.evaluation.frechet import FeatureStatistics, frechet_distance
from cascaded_diffusion.runtime import checkpoint, pictures
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.run_folder import RunFolder, append_line, read_lines, write_whole
from cascaded_diffusion.types import Params

METRIC = "fd_classifier"
ACCURACY = "classifier_accuracy"
_GRID_COLUMNS, _GRID_ROWS = 20, 5


def resized(data: LabelledImages, resolution: int) -> LabelledImages:
    """Data shrunk by the cascade's own area operator and rounded by its own rule."""
    images = uint8_from_float(area_resize(float_from_uint8(data.images), resolution))
    return LabelledImages(np.asarray(images), data.labels)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Feature extractor and reference statistics of one run.

    Attributes:
      classifier: the extractor.
      reference: what the statistics are of, in words; part of every record.
      statistics: of the real training images at the stage's resolution.
    """

    classifier: Classifier
    reference: str
    statistics: FeatureStatistics

    @property
    def features(self) -> str:
        """The extractor's identity; part of every record."""
        return f"classifier:{self.classifier.digest}"

    def scores(self, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """Fréchet distance to the reference, and how many are recognised as their label.

        Args:
          images: uint8 [n, H, W, C] at the stage's resolution.
          labels: int [n], or None for samples without classes.
        """
        features, predictions = self.classifier(images)
        values = {METRIC: frechet_distance(FeatureStatistics.of(features), self.statistics)}
        if labels is not None:
            values[ACCURACY] = float((predictions == labels).mean())
        return values


def build_judge(
    config: RunConfig, folder: RunFolder, train: LabelledImages, held_out: LabelledImages
) -> Judge:
    """The run's judge; its classifier is trained if the folder does not hold it yet."""
    resolution = config.stage.resolution
    train, held_out = resized(train, resolution), resized(held_out, resolution)
    classifier = load_or_train(
        folder.eval / "classifier.npz",
        train,
        held_out,
        num_classes=int(train.labels.max()) + 1,
        seed=config.eval.seed,
    )
    features, _ = classifier(train.images)
    data = config.data
    return Judge(
        classifier=classifier,
        reference=f"{data.name}:{data.train_split}:{len(train.images)}:{resolution}px",
        statistics=FeatureStatistics.of(features),
    )


@dataclasses.dataclass(frozen=True)
class PreviousStage:
    """The stage that feeds a super-resolution run, at its chosen checkpoint."""

    name: str
    step: int
    stage: Stage
    params: Params


def load_previous(folder: RunFolder, mesh: Mesh) -> PreviousStage:
    """The stage of another run at the checkpoint that evaluation chose there."""
    step = folder.best_step()
    stage, params = load_stage(folder, step, mesh)
    return PreviousStage(name=stage.config.name, step=step, stage=stage, params=params)


def load_stage(folder: RunFolder, step: int, mesh: Mesh) -> tuple[Stage, Params]:
    """A run's stage and the EMA parameters of one of its checkpoints, on every device."""
    stage = build_stage(folder.read_config().stage)
    return stage, checkpoint.load_ema_params(folder, step, _abstract_params(stage, mesh))


def _abstract_params(stage: Stage, mesh: Mesh) -> Any:
    sharding = mesh_lib.replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(stage.init, jax.random.key(0)),
    )


class RunScorer:
    """Scores every finished checkpoint of a run that has no score yet.

    Args:
      config: the run's config.
      folder: the run folder.
      judge: from `build_judge`.
      held_out: real images of the evaluation split: a super-resolution stage
        enlarges their low-res versions.
      mesh: the device mesh.
      previous: also score enlargements of this stage's samples.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        judge: Judge,
        held_out: LabelledImages,
        mesh: Mesh,
        *,
        previous: PreviousStage | None = None,
    ):
        self._config, self._folder, self._judge, self._mesh = config, folder, judge, mesh
        self._held_out, self._previous = held_out, previous
        self._stage = build_stage(config.stage)
        self._abstract_params = _abstract_params(self._stage, mesh)
        self._samplers: dict[str, tuple[generate.BatchSampler, np.ndarray]] = {}

    def score_new_checkpoints(self) -> int:
        """Scores what is new; updates best.json and EARLY_STOP. Returns how many were."""
        scored = sum(self._score(step) for step in checkpoint.finished_steps(self._folder))
        best = self._decide()
        if scored and best is not None:
            self.say_best(best)
        return scored

    def say_best(self, best: Mapping[str, Any]) -> None:
        """Prints which checkpoint is the best so far."""
        print(
            f"{self._config.stage.name}: best is step {best['step']} ({METRIC}"
            f" {best['value']:.3f})",
            flush=True,
        )

    def _measurement(self, low_res: str) -> dict[str, Any]:
        """What is measured, without the step: the part of a record that is its identity."""
        config, below = self._config, None
        if low_res.startswith("samples:") and self._previous is not None:
            below = dataclasses.asdict(self._previous.stage.config.sampler)
        return {
            "num_samples": config.eval.num_samples,
            "reference": self._judge.reference,
            "features": self._judge.features,
            "low_res": low_res,
            "low_res_sampler": below,
            "aug_level": config.eval.aug_level if config.stage.augment.name != "none" else None,
            "sampler": dataclasses.asdict(config.stage.sampler),
            "seed": config.eval.seed,
        }

    def _primary(self) -> str:
        """The input by which checkpoints are chosen. Stages are trained independently
        of each other (paper, section 4), so an SR stage is judged on real input."""
        return "none" if self._config.stage.kind == "base" else "real"

    def _sources(self) -> list[str]:
        sources = [self._primary()]
        if self._previous is not None:
            sources.append(f"samples:{self._previous.name}@{self._previous.step}")
        return sources

    def _score(self, step: int) -> bool:
        """Scores one checkpoint on every source that lacks a score. Whether there was one.

        A checkpoint that cannot be read, or that makes samples which are not finite,
        is recorded as failed, once, and never chosen.
        """
        records = read_lines(self._folder.results_path)
        missing = [
            source
            for source in self._sources()
            if not any(
                r["step"] == step
                for r in early_stopping.series(records, METRIC, self._measurement(source))
            )
        ]
        if not missing:
            return False
        for source in missing:
            try:
                values = self._score_source(step, source)
            except (UserError, ValueError) as e:
                if step not in checkpoint.finished_steps(self._folder):
                    print(
                        f"{self._config.stage.name} step {step}: gone, the trainer kept newer ones"
                    )
                    return False
                print(f"{self._config.stage.name} step {step}: failed ({e})", flush=True)
                self._record(step, source, METRIC, None, failed=str(e))
                continue
            for metric, value in values.items():
                self._record(step, source, metric, value)
        return True

    def _record(
        self, step: int, source: str, metric: str, value: float | None, **extra: Any
    ) -> None:
        record = {"step": step, "metric": metric, "value": value, **self._measurement(source)}
        append_line(self._folder.results_path, {**record, **extra})

    def _score_source(self, step: int, source: str) -> dict[str, float]:
        config = self._config
        params = checkpoint.load_ema_params(self._folder, step, self._abstract_params)
        sampler, labels = self._sampler(source)
        before = [] if self._previous is None else [self._previous.params]
        images = generate.generate(
            sampler,
            [*before, params],
            num_samples=config.eval.num_samples,
            batch_size=config.eval.batch_size,
            label=f"step {step}, low-res {source}",
        )[-1]
        values = self._judge.scores(images, labels if config.stage.num_classes else None)
        picture = pictures.grid(images[: _GRID_COLUMNS * _GRID_ROWS], columns=_GRID_COLUMNS)
        kind = source.partition(":")[0]
        pictures.save_png(self._folder.eval / f"step_{step}_{kind}.png", picture, scale=2)
        print(
            f"{config.stage.name} step {step}, low-res {source}: {METRIC} {values[METRIC]:.3f} of"
            f" {len(images)} samples"
            + (f", {100 * values[ACCURACY]:.1f} % recognised" if ACCURACY in values else ""),
            flush=True,
        )
        return values

    def _sampler(self, source: str) -> tuple[generate.BatchSampler, np.ndarray]:
        """The sampler for a source, compiled once for all checkpoints, and its labels."""
        if source not in self._samplers:
            self._samplers[source] = self._make_sampler(source)
        return self._samplers[source]

    def _make_sampler(self, source: str) -> tuple[generate.BatchSampler, np.ndarray]:
        config, stage = self._config, self._stage
        seed, level, mesh = config.eval.seed, config.eval.aug_level, self._mesh
        num_samples = config.eval.num_samples
        labels = generate.class_balanced_labels(num_samples, config.stage.num_classes)
        if source == "real":
            # Spread over the set, which may be sorted by class; each image at most
            # once more often than any other.
            total = len(self._held_out.labels)
            rows = np.arange(num_samples) * total // num_samples % total
            if num_samples > total:
                rows = np.arange(num_samples) % total
            real_labels = self._held_out.labels[rows]
            images = float_from_uint8(self._held_out.images[rows])
            low_res = np.asarray(stage.low_res_from(images))
            sampler = generate.make_enlarging_sampler(
                stage, low_res, real_labels, aug_level=level, seed=seed, mesh=mesh
            )
            return sampler, real_labels
        stages, levels = [stage], []
        if source != "none":
            assert self._previous is not None
            stages, levels = [self._previous.stage, stage], [level]
        cascade = Cascade(
            stages=stages, samplers=[s.config.sampler for s in stages], truncated=False
        )
        sampler = generate.make_cascade_sampler(
            cascade, levels, seed=seed, mesh=mesh, keep_first_stages=True
        )
        return sampler, labels

    def _decide(self) -> Mapping[str, Any] | None:
        """best.json, and EARLY_STOP as patience has it, from the committed records."""
        comparable = early_stopping.series(
            read_lines(self._folder.results_path), METRIC, self._measurement(self._primary())
        )
        # The trainer keeps the best and the latest: one that it removed before it had
        # a score cannot be chosen any more.
        on_disk = set(checkpoint.finished_steps(self._folder))
        best = early_stopping.best_record([r for r in comparable if r["step"] in on_disk])
        if best is not None:
            write_whole(self._folder.best_path, json.dumps(best, indent=2).encode() + b"\n")
        patience = self._config.eval.patience_evals
        if early_stopping.should_stop(comparable, patience):
            self._folder.ask_to_stop(patience)
        return best


def record_for_samples(
    judge: Judge, path: str, images: np.ndarray, labels: np.ndarray
) -> Mapping[str, Any]:
    """The scores of a stored set of samples as one record."""
    return {
        "samples": path,
        "num_samples": len(images),
        "reference": judge.reference,
        "features": judge.features,
        **judge.scores(images, labels),
    }


def cascade_picture(
    cascade: Cascade,
    params: Sequence[Params],
    aug_levels: Sequence[float],
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    real: LabelledImages,
    *,
    seed: int,
    mesh: Mesh,
) -> np.ndarray:
    """A picture of a cascade: real images and their way through it, then samples.

    Args:
      cascade: the stages.
      params: their parameters.
      aug_levels: one per enlargement.
      images: samples uint8 [n, H, W, C] per stage.
      labels: of the samples, [n].
      real: real images; samples of the same classes are shown.
      seed: of the enlargements of the real images.
      mesh: the device mesh.

    Returns:
      uint8 [h, w, 3].
    """
    order = np.argsort(real.labels, kind="stable")
    real = LabelledImages(real.images[order], real.labels[order])
    size = cascade.stages[-1].config.resolution
    rows = [(f"real, {size} px", resized(real, size).images)]
    for i, stage in enumerate(cascade.stages[1:], start=1):
        low = stage.config.low_res_resolution
        rows.append((f"real, {low} px", _shown(resized(real, low).images, size)))
        low_res = np.asarray(stage.low_res_from(float_from_uint8(real.images)))
        level = aug_levels[i - 1]
        sampler = generate.make_enlarging_sampler(
            dataclasses.replace(
                stage, config=dataclasses.replace(stage.config, sampler=cascade.samplers[i])
            ),
            low_res,
            real.labels,
            aug_level=level,
            seed=seed,
            mesh=mesh,
        )
        enlarged = generate.generate(
            sampler,
            [params[i]],
            num_samples=len(real.images),
            batch_size=-(-len(real.images) // mesh.size) * mesh.size,
            label=f"enlarging real {low} px images",
        )[-1]
        caption = f"real {low} px images enlarged by {stage.config.name}, aug_level {level:g}"
        rows.append((caption, _shown(enlarged, size)))
    chosen = _rows_with_labels(labels, real.labels)
    mode = "truncated" if cascade.truncated else "non-truncated"
    for i, (stage, stage_images) in enumerate(zip(cascade.stages, images, strict=True)):
        caption = f"sampled by {stage.config.name}, {stage.config.resolution} px"
        if i > 0:
            caption += f" (from the row above, aug_level {aug_levels[i - 1]:g}, {mode})"
        rows.append((caption, _shown(stage_images[chosen], size)))
    return pictures.labelled_rows(rows)


def _shown(images: np.ndarray, size: int) -> np.ndarray:
    return pictures.enlarge_nearest(images, size)


def _rows_with_labels(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted label the first unused row that has it, or any row at all."""
    free = {label: list(np.flatnonzero(labels == label)[::-1]) for label in set(labels.tolist())}
    return np.asarray(
        [free[w].pop() if free.get(w) else i % len(labels) for i, w in enumerate(wanted.tolist())]
    )
