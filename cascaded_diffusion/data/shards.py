"""The shards of prepared data: how a split is cut into them, and how a worker makes one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.sharedctypes import Synchronized
from typing import TypeGuard, TypeVar

from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data import manifests, workers
from cascaded_diffusion.data.manifests import Manifest, Report
from cascaded_diffusion.data.record_files import write_array_record
from cascaded_diffusion.data.records import CorruptRecord, read_into
from cascaded_diffusion.data.sized import encode_record
from cascaded_diffusion.data.sources import processed_source
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.json_files import read_json
from cascaded_diffusion.files.whole import sha256_of

T = TypeVar("T")
Given = tuple["Plan", Synchronized]  # to a worker: the plan, and how many records are done

_SHARD_BYTES = 128_000_000
_MIN_SHARD_EXAMPLES = 256
_POLL_SECS = 0.5


class Plan:
    """How a split is to be prepared, as a config and a stage want it.

    `shards` are the records of the data set that each shard is made of: a function of the data,
    so that a process that resumes makes the same cuts. `fingerprint` is a digest of what decides
    them, except for files replaced in place. Raises UserError as `sources.load_raw` does.
    """

    def __init__(self, config: DataConfig, split: str, stage: StageConfig, *, encoding: str):
        self.folder = manifests.prepared_folder(config, split, stage)
        self.source = source = processed_source(config, split, stage)
        self.settings = manifests.settings_of(config, split, stage)
        self.encoding, self.pixel_limit = encoding, config.pixel_limit
        shapes = (source.image_shape, source.low_res_shape or (0, 0, 0))
        # Of the pixels, which is about the largest size that a PNG can have.
        self.bytes_per_image = sum(h * w * c for h, w, c in shapes)
        by_size = max(1, _SHARD_BYTES // self.bytes_per_image)
        size = min(by_size, max(_MIN_SHARD_EXAMPLES, -(-len(source) // 16)))
        indices = range(len(source))
        self.shards = [indices[start : start + size] for start in indices[::size]]
        self.fingerprint = manifests.digest_of_json(
            {
                # The images may have moved.
                "settings": {**self.settings, "path": None},
                "identity": source.identity,
                "encoding": encoding,
                "shard_examples": size,
                # Of larger images, which may have been left out.
                "max_pixels": self.pixel_limit,
            }
        )

    def shard_path(self, number: int) -> AnyPath:
        return self.folder / manifests.shard_name(number)

    def report_path(self, number: int) -> AnyPath:
        return self.folder / "reports" / f"{number:05d}.json"

    def manifest(self, reports: Sequence[Report], content_sample: str) -> Manifest:
        """The manifest, from the reports of all shards."""
        source, skipped = self.source, [item for report in reports for item in report["skipped"]]
        identity = source.identity
        if skipped:
            left_out = str([item["index"] for item in skipped]).encode()
            without = hashlib.sha256(left_out).hexdigest()[:8]
            identity = f"{identity} but {len(skipped)} corrupt:{without}"
        num_classes = len(source.class_names)
        return {
            **self.settings,
            "classes": num_classes,
            "identity": identity,
            "source_identity": source.identity,
            "times": source.times,
            "content_sample": content_sample,
            "encoding": self.encoding,
            "num_examples": sum(report["count"] for report in reports),
            "class_names": list(source.class_names),
            "class_counts": [
                sum(report["class_counts"][k] for report in reports) for k in range(num_classes)
            ],
            "skipped": skipped,
            "converted": dict(sum((Counter(r["converted"]) for r in reports), Counter())),
            "shards": [{key: r[key] for key in manifests.Shard.__annotations__} for r in reports],
        }


def write_shard(given: Given, number: int) -> Report:
    """Writes a shard, in a worker process that was given the plan and a shared counter.

    Raises UserError if a record is corrupt, and the config says to fail.
    """
    plan, counter = given
    source = plan.source
    labels: Counter[int] = Counter()
    skipped: list[manifests.Skipped] = []
    before = Counter(source.converted)
    contents = hashlib.sha256()

    def records() -> Iterator[bytes]:
        for index in _counted(plan.shards[number], counter):
            try:
                record = source.processed(read_into(contents, source.raw, index), index)
            except CorruptRecord as e:
                where = source.describe(index)
                source.guard.note(index, where, str(e))
                skipped.append({"index": index, "where": where, "problem": str(e)})
            else:
                labels[int(record["label"])] += 1
                yield encode_record(record, index, png=plan.encoding == "png")

    path = plan.shard_path(number)
    with contextlib.ExitStack() as stack:
        if isinstance(path, BucketPath):
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = path.parent
        temporary = folder / f".{path.name}.{os.getpid()}"
        stack.callback(temporary.unlink, missing_ok=True)
        write_array_record(str(temporary), records())
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        size, digest = temporary.stat().st_size, sha256_of(temporary)
        if isinstance(path, BucketPath):
            path.write_bytes(temporary.read_bytes())
        else:
            os.replace(temporary, path)
    return {
        "file": path.name,
        "count": labels.total(),
        "bytes": size,
        "sha256": digest,
        "content": contents.hexdigest(),
        "class_counts": [labels[k] for k in range(len(source.class_names))],
        "skipped": skipped,
        "converted": dict(source.converted - before),
        "fingerprint": plan.fingerprint,
        "times": source.times,
    }


def source_content(given: Given, number: int) -> str:
    """The digest of what a shard is made of, as it is now; in a worker, as `write_shard`."""
    plan, counter = given
    contents = hashlib.sha256()
    for index in _counted(plan.shards[number], counter):
        with contextlib.suppress(CorruptRecord):
            read_into(contents, plan.source.raw, index)
    return contents.hexdigest()


def _counted(indices: range, counter: Synchronized[int]) -> Iterator[int]:
    """The indices; adds to the shared counter how many are done."""
    for index in indices:
        yield index
        with counter.get_lock():
            counter.value += 1


def finished_shard(plan: Plan, number: int) -> Report | None:
    """The report of an undamaged shard that an earlier process finished by the same plan.

    None if anything is wrong with it: the shard is then made anew.
    """
    path, num_classes = plan.shard_path(number), len(plan.source.class_names)
    try:
        report = read_json(plan.report_path(number), remedy="")
        if not _is_report(report):
            return None
        expected = {
            "file": path.name,
            "fingerprint": plan.fingerprint,
            "times": plan.source.times,
            "count": len(plan.shards[number]) - len(report["skipped"]),
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        same = expected.items() <= report.items()
        return report if same and len(report["class_counts"]) == num_classes else None
    except (OSError, UserError):
        return None


def _is_report(value: object) -> TypeGuard[Report]:
    return manifests.problem_of(value, Report) is None


def in_processes(
    function: Callable[[Given, int], T],
    plan: Plan,
    numbers: Sequence[int],
    num_workers: int,
    label: str,
    progress: workers.MakeProgress,
) -> Iterator[tuple[int, T]]:
    """Calls `function(given, number)` for shards in processes. Yields numbers and results."""
    total = len(plan.source)
    before = total - sum(len(plan.shards[number]) for number in numbers)
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    bar = progress(total, unit="images", label=label, initial=before)
    pool = workers.worker_pool(min(num_workers, max(1, len(numbers))), (plan, counter))
    try:
        waiting = {pool.submit(workers.call, function, number): number for number in numbers}
        while waiting:
            finished, _ = concurrent.futures.wait(
                waiting, timeout=_POLL_SECS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                yield waiting.pop(future), future.result()
            bar.update(min(total, before + counter.value))
    except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
            f"{plan.folder}: a worker process died (out of memory?); run the command again to"
            " resume, with a smaller --workers"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
