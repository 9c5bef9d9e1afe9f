"""The search after training: one stage of a trained cascade, sampled in many ways and scored.

Every setting is scored with the same seeds and labels and, without truncation, on the same
stored samples of the stages below, which are made once.

    RUN/sweep/<stage>.jsonl          one line per setting
    RUN/sweep/<stage>.md, .png       table and plot
    RUN/sweep/<stage below>.npz      the samples that are enlarged
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.config.schema import CascadeSection, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import Evaluator, evaluated_labels
from cascaded_diffusion.evaluation.measure import metric_name
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.stored_images import save_samples, stored_samples
from cascaded_diffusion.evaluation.settings import Setting, with_setting
from cascaded_diffusion.evaluation.trained import TrainedStage
from cascaded_diffusion.files.json_files import append_line, read_lines
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime.plots import line_plot


class Sweep:
    """Scores settings of one stage of a cascade.

    Args:
      section: the cascade.
      trained: its stages up to the one that is swept.
      evaluator: of that stage's run.
      folder: where records, table, plot and stored samples are kept.
      mesh: the device mesh.
      num_samples: per setting, at least 2.
      batch_size: of sampling.

    Attributes:
      metric: the name of the metric by which settings are compared.
    """

    def __init__(
        self,
        section: CascadeSection,
        trained: Sequence[TrainedStage],
        evaluator: Evaluator,
        folder: pathlib.Path,
        mesh: Mesh,
        *,
        num_samples: int,
        batch_size: int,
    ):
        if num_samples < 2:
            raise UserError(
                f"config.cascade.num_samples = {num_samples}: expected at least 2 to compare"
                " settings by"
            )
        self._section, self._trained = section, trained
        self._evaluator, self._mesh = evaluator, mesh
        self._folder, self._num_samples = folder, num_samples
        self._index = len(trained) - 1
        self._name = trained[-1].stage.config.name
        self._params = [t.params for t in trained]
        self._num_classes = trained[0].stage.config.num_classes
        self._labels = generate.class_balanced_labels(num_samples, self._num_classes)
        self.metric = metric_name("fid", evaluator.extractor.name, num_samples)
        self._programs: dict[Any, tuple[Cascade, Callable[..., Any]]] = {}
        self._samples_below = functools.cache(self._read_or_make_below)
        self._generate = functools.partial(
            generate.generate, num_samples=num_samples, batch_size=batch_size
        )
        self._records_path = folder / f"{self._name}.jsonl"

    def run(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Scores settings without a score, writes table and plot; returns a record per setting."""
        rows = []
        for i, setting in enumerate(settings, start=1):
            record = self._stored(setting)
            if record is None:
                record = self._score(setting, f"{self._name}, setting {i}/{len(settings)}")
                append_line(self._records_path, record)
            rows.append(record)
            print(
                f"{self._name}, {setting}: {self.metric} {_shown(record, self.metric)}", flush=True
            )
        self._write_table(settings, rows)
        self._write_plot(settings, rows)
        return rows

    def _cascade(self, setting: Setting) -> tuple[Cascade, Callable[..., Any]]:
        """The cascade of a setting and its sampler, compiled once for all levels."""
        key = (setting.truncated, setting.sampler)
        if key not in self._programs:
            cascade = Cascade(
                stages=[t.stage for t in self._trained],
                samplers=[*self._section.samplers[: self._index], setting.sampler],
                truncated=setting.truncated,
            )
            self._programs[key] = (cascade, cascade.make_sampler())
        return self._programs[key]

    def _levels(self, setting: Setting) -> list[float]:
        levels = with_setting(self._section, self._index, setting).aug_levels
        return list(levels[: self._index])

    def _identity(self, setting: Setting) -> dict[str, Any]:
        """Everything that the scores depend on."""
        return {
            "stages": [t.identity for t in self._trained],
            "samplers": [
                to_dict(s) for s in (*self._section.samplers[: self._index], setting.sampler)
            ],
            "aug_levels": self._levels(setting),
            "truncated": setting.truncated,
            "num_samples": self._num_samples,
            "seed": self._section.seed,
            "reference": self._evaluator.reference,
            "features": self._evaluator.features,
        }

    def _stored(self, setting: Setting) -> dict[str, Any] | None:
        wanted = self._identity(setting)
        for record in read_lines(self._records_path):
            if all(record.get(key) == value for key, value in wanted.items()):
                return record
        return None

    def _score(self, setting: Setting, label: str) -> dict[str, Any]:
        cascade, sample = self._cascade(setting)
        # A truncated chain stops below at the setting's own level, so it is sampled as a whole.
        truncates = setting.truncated and self._trained[-1].stage.config.has_aug_level
        stored = {}
        if self._index > 0 and not truncates:
            stored = dict(below=self._samples_below(setting.truncated), first=self._index)
        sampler = generate.make_cascade_sampler(
            cascade,
            self._levels(setting),
            seed=self._section.seed,
            mesh=self._mesh,
            sample=sample,
            **stored,
        )
        try:
            images = self._generate(sampler, self._params, label=label)[-1]
        except ValueError as e:  # only this setting's samples are not finite
            return {**self._identity(setting), self.metric: None, "failed": str(e)}
        scores = self._evaluator.scores(images, evaluated_labels(self._labels, self._num_classes))
        return {**self._identity(setting), **scores}

    def _read_or_make_below(self, truncated: bool) -> np.ndarray:
        """The samples to enlarge; `truncated` concerns the enlargements below them."""
        below = self._trained[:-1]
        name = below[-1].stage.config.name
        provenance = {
            "stages": [t.identity for t in below],
            "samplers": [to_dict(s) for s in self._section.samplers[: len(below)]],
            "aug_levels": list(self._section.aug_levels[: len(below) - 1]),
            "truncated": truncated,
            "seed": self._section.seed,
        }
        path = self._folder / f"{name}.npz"
        images = stored_samples(path, provenance)
        if images is not None and len(images) >= self._num_samples:
            return images
        cascade = Cascade(
            stages=[t.stage for t in below],
            samplers=self._section.samplers[: len(below)],
            truncated=truncated,
        )
        sampler = generate.make_cascade_sampler(
            cascade,
            self._section.aug_levels[: len(below) - 1],
            seed=self._section.seed,
            mesh=self._mesh,
        )
        images = self._generate(sampler, self._params[:-1], label=f"{name}, to be enlarged")[-1]
        save_samples(path, images, self._labels, provenance=provenance)
        return images

    def _write_table(self, settings: Sequence[Setting], rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(settings[0].describe())
        metrics = _metrics_of(rows, self.metric)
        lines = [
            f"# {self._name}: {self._num_samples} samples per setting, best first",
            "",
            f"| {' | '.join([*columns, 'evaluations', *metrics])} |",
            f"|{'---|' * (len(columns) + 1 + len(metrics))}",
        ]
        stage = self._trained[-1].stage
        for setting, row in sorted(
            zip(settings, rows, strict=True), key=lambda x: _rank(x[1], self.metric)
        ):
            cells = [str(v) for v in setting.describe().values()]
            cells.append(str(stage.evaluations(setting.sampler)))
            cells += [_shown(row, m) for m in metrics]
            lines.append(f"| {' | '.join(cells)} |")
        about = (
            "Evaluations: of the stage's network for one sample, with guidance and Heun's second."
        )
        origin = f"Stages: {'; '.join(rows[0]['stages'])}. Reference: {rows[0]['reference']}."
        text = "\n".join([*lines, "", f"{about}.", "", origin, ""])
        write_whole(self._folder / f"{self._name}.md", text.encode())
        print(f"\n{text}", flush=True)

    def _write_plot(self, settings: Sequence[Setting], rows: Sequence[Mapping[str, Any]]) -> None:
        """The first number that varies along x, one line for every combination of the rest."""
        described = [s.describe() for s in settings]
        varies = [key for key in described[0] if len({d[key] for d in described}) > 1]
        numbers = [key for key in varies if key in ("aug_level", "num_steps", "guidance")]
        if not numbers:
            return
        x = numbers[0]
        series: dict[str, list[tuple[float, float]]] = {}
        for d, row in zip(described, rows, strict=True):
            name = ", ".join(f"{key} {d[key]}" for key in varies if key != x) or self._name
            if row[self.metric] is not None:
                series.setdefault(name, []).append((d[x], row[self.metric]))
        path = self._folder / f"{self._name}.png"
        plot = line_plot(
            {name: sorted(points) for name, points in series.items()},
            x_label=x,
            y_label=self.metric,
            title=self._name,
        )
        write_whole(path, plot)
        print(f"{path}, {path.with_suffix('.md')}", flush=True)


def _metrics_of(rows: Sequence[Mapping[str, Any]], primary: str) -> list[str]:
    """The columns of a table: the deciding metric, then the others of the first good row."""
    good = next((row for row in rows if row[primary] is not None), {primary: None})
    names = list(good)[list(good).index(primary) :]
    return [name for name in names if "_std_" not in name]


def _rank(row: Mapping[str, Any], metric: str) -> float:
    return math.inf if row[metric] is None else row[metric]


def _shown(row: Mapping[str, Any], metric: str) -> str:
    value = row.get(metric)
    return f"{value:.3f}" if value is not None else f"failed ({row['failed']})"


def best_setting(
    settings: Sequence[Setting], rows: Sequence[Mapping[str, Any]], metric: str
) -> Setting:
    """The setting with the lowest metric; the first of equals.

    Raises:
      UserError: every one of them failed.
    """
    setting, row = min(zip(settings, rows, strict=True), key=lambda x: _rank(x[1], metric))
    if row[metric] is None:
        raise UserError(f"--sweep: no setting could be scored ({row['failed']})")
    return setting
