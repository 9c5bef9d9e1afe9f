"""Prepares a data set once: its images at a stage's size, in shards that training reads fast.

    python -m cascaded_diffusion.prepare --config=configs/sr64.py
    python -m cascaded_diffusion.prepare --config=configs/sr64.py --dry_run

What TFDS has not got yet, it downloads and prepares first, in `config.data.path`. The shards
go to `config.data.prepared_dir`. The same command run again goes on where it stopped, and
does nothing where all is done; `--verify` compares every shard with its SHA-256, and the
images that it was made of with what they were.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from absl import flags
from absl import logging as absl_logging

from cascaded_diffusion.commands import config_flags, entry, flag_checks
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError

if TYPE_CHECKING:
    from cascaded_diffusion.data.prepared import Manifest, Report
    from cascaded_diffusion.data.write_prepared import Plan

T = TypeVar("T")

_POLL_SECS = 0.5
# Of --dry_run's measurement.
_TRIAL_IMAGES, _TRIAL_SECS = 256, 5.0


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "the stage's config file, e.g. configs/sr64.py")
    flags.DEFINE_list(
        "splits", None, "which splits; by default the config's train_split and eval_split",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_integer("workers", os.cpu_count(), "processes", lower_bound=1, flag_values=fv)
    flags.DEFINE_enum(
        "encoding", "raw", ["raw", "png"], "of pixels: raw reads faster, png is smaller",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_bool("dry_run", False, "say size and time, write nothing", flag_values=fv)
    flags.DEFINE_bool(
        "verify", False, "compare shards, and what they were made of, with their SHA-256",
        flag_values=fv,
    )  # fmt: skip
    config_flags.parse(fv, argv, __doc__)
    flag_checks.require(fv, "config")
    config = run_config_from(config_flags.config_values(fv, argv))
    if config.data.prepared_dir is None:
        raise UserError(
            "config.data.prepared_dir = None: expected the folder to write to, as"
            " --config.data.prepared_dir=prepared; and the same for training"
        )
    if fv.dry_run and fv.verify:
        raise UserError("--dry_run does not go with --verify: leave one of them out")
    absl_logging.set_verbosity(absl_logging.WARNING)
    splits = fv.splits or list(dict.fromkeys([config.data.train_split, config.data.eval_split]))
    if fv.verify:
        for split in splits:
            _verify(config, split, fv.workers)
        return 0
    if not _make_available(config, dry_run=fv.dry_run):
        return 0

    from cascaded_diffusion.data.raw import printable
    from cascaded_diffusion.data.write_prepared import plan_split

    # All of them before the first is written: a mistake in the last is found at once.
    plans = {
        split: plan_split(config.data, split, config.stage, encoding=fv.encoding)
        for split in splits
    }
    _check_classes(config, plans)
    for split, plan in plans.items():
        if fv.dry_run:
            _say_cost(printable(split), plan, fv.workers)
        else:
            _prepare(printable(split), plan, fv.workers)
    return 0


def _check_classes(config: RunConfig, plans: dict[str, Plan]) -> None:
    """Compares the classes of the splits with each other, and with those prepared before."""
    from cascaded_diffusion.data.prepared import is_there, prepared_folder, read_manifest
    from cascaded_diffusion.data.sources import check_classes

    names = {split: plan.reader.class_names for split, plan in plans.items()}
    low_res = config.stage.low_res_resolution if config.data.low_res == "stored" else None
    for split in (config.data.train_split, config.data.eval_split):
        if split not in names and is_there(config.data, split, low_res):
            folder = prepared_folder(config.data, split, low_res_resolution=low_res)
            names[split] = tuple(read_manifest(folder)["class_names"])
    check_classes(config.data, config.stage, names)


def _make_available(config: RunConfig, *, dry_run: bool) -> bool:
    """Has TFDS get a data set of its own. False where a dry run can say no more."""
    from cascaded_diffusion.data.sources import SOURCES

    if config.data.name in SOURCES:
        return True
    from cascaded_diffusion.data import tfds as tfds_source

    builder = tfds_source.find_builder(config.data.name, config.data.path)
    if tfds_source.is_prepared(builder):
        return True
    if dry_run or tfds_source.manual_instructions(builder) is None:
        cost = tfds_source.cost_of_getting(builder)
        print(f"{config.data.name}: not in {builder.data_path} yet; {cost}", flush=True)
    if dry_run:
        print("size and time of preparing are known when it is there", flush=True)
        return False
    tfds_source.get(builder)
    return True


def _say_cost(split: str, plan: Plan, workers: int) -> None:
    """Measures some images, spread over the split, and says what all of them will take."""
    from cascaded_diffusion.data.corruption import CorruptRecord

    count = len(plan.reader)
    trial = [i * count // _TRIAL_IMAGES for i in range(_TRIAL_IMAGES)] if count else []
    start, done = time.monotonic(), 0
    for index in dict.fromkeys(trial):
        try:
            plan.reader.read(index)
        except CorruptRecord as e:
            print(f"corrupt: {plan.reader.describe(index)}: {e}", flush=True)
        done += 1
        if time.monotonic() - start > _TRIAL_SECS:
            break
    secs = (time.monotonic() - start) / done * count / workers
    size = count * plan.bytes_per_image
    free = shutil.disk_usage(_existing(plan.folder)).free
    print(
        f"{split}: {count:,} images -> {plan.folder}: {plan.num_shards} shards,"
        f" {_size(size)} as raw pixels ({_size(free)} free there), about {_duration(secs)} with"
        f" {workers} workers (from {done} images in one)",
        flush=True,
    )


def _existing(path: pathlib.Path) -> pathlib.Path:
    while not path.exists():
        path = path.absolute().parent
    return path


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


def _prepare(split: str, plan: Plan, workers: int) -> None:
    from cascaded_diffusion.data.prepared import (
        MANIFEST,
        check_settings,
        check_source,
        read_manifest,
    )
    from cascaded_diffusion.data.write_prepared import manifest_of, stored_manifest
    from cascaded_diffusion.files.folders import check_writable, held_lock
    from cascaded_diffusion.files.whole import write_whole

    folder, raw = plan.folder, plan.reader.raw
    check_writable(folder, "config.data.prepared_dir")
    with held_lock(folder, "prepare", "config.data.prepared_dir"):
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            check_settings(manifest, plan.settings, folder)
            if manifest["encoding"] != plan.encoding:
                raise UserError(
                    f"--encoding={plan.encoding}: the data in {folder} was prepared as"
                    f" {manifest['encoding']}; set it back, or remove the folder"
                )
            check_source(manifest, raw, folder)
            print(f"{split}: is prepared, {_told(manifest, folder)}", flush=True)
            if manifest["times"] != raw.times:
                print(
                    f"{split}: the files were written at other times than those that it was"
                    " prepared from; a sample of their contents is the same, and --verify compares"
                    " all of them",
                    flush=True,
                )
            return
        start = time.monotonic()
        for leftover in folder.glob(".*.array_record.*"):
            leftover.unlink()  # of a process that was killed; the lock is ours
        content_sample = raw.content_sample()
        manifest = manifest_of(plan, _write_shards(split, plan, workers), content_sample)
        write_whole(folder / MANIFEST, stored_manifest(manifest))
    secs = time.monotonic() - start
    print(f"{split}: {_told(manifest, folder)}, in {_duration(secs)}", flush=True)


def _told(manifest: Manifest, folder: pathlib.Path) -> str:
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


def _write_shards(split: str, plan: Plan, workers: int) -> list[Report]:
    """Writes the shards that are not there yet. Returns the reports of all, in order."""
    from cascaded_diffusion.data.corruption import CorruptionGuard
    from cascaded_diffusion.data.write_prepared import finished_shard, write_shard
    from cascaded_diffusion.files.whole import write_whole

    found = {number: finished_shard(plan, number) for number in range(plan.num_shards)}
    reports = {number: report for number, report in found.items() if report is not None}
    missing = [number for number in found if number not in reports]
    total = len(plan.reader)
    if reports and missing:
        print(
            f"{split}: going on, {len(reports)} of {plan.num_shards} shards are there", flush=True
        )
    guard = CorruptionGuard(plan.config, total)

    def count_skipped(report: Report) -> None:
        for item in report["skipped"]:
            # Whoever read it has said it.
            guard.note(item["index"], item["where"], item["problem"], say=False)

    def done(number: int, report: Report) -> None:
        reports[number] = report
        count_skipped(report)
        # From here on the shard counts as done.
        write_whole(plan.report_path(number), json.dumps(report).encode())

    for report in reports.values():
        count_skipped(report)
    _in_processes(write_shard, plan, missing, workers, label=f"prepare {split}", done=done)
    return [reports[number] for number in range(plan.num_shards)]


def _in_processes(
    function: Callable[[int], T],
    plan: Plan,
    shards: Sequence[int],
    workers: int,
    *,
    label: str,
    done: Callable[[int, T], None],
) -> None:
    """Calls `function(number)` for shards in worker processes, and `done(number, result)` here."""
    from cascaded_diffusion.data.workers import worker_pool
    from cascaded_diffusion.runtime.progress import Progress

    total = len(plan.reader)
    before = total - sum(len(plan.rows(number)) for number in shards)
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    progress = Progress(total, unit="images", label=label, initial=before)
    pool = worker_pool(min(workers, max(1, len(shards))), (plan, counter))
    try:
        waiting = {pool.submit(function, number): number for number in shards}
        while waiting:
            finished, _ = concurrent.futures.wait(
                waiting, timeout=_POLL_SECS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                number = waiting.pop(future)
                try:
                    result = future.result()
                except concurrent.futures.process.BrokenProcessPool as e:
                    raise UserError(
                        f"{plan.folder}: a worker process died (out of memory?); run the command"
                        " again to go on, with a smaller --workers"
                    ) from e
                done(number, result)
            progress.update(min(total, before + counter.value))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        progress.close()
    pool.shutdown()


def _verify(config: RunConfig, split: str, workers: int) -> None:
    """Compares the shards of a split, and what they were made of, with the manifest.

    Raises:
      UserError: they differ.
    """
    from cascaded_diffusion.data.prepared import (
        MANIFEST,
        check_source,
        prepared_folder,
        read_manifest,
    )
    from cascaded_diffusion.data.raw import DataMissing, printable
    from cascaded_diffusion.data.sources import load_source
    from cascaded_diffusion.data.write_prepared import plan_split, source_content
    from cascaded_diffusion.files.whole import sha256_of
    from cascaded_diffusion.runtime.progress import Progress

    low_res = config.stage.low_res_resolution if config.data.low_res == "stored" else None
    folder = prepared_folder(config.data, split, low_res_resolution=low_res)
    load_source(config.data, split, config.stage)  # says what is wrong with it without reading all
    manifest, name = read_manifest(folder), printable(split)
    progress = Progress(len(manifest["shards"]), unit="shards", label=f"verify {name}")
    for count, shard in enumerate(manifest["shards"], start=1):
        path = folder / shard["file"]
        if sha256_of(path) != shard["sha256"]:
            progress.close()
            raise UserError(
                f"{path}: its SHA-256 is not the manifest's: it is damaged; remove"
                f" {folder / MANIFEST} and prepare again: shards that are whole are kept"
            )
        progress.update(count)
    progress.close()
    print(f"{name}: every shard is as it was written, {_told(manifest, folder)}", flush=True)
    # Labels that are there may go unused, but were prepared.
    stage = dataclasses.replace(config.stage, num_classes=manifest["classes"])
    try:
        plan = plan_split(config.data, split, stage, encoding=manifest["encoding"])
    except DataMissing as e:
        print(
            f"{name}: only the shards were compared: what they were made of is not there any"
            f" more ({e})",
            flush=True,
        )
        return
    check_source(manifest, plan.reader.raw, folder)

    def compare(number: int, content: str) -> None:
        if content != manifest["shards"][number]["content"]:
            rows = plan.rows(number)
            raise UserError(
                f"{folder}: the images are not those that it was prepared from: one or more of"
                f" {plan.reader.describe(rows[0])} to {plan.reader.describe(rows[-1])} has other"
                " contents; remove the folder and prepare again, or bring those images back"
            )

    _in_processes(
        source_content,
        plan,
        range(min(plan.num_shards, len(manifest["shards"]))),
        workers,
        label=f"verify the images of {name}",
        done=compare,
    )
    print(f"{name}: the images are those that it was prepared from", flush=True)


if __name__ == "__main__":
    entry.run(main)
