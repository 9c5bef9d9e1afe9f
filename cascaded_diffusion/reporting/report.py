"""The page of a run, or of all the runs of a cascade, read from their folders."""

import bisect
import collections
import datetime
import itertools
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from xml.etree.ElementTree import Element

from cascaded_diffusion.config.schema import to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.json_files import Record, read_lines, readable_record
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.reporting.page import (
    element,
    key_values,
    page,
    picture,
    picture_file,
    quiet,
    samples_file,
    slider,
    table,
)
from cascaded_diffusion.runtime.pictures import line_plot
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder, level_picture

_PACKAGES = ("cascaded_diffusion", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The scalars of training that are plotted, and whether on a log scale.
_CURVES = {"loss": True, "grad_norm": True, "images_per_sec": False}
_MAX_POINTS = 2000
_MAX_STEPS = 12  # checkpoints whose samples are shown


def write_report(output: AnyPath, root: AnyPath, runs: Sequence[RunFolder]) -> None:
    """Writes the page of `runs`, which `runs_in(root)` found, to a file."""
    # Names that are not UTF-8 are shown with escapes.
    write_whole(output, report_of(root, runs).encode(errors="backslashreplace"))


def report_of(root: AnyPath, runs: Sequence[RunFolder]) -> str:
    """The page of `runs`, which `runs_in(root)` found."""
    parts = [*_about(), *_cascade_parts(CascadeFolder(root))]
    if len(runs) > 1:
        parts += _together(runs)
    for run in runs:
        parts += _run_parts(run)
    title = f"{root.resolve().name}: {', '.join(r.read_config().stage.name for r in runs)}"
    return page(title, parts)


def runs_in(root: AnyPath) -> list[RunFolder]:
    """The run in a folder, or those in its folders, in order of resolution.

    Raises UserError if there is none.
    """
    if RunFolder(root).exists():
        return [RunFolder(root)]
    folders = CascadeFolder(root).runs()
    if not folders:
        raise UserError(
            f"--workdir={root}: no run there, nor in a folder in it; expected a folder that"
            " `python -m cascaded_diffusion.main --workdir=...` has written"
        )
    return folders


def _about() -> list[Element]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {"written": now, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return [element("h2", "About this page"), key_values(versions)]


def _together(runs: Sequence[RunFolder]) -> list[Element]:
    """The curves of several runs over each other: of training, and of the first score."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = collections.defaultdict(dict)
    for run in runs:
        for name in _CURVES:
            if points := _points(run.metrics(), name):
                curves[name][run.path.name] = points
        scores: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
        groups = _by_settings(run.scores(), _best(run))
        for r in groups[0] if groups else ():
            if r["metric"].startswith(("fid_", "fd_")) and _is_number(r["value"]):
                scores[f"{r['metric']}, low-res {_source(r) or 'none'}"].append(
                    (r["step"], r["value"])
                )
        for metric, points in scores.items():
            curves[metric][run.path.name] = sorted(points)
    parts = [
        picture(
            line_plot(
                series,
                x_label="step",
                y_label=name.partition(",")[0],
                title=name.replace("_", " "),
                markers=name not in _CURVES,
                log_scale=_CURVES.get(name, False)
                and all(y > 0 for points in series.values() for _, y in points),
            ),
            f"{name} of {', '.join(series)}",
        )
        for name, series in curves.items()
        if len(series) > 1
    ]
    return [element("h2", "All runs over each other"), *parts] if parts else []


def _points(lines: Sequence[Record], name: str) -> list[tuple[int, float]]:
    """A scalar over steps, thinned out to what a plot shows."""
    points = [(r["step"], r[name]) for r in lines if _is_number(r.get(name))]
    return points[:: -(-len(points) // _MAX_POINTS)] if points else []


def _cascade_parts(runs: CascadeFolder) -> list[Element]:
    """What a folder of runs has besides the runs: samples, sweeps, the chosen cascade."""
    parts = []
    samples = runs.path / "samples" / "samples.png"
    if samples.exists():
        caption = "Real images, their enlargement, and the cascade's samples"
        parts += [element("h2", "Samples of the cascade"), samples_file(samples, caption)]
        if (classes := samples.with_name("classes.png")).exists():
            parts.append(samples_file(classes, "The first samples of every class, not selected"))
    if runs.cascade_path.exists():
        caption = "cascade.json, as a sweep wrote it"
        parts += [element("h2", "The cascade"), key_values(runs.read_cascade(), caption=caption)]
    for path in sorted(runs.sweep.glob("*.jsonl")):
        title = f"Sweep of {path.stem}"
        parts.append(element("h2", title))
        if (plot := path.with_suffix(".png")).exists():
            parts.append(picture_file(plot, title))
        records = read_lines(path)
        if shown := _settings_shown(path, records):
            parts.append(slider("setting", shown))
        records = [_sampler_of(r) | r for r in records]
        hidden = ("samplers", "reference", "features", "picture")
        columns = [key for key in dict.fromkeys(itertools.chain(*records)) if key not in hidden]
        rows = [[_words(record.get(column)) for column in columns] for record in records]
        parts.append(table(columns, rows) if rows else element("p", "No setting was scored yet."))
    return parts


def _words(value: object) -> object:
    """What a list or a record holds, for a cell of a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {x}" for name, x in value.items() if x is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _sampler_of(record: Record) -> Record:
    """How a sweep sampled its stage, the last one."""
    samplers = record.get("samplers")
    last = samplers[-1] if isinstance(samplers, list) and samplers else None
    names = ("name", "num_steps", "guidance_scale")
    return {name: last.get(name) for name in names} if isinstance(last, dict) else {}


def _settings_shown(path: AnyPath, records: Sequence[Record]) -> list[tuple[str, AnyPath]]:
    """The pictures of a sweep's settings, by what these are, in order of their levels."""
    shown = []
    for r in records:
        name, levels = str(r.get("picture")), r.get("aug_levels")
        if not re.fullmatch(r"[^/\\]+\.png", name) or not path.with_name(name).is_file():
            continue
        distances = (k for k in r if k.startswith(("fid_", "fd_")) and _is_number(r[k]))
        caption = f"aug_levels {levels}, truncated {r.get('truncated')}"
        caption += "".join(f", {k} {r[k]:.4g}" for k in itertools.islice(distances, 1))
        shown.append((str(levels), caption, path.with_name(name)))
    return [(caption, file) for _, caption, file in sorted(shown, key=lambda x: x[:2])]


def _run_parts(folder: RunFolder) -> list[Element]:
    """The run's state, curves, scores, final numbers, health and config."""
    config = folder.read_config()
    stage, data = config.stage, config.data
    kind = f"{stage.resolution} px {stage.kind.replace('_', '-')} stage"
    if stage.low_res_resolution:
        kind += f", from {stage.low_res_resolution} px"
    about = {
        "what": kind,
        "classes": stage.num_classes or "none",
        "data": f"{data.name}, {data.train_split} / {data.eval_split}",
        "state": _state(folder, config.train.train_steps),
        "folder": folder.path,
    }
    records, best = folder.scores(say=_warn), _best(folder)
    again = f"python -m cascaded_diffusion.main --config=CONFIG --workdir={folder.path}"
    return [
        element("h2", stage.name),
        key_values(about),
        *_section("Training", lambda: _training(folder)),
        *_section("Scores over checkpoints", lambda: _scores(records, best)),
        *_section("Final numbers", lambda: _final(folder)),
        *_section("Classification accuracy score", lambda: _cas(folder)),
        *_section("Bits per dimension", lambda: _bits(records)),
        *_section("Samples", lambda: _samples(folder, best)),
        element("h3", "Config"),
        element("p", "The resolved config, config.json, of ", element("code", again)),
        key_values(to_dict(config)),
    ]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _section(title: str, build: Callable[[], Iterable[Element]]) -> list[Element]:
    """A heading and its parts, or a note if a file holds something that no binary writes."""
    heading = element("h3", title)
    try:
        return [heading, *build()]
    except UserError as e:
        problem = str(e)
    except (TypeError, ValueError, AttributeError, LookupError) as e:
        problem = f"a file in the run folder holds what no binary writes ({e})"
    _warn(problem)
    return [heading, quiet(f"Cannot be shown: {problem}.")]


def _state(folder: RunFolder, train_steps: int) -> str:
    step = max((record["step"] for record in folder.metrics(say=_warn)), default=0)
    at = f"at step {step} of {train_steps}"
    if folder.complete_path.exists():
        reason = (readable_record(folder.complete_path) or {}).get("reason", "complete")
        return "complete" if reason == "complete" else f"stopped early {at}, as evaluation asked"
    if folder.early_stop_path.exists():
        return f"asked to stop {at}"
    return f"training or stopped, {at}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _training(folder: RunFolder) -> list[Element]:
    lines = folder.metrics()
    parts = []
    for name, log_scale in _CURVES.items():
        if points := _points(lines, name):
            plot = line_plot(
                {name: points},
                x_label="step",
                y_label=name,
                title=name.replace("_", " "),
                markers=False,
                log_scale=log_scale and all(y > 0 for _, y in points),
            )
            parts.append(picture(plot, f"{name} while training"))
    if lines:
        last = {k: v for k, v in lines[-1].items() if _is_number(v)}
        parts.append(key_values(last, caption="The last line of metrics.jsonl"))
    return parts or [quiet("Nothing was logged yet.")]


def _source(record: Record) -> str:
    return str(record.get("low_res", "")).partition(":")[0]


# What scores must have in common to be compared, as `evaluation` writes it.
_SETTINGS = ("reference", "features", "num_samples", "seed", "aug_level", "sampler")


def _settings(record: Record) -> str:
    return json.dumps([record.get(name) for name in _SETTINGS])


def _by_settings(records: Sequence[Record], best: Record | None) -> list[list[Record]]:
    """The scores of samples, those together that can be compared.

    First come those by which the checkpoint was chosen or, where none was, the newest.
    """
    groups: dict[str, list[Record]] = collections.defaultdict(list)
    for r in records:
        if "low_res" in r:
            groups[_settings(r)].append(r)
    first = _settings(best) if best is not None else next(reversed(groups), None)
    return [groups[key] for key in sorted(groups, key=lambda key: key != first)]


def _scores(records: Sequence[Record], best: Record | None) -> list[Element]:
    groups = _by_settings(records, best)
    if not groups:
        return [quiet("Not evaluated yet.")]
    parts = []
    if best is not None:
        score = f"{best.get('metric')} {best.get('value')}"
        chosen = f"Chosen: step {best['step']}, EMA {best['ema_decay']:g}, {score}."
        parts.append(element("p", chosen))
    for scores in groups:
        parts += _comparable_scores(scores)
        cells = [_words(scores[0].get(name)) for name in _SETTINGS]
        parts.append(table(_SETTINGS, [cells], caption="What was measured, against what"))
    return parts


def _comparable_scores(scores: Sequence[Record]) -> list[Element]:
    parts = []
    metrics = list(dict.fromkeys(r["metric"] for r in scores))
    metrics.sort(key=lambda name: not name.startswith(("fid_", "fd_")))
    for metric in metrics:
        series = collections.defaultdict(list)
        for r in scores:
            if r["metric"] == metric and _is_number(r["value"]):
                name = f"low-res {_source(r)}, EMA {r['ema_decay']:g}"
                bisect.insort(series[name], (r["step"], r["value"]))
        if any(len(points) > 1 for points in series.values()) and "_std_" not in metric:
            plot = line_plot(series, x_label="step", y_label=metric, title=metric)
            parts.append(picture(plot, f"{metric} over checkpoints"))
    rows = collections.defaultdict(dict)
    for r in scores:
        value = f"failed: {r.get('failed')}" if r["value"] is None else r["value"]
        rows[r["step"], r["ema_decay"], _source(r)][r["metric"]] = value
    cells = [(*key, *(row.get(m) for m in metrics)) for key, row in sorted(rows.items(), key=str)]
    parts.append(table(("step", "EMA", "low-res", *metrics), cells))
    return parts


def _best(folder: RunFolder) -> Record | None:
    try:
        return folder.best()
    except UserError as e:
        _warn(str(e))
        return None


def _final(folder: RunFolder) -> list[Element]:
    parts = []
    for path in sorted(folder.eval.glob("final_*.json")):
        record = readable_record(path)
        if record is None:
            parts.append(quiet(f"{path.name} cannot be read."))
            continue
        metrics = list(record.get("metrics", {}).items())
        caption = (
            f"Step {record.get('step')}, EMA {record.get('ema_decay')}:"
            f" {record.get('num_samples')} samples, low-res {record.get('low_res')}"
        )
        parts.append(table(("metric", "value"), metrics, caption=caption))
        health = dict(record.get("health", {}))
        response = health.pop("aug_response", None)
        if health:
            parts.append(key_values(health, caption="Health: grey levels, and dB"))
        if response:
            parts += _response(response)
            files = {level: level_picture(path, level) for level in response["aug_levels"]}
            levels = [
                (f"Real images enlarged at aug_level {level:g}", file)
                for level, file in files.items()
                if file.exists()
            ]
            if levels:
                parts.append(slider("aug_level", levels))
        rest = {k: v for k, v in record.items() if k not in ("metrics", "health")}
        parts.append(key_values(rest, caption="Of what, by what, against what"))
        picture_path = path.with_suffix(".png")
        if picture_path.exists():
            parts.append(picture_file(picture_path, f"The first samples of {path.stem}"))
    return parts or [quiet("No final numbers yet: `evaluate final` makes them.")]


def _response(response: Record) -> list[Element]:
    levels = response.get("aug_levels", [])
    columns = [name for name in response if name != "aug_levels"]
    rows = list(zip(levels, *(response[name] for name in columns), strict=False))
    parts = [table(("aug_level", *columns), rows, caption="Response to aug_level")]
    psnr = response.get("psnr_low_res")
    if psnr:
        plot = line_plot(
            {"psnr_low_res": list(zip(levels, psnr, strict=False))},
            x_label="aug_level",
            y_label="PSNR to the low-res input, dB",
            title="Response to conditioning augmentation",
        )
        parts.append(picture(plot, "What an enlargement keeps of its input, by aug_level"))
    return parts


def _cas(folder: RunFolder) -> list[Element]:
    rows = [
        (
            f"trained on {name} images",
            *(record.get(name, {}).get(key) for key in ("num_images", "top1", "top5")),
            *(record.get(key) for key in ("network", "train_steps", "test_images", "samples")),
        )
        for record in read_lines(folder.cas_path)
        for name in ("generated", "real")
    ]
    if not rows:
        return [quiet("Not measured yet: `evaluate cas` does.")]
    columns = ("", "images", "top-1", "top-5", "network", "steps", "real test images", "samples")
    return [table(columns, rows)]


def _bits(records: Sequence[Record]) -> list[Element]:
    bits = [r for r in records if r.get("metric") == "bits_per_dim"]
    if not bits:
        return [quiet("Not measured: `evaluate bits_per_dim --bits_per_dim=SPLIT` does.")]
    columns = ("step", "ema_decay", "value", "standard_error", "num_images", "reference")
    return [table(columns, [[r.get(c) for c in columns] for r in bits])]


def _samples(folder: RunFolder, best: Record | None) -> list[Element]:
    found = folder.eval.glob("step_*.png")
    grids = sorted(found, key=lambda p: (int(p.stem.split("_")[1]), p.name))
    if not grids:
        return [quiet("No sample grids yet.")]
    kinds = collections.defaultdict(list)
    for path in grids:
        _, step, kind = path.stem.split("_", 2)
        chosen = ", chosen" if best and best["step"] == int(step) else ""
        caption = f"step {step}{chosen}: {kind.replace('_', ' ')}"
        kinds[kind].append((caption, path))
    return [slider("step", files[-_MAX_STEPS:]) for files in kinds.values()]
