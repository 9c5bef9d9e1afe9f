"""Prepares splits of a data set, in shards made by worker processes, and verifies them.

`prepare_splits` resumes where an earlier call stopped, and does nothing where all is done.
"""

import dataclasses
import functools
import shutil
import time
from collections.abc import Sequence

from cascaded_diffusion.config.class_names import check_classes
from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data import manifests, shards
from cascaded_diffusion.data.manifests import Manifest, Report, is_prepared, read_manifest
from cascaded_diffusion.data.records import DataMissing
from cascaded_diffusion.data.sized import measure_parts
from cascaded_diffusion.data.sources import load_source, of_tfds
from cascaded_diffusion.data.workers import MakeProgress, NoProgress
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.json_files import write_json
from cascaded_diffusion.files.locks import held_lock
from cascaded_diffusion.files.paths import check_writable, printable
from cascaded_diffusion.files.whole import sha256_of

_say = functools.partial(print, flush=True)


def prepare_splits(
    config: DataConfig,
    stage: StageConfig,
    splits: Sequence[str] | None = None,
    *,
    workers: int = 1,
    encoding: str = "raw",
    dry_run: bool = False,
    progress: MakeProgress = NoProgress,
) -> None:
    """Prepares splits as a stage needs them, in `config.prepared_dir`, and prints what was done.

    The splits are by default the config's train_split and eval_split. A data set that TFDS does
    not have yet is downloaded first, to `config.path`. Pixels are encoded as "raw", which reads
    faster, or "png", which is smaller. A dry run prints size and time, and writes nothing.
    `workers` is the number of processes, and `progress` makes a progress bar.

    Raises UserError if a split is missing, damaged, or prepared with other settings, the classes
    do not fit, a folder cannot be written, or a worker process dies.

        config = cd.load_config("configs/cifar10_base16.py")
        cd.prepare_splits(config.data, config.stage)
    """
    if of_tfds(config):
        from cascaded_diffusion.data.tfds import get_tfds

        if not get_tfds(config.name, config.path, dry_run=dry_run, say=_say):
            return
    # All plans come before the first shard: a mistake in the last split is found at once.
    plans = {
        split: shards.Plan(config, split, stage, encoding=encoding)
        for split in splits or _default_splits(config)
    }
    names = {split: plan.source.class_names for split, plan in plans.items()}
    for split in _default_splits(config):
        folder = manifests.prepared_folder(config, split, stage)
        if split not in names and is_prepared(folder):
            names[split] = tuple(read_manifest(folder)["class_names"])
    check_classes(config, stage, names)
    for split, plan in plans.items():
        if dry_run:
            _say_cost(printable(split), plan, workers)
        else:
            _prepare(printable(split), plan, workers, progress)


def verify_splits(
    config: DataConfig,
    stage: StageConfig,
    splits: Sequence[str] | None = None,
    *,
    workers: int = 1,
    progress: MakeProgress = NoProgress,
) -> None:
    """Compares the shards of splits, and the images they were made of, with the manifest.

    The arguments are those of `prepare_splits`. Raises UserError if they differ.
    """
    for split in splits or _default_splits(config):
        _verify(config, stage, split, workers, progress)


def _default_splits(config: DataConfig) -> list[str]:
    return list(dict.fromkeys([config.train_split, config.eval_split]))


