"""Scoring the checkpoints of a run, and sets of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config import RunConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import early_stopping, generate
from cascaded_diffusion.evaluation.classifier import LabelledImages
from cascaded_diffusion.evaluation.judge import ACCURACY, METRIC, Judge, judged_labels
from cascaded_diffusion.evaluation.trained import TrainedStage, abstract_params
from cascaded_diffusion.runtime import checkpoint, pictures
from cascaded_diffusion.runtime.run_folder import RunFolder, append_line, read_lines, write_whole
from cascaded_diffusion.types import Params

_GRID_COLUMNS, _GRID_ROWS = 20, 5


class RunScorer:
    """Scores every EMA of every finished checkpoint of a run that has no score yet.

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
        previous: TrainedStage | None = None,
    ):
        self._config, self._folder, self._judge, self._mesh = config, folder, judge, mesh
        self._held_out, self._previous = held_out, previous
        self._stage = build_stage(config.stage)
        self._abstract_params = abstract_params(self._stage, mesh)
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
            f"{self._config.stage.name}: best is step {best['step']}, EMA"
            f" {best['ema_decay']:g} ({METRIC} {best['value']:.3f})",
            flush=True,
        )

    def _measurement(self, low_res: str) -> dict[str, Any]:
        """What is measured, without the step: the part of a record that is its identity."""
        config, below = self._config, None
        if low_res.startswith("samples:") and self._previous is not None:
            below = to_dict(self._previous.stage.config.sampler)
        return {
            "num_samples": config.eval.num_samples,
            "reference": self._judge.reference,
            "features": self._judge.features,
            "low_res": low_res,
            "low_res_sampler": below,
            "aug_level": config.eval.aug_level if config.stage.has_level else None,
            "sampler": to_dict(config.stage.sampler),
            "seed": config.eval.seed,
        }

    def _primary(self) -> str:
        """The input by which checkpoints are chosen. Stages are trained independently
        of each other (paper, section 4), so an SR stage is judged on real input."""
        return "none" if self._config.stage.kind == "base" else "real"

    def _sources(self) -> list[str]:
        sources = [self._primary()]
        if self._previous is not None:
            sources.append(f"samples:{self._previous.identity}")
        return sources

    def _score(self, step: int) -> bool:
        """Scores one checkpoint as far as it has no scores. Whether there were any to add.

        A checkpoint that cannot be read, or that makes samples which are not finite,
        is recorded as failed, once, and never chosen.
        """
        scored = [self._score_ema(step, decay) for decay in self._config.eval.ema_decays]
        return any(scored)

    def _score_ema(self, step: int, ema_decay: float) -> bool:
        records = read_lines(self._folder.results_path)
        missing = [
            source
            for source in self._sources()
            if not any(
                r["step"] == step
                for r in early_stopping.series(
                    records, METRIC, self._measurement(source), [ema_decay]
                )
            )
        ]
        if not missing:
            return False
        params: Params | None = None
        for source in missing:
            try:
                if params is None:
                    params = checkpoint.load_ema_params(
                        self._folder, step, ema_decay, self._abstract_params
                    )
                values = self._score_source(step, ema_decay, source, params)
            except (UserError, ValueError) as e:
                if step not in checkpoint.finished_steps(self._folder):
                    print(
                        f"{self._config.stage.name} step {step}: gone, the trainer kept newer ones"
                    )
                    return False
                print(f"{self._config.stage.name} step {step}: failed ({e})", flush=True)
                self._record(step, ema_decay, source, METRIC, None, failed=str(e))
                continue
            for metric, value in values.items():
                self._record(step, ema_decay, source, metric, value)
        return True

    def _record(
        self,
        step: int,
        ema_decay: float,
        source: str,
        metric: str,
        value: float | None,
        **extra: Any,
    ) -> None:
        record = {"step": step, "ema_decay": ema_decay, "metric": metric, "value": value}
        append_line(self._folder.results_path, {**record, **self._measurement(source), **extra})

    def _score_source(
        self, step: int, ema_decay: float, source: str, params: Params
    ) -> dict[str, float]:
        config = self._config
        sampler, labels = self._sampler(source)
        before = [] if self._previous is None else [self._previous.params]
        images = generate.generate(
            sampler,
            [*before, params],
            num_samples=config.eval.num_samples,
            batch_size=config.eval.batch_size,
            label=f"step {step}, EMA {ema_decay:g}, low-res {source}",
        )[-1]
        values = self._judge.scores(images, judged_labels(labels, config.stage.num_classes))
        picture = pictures.grid(images[: _GRID_COLUMNS * _GRID_ROWS], columns=_GRID_COLUMNS)
        kind = source.partition(":")[0]
        several = f"_ema_{ema_decay:g}" if len(config.eval.ema_decays) > 1 else ""
        path = self._folder.eval / f"step_{step}{several}_{kind}.png"
        pictures.save_png(path, picture, scale=2)
        print(
            f"{config.stage.name} step {step}, EMA {ema_decay:g}, low-res {source}: {METRIC}"
            f" {values[METRIC]:.3f} of {len(images)} samples"
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
            read_lines(self._folder.results_path),
            METRIC,
            self._measurement(self._primary()),
            self._config.eval.ema_decays,
        )
        # The trainer keeps the best and the latest: one that it removed before it had
        # a score cannot be chosen any more.
        on_disk = set(checkpoint.finished_steps(self._folder))
        best = early_stopping.best_record([r for r in comparable if r["step"] in on_disk])
        if best is not None:
            write_whole(self._folder.best_path, json.dumps(best, indent=2).encode() + b"\n")
        patience = self._config.eval.patience_evals
        if early_stopping.should_stop(early_stopping.lowest_per_step(comparable), patience):
            self._folder.ask_to_stop(patience)
        return best


def record_for_samples(
    judge: Judge, path: str, images: np.ndarray, labels: np.ndarray, *, num_classes: int
) -> Mapping[str, Any]:
    """The scores of a stored set of samples as one record."""
    return {
        "samples": path,
        "num_samples": len(images),
        "reference": judge.reference,
        "features": judge.features,
        **judge.scores(images, judged_labels(labels, num_classes)),
    }
