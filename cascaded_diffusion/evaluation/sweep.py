"""The search after training: one stage of a trained cascade, sampled in many ways and scored.

Every setting is scored with the same seeds and labels and, without truncation, on the same
stored samples of the stages below, which are made once.

    RUN/sweep/<stage>.jsonl          one line per setting
    RUN/sweep/<stage>.md, .png       table and plot
    RUN/sweep/<stage>_<digits>.png   the first samples of a setting, whose line names the file
    RUN/sweep/<stage below>.npz      the samples that are enlarged
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.config.schema import CascadeSection, SamplerConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import Evaluator
from cascaded_diffusion.evaluation.measure import Measurement, metric_name
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_store import (
    Arrays,
    DamagedBatchError,
    SampleStore,
)
from cascaded_diffusion.evaluation.samples.stored_images import save_samples, stored_samples
from cascaded_diffusion.evaluation.score import measure_store
from cascaded_diffusion.evaluation.settings import Setting, first_stages, with_setting
from cascaded_diffusion.evaluation.team import Order, Team, with_features
from cascaded_diffusion.evaluation.trained import TrainedStage
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.json_files import Record, append_line, read_lines
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.mesh import host_array
from cascaded_diffusion.types import Params

# So many samples of a setting are shown, each pixel so wide.
_SHOWN, _SCALE = 10, 2


@dataclasses.dataclass
class Sweep:
    """Scores settings of one stage of a cascade, which are compared by the metric `metric`.

    The trained stages are the cascade's first, up to the one that is swept, and the evaluator is
    of that stage's run. Records, table, plot and stored samples are kept in the folder. Process 0
    calls `run`; the others make the samples of an `order`.
    """

    section: CascadeSection
    trained: Sequence[TrainedStage]
    evaluator: Evaluator
    folder: AnyPath
    mesh: Mesh
    team: Team

    def __post_init__(self) -> None:
        num_samples = self.section.num_samples
        if num_samples < 2:
            wanted = "expected at least 2 to compare settings by"
            raise UserError(f"config.cascade.num_samples = {num_samples}: {wanted}")
        self.section = first_stages(self.section, len(self.trained))
        self.metric = metric_name("fid", self.evaluator.extractor.name, num_samples)
        self._stage, self._index = self.trained[-1].stage, len(self.trained) - 1
        self._name, num_classes = self._stage.config.name, self._stage.config.num_classes
        self._labels = generate.labels_of(np.arange(num_samples), num_classes)
        self._cascade = functools.cache(self._make_cascade)
        self._samples_below = functools.cache(self._read_or_make_below)

    def run(self, settings: Sequence[Setting]) -> list[Record]:
        """Scores settings without a score, writes table and plot; returns a record per setting."""
        rows, path = [], self.folder / f"{self._name}.jsonl"
        for i, setting in enumerate(settings, start=1):
            identity = {
                **self._origin(self._chain(setting)),
                "num_samples": self.section.num_samples,
                "seed": self.section.seed,
                "reference": self.evaluator.reference,
                "features": self.evaluator.extractor.identity,
            }
            record = next((r for r in read_lines(path) if identity.items() <= r.items()), None)
            if record is None:
                label = f"{self._name}, setting {i}/{len(settings)}"
                record = {**identity, **self._score(settings, i - 1, label)}
                append_line(path, record)
            rows.append(record)
            shown = _shown(record, self.metric)
            print(f"{self._name}, {setting}: {self.metric} {shown}", flush=True)
        table = self._table(settings, rows)
        write_whole(self.folder / f"{self._name}.md", table.encode())
        print(f"\n{table}", flush=True)
        self._write_plot(settings, rows)
        return rows

    def _chain(self, setting: Setting) -> CascadeSection:
        chosen = with_setting(self.section, self._index, setting)
        return dataclasses.replace(chosen, truncated=setting.truncated)

    def _score(self, settings: Sequence[Setting], index: int, label: str) -> Record:
        order = self.order(settings[index])
        try:
            try:
                measurement = self._measured(order, index, label)
            except DamagedBatchError:  # what was damaged is made again
                measurement = self._measured(order, index, label)
        except ValueError as e:  # only this setting's samples are not finite
            order.store.remove()
            return {self.metric: None, "failed": str(e)}
        picture = {"picture": self._save_picture(settings[index], order.store)}
        values = {**measurement.distances(self.evaluator.references["train"]), **measurement.own()}
        order.store.remove()
        return picture | values

    def _measured(self, order: Order, index: int, label: str) -> Measurement:
        self.team.fill(order.store, order.make, {"setting": index}, label=label)
        measurement, _ = measure_store(self.evaluator, order.store, self._stage.config.num_classes)
        return measurement

    def _save_picture(self, setting: Setting, store: SampleStore) -> str:
        """Saves the first samples below those that they were made of; returns the file's name."""
        images = store.first(_SHOWN)["images"]
        rows = [(f"sampled by {self._name}, {setting}", images)]
        if (below := self._below(setting)) is not None:
            given = pictures.enlarge_nearest(below[: len(images)], images.shape[1])
            rows.insert(0, (f"what is enlarged, {below.shape[1]} px", given))
        name = f"{self._name}_{store.number:07x}.png"
        pictures.save_png(self.folder / name, pictures.labelled_rows(rows, scale=_SCALE))
        return name

    def _below(self, setting: Setting) -> np.ndarray | None:
        """The stored samples that a setting enlarges, if there are any."""
        # A truncated chain stops below at the setting's own level, so it is sampled as a whole.
        truncates = setting.truncated and self._stage.config.has_aug_level
        return self._samples_below(setting.truncated) if self._index > 0 and not truncates else None

    def order(self, setting: Setting) -> Order:
        """The samples of a setting, to be made by every process."""
        below = self._below(setting)
        first = 0 if below is None else self._index
        chain = self._chain(setting)
        sampler, params = self._sampler(chain, below, first)

        def make(indices: np.ndarray) -> Arrays:
            images = host_array(sampler(params, indices)[-1])
            return {"images": images, "labels": self._labels[indices].astype(np.int64)}

        identity = {
            **self._origin(chain),
            "seed": chain.seed,
            "features": self.evaluator.extractor.identity,
        }
        sizes = {"num_samples": chain.num_samples, "batch_size": chain.batch_size}
        store = SampleStore(self.folder / "samples", identity, **sizes)
        return Order(store, with_features(make, self.evaluator.extractor))

    def _read_or_make_below(self, truncated: bool) -> np.ndarray:
        """The samples to enlarge; `truncated` concerns the enlargements below them."""
        chain = dataclasses.replace(first_stages(self.section, self._index), truncated=truncated)
        name = self.trained[self._index - 1].stage.config.name
        path = self.folder / f"{name}.npz"
        provenance = {**self._origin(chain), "seed": chain.seed}
        images = stored_samples(path, provenance)
        if images is None or len(images) < chain.num_samples:
            sampler, params = self._sampler(chain)
            sizes = {"num_samples": chain.num_samples, "batch_size": chain.batch_size}
            about = f"{name}, to be enlarged"
            images = generate.generate(sampler, params, **sizes, label=about)[-1]
            save_samples(path, images, self._labels, provenance=provenance)
        return images

    def _origin(self, chain: CascadeSection) -> Record:
        """What the samples of the first stages depend on besides the seed."""
        return {
            "stages": [t.identity for t in self.trained[: len(chain.samplers)]],
            "samplers": [to_dict(s) for s in chain.samplers],
            "aug_levels": list(chain.aug_levels),
            "truncated": chain.truncated,
        }

    def _make_cascade(self, samplers: tuple[SamplerConfig, ...], truncated: bool) -> Cascade:
        stages = [t.stage for t in self.trained[: len(samplers)]]
        return Cascade(stages=stages, samplers=samplers, truncated=truncated)

    def _sampler(
        self, chain: CascadeSection, below: np.ndarray | None = None, first: int = 0
    ) -> tuple[generate.BatchSampler, list[Params]]:
        """A sampler of the first stages, and its parameters."""
        cascade = self._cascade(chain.samplers, chain.truncated)
        sampler = generate.make_cascade_sampler(
            cascade, chain.aug_levels, seed=chain.seed, mesh=self.mesh, below=below, first=first
        )
        return sampler, [t.params for t in self.trained[: len(chain.samplers)]]

    def _table(self, settings: Sequence[Setting], rows: Sequence[Record]) -> str:
        """Markdown with the deciding metric first, then the others of the first good row."""
        good = list(next((r for r in rows if r[self.metric] is not None), {self.metric: None}))
        metrics = [m for m in good[good.index(self.metric) :] if "_std_" not in m]
        columns = [*settings[0].describe(), "evaluations", *metrics]
        cells: list[list[object]] = [[*columns]]
        for setting, row in _best_first(settings, rows, self.metric):
            shown = [_shown(row, metric) for metric in metrics]
            evaluations = self._stage.evaluations(setting.sampler)
            cells.append([*setting.describe().values(), evaluations, *shown])
        head, *body = (f"| {' | '.join(map(str, row))} |" for row in cells)
        lines = [
            f"# {self._name}: {self.section.num_samples} samples per setting, best first",
            "",
            head,
            f"|{'---|' * len(columns)}",
            *body,
            "",
            "Evaluations: of the stage's network for one sample, with guidance and Heun's second.",
            "",
            f"Stages: {'; '.join(rows[0]['stages'])}. Reference: {rows[0]['reference']}.",
            "",
        ]
        return "\n".join(lines)

    def _write_plot(self, settings: Sequence[Setting], rows: Sequence[Record]) -> None:
        """The first number that varies along x, one line for every combination of the rest."""
        described = [s.describe() for s in settings]
        varies = [key for key in described[0] if len({d[key] for d in described}) > 1]
        x = next((key for key in varies if key in ("aug_level", "num_steps", "guidance")), None)
        if x is None:
            return
        series: dict[str, list[tuple[float, float]]] = {}
        for d, row in zip(described, rows, strict=True):
            name = ", ".join(f"{key} {d[key]}" for key in varies if key != x) or self._name
            if row[self.metric] is not None:
                series.setdefault(name, []).append((d[x], row[self.metric]))
        path = self.folder / f"{self._name}.png"
        points = {name: sorted(line) for name, line in series.items()}
        write_whole(
            path, pictures.line_plot(points, x_label=x, y_label=self.metric, title=self._name)
        )
        print(f"{path}, {path.with_suffix('.md')}", flush=True)


def _best_first(
    settings: Sequence[Setting], rows: Sequence[Record], metric: str
) -> list[tuple[Setting, Record]]:
    return sorted(
        zip(settings, rows, strict=True),
        key=lambda x: math.inf if x[1][metric] is None else x[1][metric],
    )


def _shown(row: Record, metric: str) -> str:
    value = row.get(metric)
    return f"{value:.3f}" if value is not None else f"failed ({row['failed']})"


def best_setting(settings: Sequence[Setting], rows: Sequence[Record], metric: str) -> Setting:
    """The setting with the lowest metric; the first of equals. Raises UserError if all failed."""
    setting, row = _best_first(settings, rows, metric)[0]
    if row[metric] is None:
        raise UserError(f"`evaluate sweep`: no setting could be scored ({row['failed']})")
    return setting