def _say_cost(split: str, plan: shards.Plan, workers: int) -> None:
    """Measures some images, spread over the split, and prints what all of them will take."""
    count = len(plan.source)
    millis, done = measure_parts(plan.source, _say)
    secs = sum(millis.values()) / 1000 * count / workers
    room = ""
    if not isinstance(folder := plan.folder, BucketPath):
        there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        room = f" ({_size(shutil.disk_usage(there).free)} free there)"
    _say(
        f"{split}: {count:,} images -> {folder}: {len(plan.shards)} shards,"
        f" {_size(count * plan.bytes_per_image)} as raw pixels{room}, about {_duration(secs)} with"
        f" {workers} workers (from {done} images in one)"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def _duration(secs: float) -> str:
    if secs < 90:
        return f"{secs:.0f} s"
    return f"{secs / 60:.0f} min" if secs < 5400 else f"{secs / 3600:.1f} h"


def _prepare(split: str, plan: shards.Plan, workers: int, progress: MakeProgress) -> None:
    folder = plan.folder
    if is_prepared(folder):  # perhaps where nothing can be written
        _check_prepared(split, plan)
        return
    check_writable(folder, "config.data.prepared_dir")
    with held_lock(folder, "prepare", "config.data.prepared_dir"):
        if is_prepared(folder):
            _check_prepared(split, plan)
            return
        start = time.monotonic()
        for leftover in folder.glob(".*.array_record.*"):
            leftover.unlink()  # of a process that was killed; the lock is ours
        content_sample = plan.source.raw.content_sample()
        manifest = plan.manifest(_write_shards(split, plan, workers, progress), content_sample)
        manifests.write_manifest(folder, manifest)
    _say(f"{split}: {_summary(manifest, folder)}, in {_duration(time.monotonic() - start)}")


def _check_prepared(split: str, plan: shards.Plan) -> None:
    """Raises UserError if what is there was prepared in another way, or from other images."""
    folder, raw = plan.folder, plan.source.raw
    manifest = read_manifest(folder)
    manifests.check_settings(manifest, plan.settings, folder)
    manifests.check_skipped(manifest, plan.pixel_limit, folder)
    if manifest["encoding"] != plan.encoding:
        raise UserError(
            f"--encoding={plan.encoding}: the data in {folder} was prepared as"
            f" {manifest['encoding']}; set it back, or remove the folder"
        )
    manifests.check_source(manifest, raw, folder)
    _say(f"{split}: is prepared, {_summary(manifest, folder)}")
    if manifest["times"] != raw.times:
        _say(
            f"{split}: the files were written at other times than those that it was prepared from;"
            " a sample of their contents is the same, and --verify compares all of them"
        )


def _summary(manifest: Manifest, folder: AnyPath) -> str:
    size = sum(shard["bytes"] for shard in manifest["shards"])
    notes = [f"{len(manifest['skipped'])} corrupt skipped"] if manifest["skipped"] else []
    notes += [
        f"{count} {kind}" if kind == "enlarged" else f"{count} converted ({kind})"
        for kind, count in manifest["converted"].items()
    ]
    return (
        f"{manifest['num_examples']:,} images at {manifest['resolution']} px in {folder}:"
        f" {len(manifest['shards'])} shards, {_size(size)}{''.join(f', {n}' for n in notes)}"
    )


def _write_shards(
    split: str, plan: shards.Plan, workers: int, progress: MakeProgress
) -> list[Report]:
    """Writes the shards that are missing. Returns the reports of all shards, in order."""
    numbers = range(len(plan.shards))
    reports = {n: report for n in numbers if (report := shards.finished_shard(plan, n))}
    missing = [number for number in numbers if number not in reports]
    if reports and missing:
        _say(f"{split}: resuming, {len(reports)} of {len(numbers)} shards are there")

    def count_skipped(report: Report) -> None:
        for item in report["skipped"]:
            # The process that read it has printed it.
            plan.source.guard.note(item["index"], item["where"], item["problem"], say=False)

    for report in reports.values():
        count_skipped(report)
    label = f"prepare {split}"
    made = shards.in_processes(shards.write_shard, plan, missing, workers, label, progress)
    for number, report in made:
        count_skipped(report)
        # From here on the shard counts as done.
        write_json(plan.report_path(number), report, indent=None)
        reports[number] = report
    return [reports[number] for number in numbers]


def _verify(
    config: DataConfig, stage: StageConfig, split: str, workers: int, progress: MakeProgress
) -> None:
    folder = manifests.prepared_folder(config, split, stage)
    load_source(config, split, stage)  # finds what is wrong without reading everything
    manifest, name = read_manifest(folder), printable(split)
    bar = progress(len(manifest["shards"]), unit="shards", label=f"verify {name}")
    try:
        for count, shard in enumerate(manifest["shards"], start=1):
            path = folder / shard["file"]
            if sha256_of(path) != shard["sha256"]:
                raise UserError(
                    f"{path}: its SHA-256 is not the manifest's: it is damaged; remove"
                    f" {folder / manifests.MANIFEST} and prepare again: shards that are whole are"
                    " kept"
                )
            bar.update(count)
    finally:
        bar.close()
    _say(f"{name}: every shard is as it was written, {_summary(manifest, folder)}")
    # A model without classes ignores labels, but they were prepared.
    stage = dataclasses.replace(stage, num_classes=manifest["classes"])
    try:
        plan = shards.Plan(config, split, stage, encoding=manifest["encoding"])
    except DataMissing as e:
        _say(
            f"{name}: only the shards were compared: what they were made of is not there any"
            f" more ({e})"
        )
        return
    manifests.check_source(manifest, plan.source.raw, folder)
    numbers = range(min(len(plan.shards), len(manifest["shards"])))
    label = f"verify the images of {name}"
    found = shards.in_processes(shards.source_content, plan, numbers, workers, label, progress)
    for number, content in found:
        if content != manifest["shards"][number]["content"]:
            first, last = plan.shards[number][0], plan.shards[number][-1]
            raise UserError(
                f"{folder}: the images are not those that it was prepared from: one or more of"
                f" {plan.source.describe(first)} to {plan.source.describe(last)} has other"
                " contents; remove the folder and prepare again, or bring those images back"
            )
    _say(f"{name}: the images are those that it was prepared from")
