"""The final numbers of a chosen checkpoint: one table, one JSON, and the samples themselves.

    RUN/eval/final_<source>.json, .md    FID to the training and to the validation images,
                                         IS and the rest; the health of an enlargement
    RUN/eval/final_<source>.npz          the samples, ADM style
    RUN/eval/final_<source>.png          the first of them
    RUN/eval/final_<source>_level_<s>.png  the same real images, enlarged at an aug_level

The paper reports both distances: if only the one to the training images falls, the model
over-fits.
"""

import json
import platform
from functools import partial
from importlib.metadata import version

import numpy as np

from cascaded_diffusion.evaluation import health
from cascaded_diffusion.evaluation.evaluator import Evaluator
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor
from cascaded_diffusion.evaluation.samples import sample_sources
from cascaded_diffusion.evaluation.samples.sample_store import SampleStore
from cascaded_diffusion.evaluation.samples.stored_images import save_sample_batches
from cascaded_diffusion.evaluation.score import measure_store, save_grid
from cascaded_diffusion.evaluation.team import Order, Team, with_features
from cascaded_diffusion.evaluation.trained import TrainedStage
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.json_files import Record, readable_record, write_json
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.run_folder import RunFolder, level_picture

_LEVEL_COLUMNS = 10  # images of each level that are shown
_NUM_LEVELS = 6  # of conditioning augmentation, at which an enlargement's health is measured


def measure_final(
    folder: RunFolder,
    trained: TrainedStage,
    evaluator: Evaluator,
    sampling: sample_sources.StageSampling,
    source: sample_sources.SampleSource,
    levels: sample_sources.LevelSource | None,
    order: Order,
    team: Team,
) -> Record:
    """Makes and measures the samples of a run's chosen checkpoint; resumes an earlier call.

    `evaluator` has the references "train" and "val". `source` and `levels`, of a stage with a level
    of conditioning augmentation, are of `sampling`, and `order` is `final_order`. Returns the
    content of final_<source>.json.
    """
    stage, path = trained.stage.config, folder.eval / f"final_{source.kind}.json"
    num_samples, references = sampling.num_samples, evaluator.references.items()
    identity = _identity(trained, sampling, source)
    about = {
        "stage": stage.name,
        "step": trained.chosen.step,
        "ema_decay": trained.chosen.ema_decay,
        "num_samples": num_samples,
        **identity,
        "features": evaluator.extractor.identity,
        "references": {role: {"name": r.name, **vars(r.fingerprint)} for role, r in references},
    }
    store = order.store
    if (known := _stored(path, about)) is not None:
        store.remove()
        return known
    team.fill(store, order.make, {}, label=f"{trained.name}, low-res {source.about}")
    measurement, errors = measure_store(evaluator, store, stage.num_classes)
    metrics = {
        f"{metric}_{role}": value
        for role, reference in references
        for metric, value in measurement.distances(reference).items()
    }
    condition: Record = {}
    if (real := evaluator.references["train"].pixels) is not None:
        condition |= health.drift(measurement.sums.pixels, real)
    if errors is not None:
        psnr = health.psnr
        condition["psnr_low_res"] = {"mean": psnr(errors.mean()), "min": psnr(errors.max())}
    if levels is not None:
        spread = np.linspace(0.0, stage.augment.max_level, _NUM_LEVELS).round(6).tolist()
        condition["aug_response"], at_levels = health.response(levels, trained.params, spread)
        for level, images in zip(spread, at_levels, strict=True):
            picture = pictures.grid(images[:_LEVEL_COLUMNS], columns=_LEVEL_COLUMNS)
            pictures.save_png(level_picture(path, level), picture, scale=2)
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    record = {
        **about,
        **source.notes,
        "metrics": metrics | measurement.own(),
        "health": condition,
        "versions": {"python": platform.python_version(), **packages},
    }
    # The numbers of an earlier call must not stand beside these samples.
    path.unlink(missing_ok=True)
    save_grid(path.with_suffix(".png"), store)
    save_sample_batches(
        path.with_suffix(".npz"),
        (num_samples, *store.first(1)["images"].shape[1:]),
        lambda: ((a["images"], a["labels"]) for a in store.batches()),
    )
    # The JSON comes after the table since it says that everything is there, the store after both.
    write_whole(path.with_suffix(".md"), _table(record).encode())
    write_json(path, record)
    store.remove()
    return record


def final_order(
    folder: RunFolder,
    trained: TrainedStage,
    extractor: FeatureExtractor,
    sampling: sample_sources.StageSampling,
    source: sample_sources.SampleSource,
    batch_size: int,
) -> Order:
    """The samples that `measure_final` measures, to be made by every process."""
    identity = {**_identity(trained, sampling, source), "features": extractor.identity}
    sizes = {"num_samples": sampling.num_samples, "batch_size": batch_size}
    store = SampleStore(folder.samples, identity, **sizes)
    return Order(store, with_features(partial(source.make, trained.params), extractor))


def _identity(
    trained: TrainedStage,
    sampling: sample_sources.StageSampling,
    source: sample_sources.SampleSource,
) -> Record:
    return {**source.record, "seed": sampling.seed, "weights": trained.identity}


def _stored(path: AnyPath, about: Record) -> Record | None:
    """The stored numbers, if they are of exactly the same samples and references."""
    record, wanted = readable_record(path), json.loads(json.dumps(about))
    same = record is not None and wanted.items() <= record.items()
    whole = all(path.with_suffix(suffix).exists() for suffix in (".npz", ".md"))
    return record if same and whole else None


def _table(record: Record) -> str:
    num_real = record.get("num_real_low_res", record["num_samples"])
    of_how_many = f" ({num_real} images)" if num_real < record["num_samples"] else ""
    lines = [
        f"# {record['stage']}, step {record['step']}, EMA {record['ema_decay']:g}:"
        f" {record['num_samples']} samples",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in record["metrics"].items()),
        "",
        f"Low-res input: {record['low_res']}{of_how_many}; aug_level {record['aug_level']},"
        f" truncated {record['truncated']}; {record['sampler']['name']},"
        f" {record['sampler']['num_steps']} steps; seed {record['seed']}.",
        "",
        f"Features: {record['features']}.",
        "",
        *(f"Reference {role}: {r['name']}." for role, r in record["references"].items()),
        "",
        *(f"{name}: {json.dumps(value)}" for name, value in record["health"].items()),
        "",
    ]
    return "\n".join(lines)
