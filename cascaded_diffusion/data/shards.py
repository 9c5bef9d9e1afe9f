"""The shards of prepared data: how a split is cut into them, and how a worker makes one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data import manifests, workers
from cascaded_diffusion.data.array_record_files import write_array_record
from cascaded_diffusion.data.corruption import CorruptionGuard, CorruptRecord
from cascaded_diffusion.data.digests import ContentDigest, digest_of_json
from cascaded_diffusion.data.prepared import encode_record
from cascaded_diffusion.data.processing import ProcessingReader
from cascaded_diffusion.data.sources import processing_reader
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.whole import sha256_of

T = TypeVar("T")

_SHARD_BYTES = 128_000_000
_MIN_SHARD_EXAMPLES = 256
_REPORT_EVERY, _POLL_SECS = 32, 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a split is to be prepared.

    Attributes:
      folder: where to.
      reader: reads the images at their sizes.
      config: the data section.
      settings: what decides the contents of a record, see `manifests.settings_of`.
      encoding: one of `manifests.ENCODINGS`.
    """

    folder: pathlib.Path
    reader: ProcessingReader
    config: DataConfig
    settings: dict[str, Any]
    encoding: str

    @property
    def bytes_per_image(self) -> int:
        """The size of the pixels, which is about the largest that a PNG can have."""
        shapes = (self.reader.image_shape, self.reader.low_res_shape or (0, 0, 0))
        return sum(h * w * c for h, w, c in shapes)

    @property
    def shard_examples(self) -> int:
        """Records of the data set per shard.

        A function of the data, so that a process that resumes makes the same cuts.
        """
        by_size = max(1, _SHARD_BYTES // self.bytes_per_image)
        by_count = max(_MIN_SHARD_EXAMPLES, -(-len(self.reader) // 16))
        return min(by_size, by_count)

    @property
    def num_shards(self) -> int:
        return -(-len(self.reader) // self.shard_examples)

    @property
    def fingerprint(self) -> str:
        """A digest of what decides which shard has what, except for files replaced in place."""
        return digest_of_json(
            {
                # The images may have moved.
                "settings": {**self.settings, "path": None},
                "identity": self.reader.identity,
                "encoding": self.encoding,
                "shard_examples": self.shard_examples,
            }
        )

    def shard_path(self, number: int) -> pathlib.Path:
        return self.folder / manifests.shard_name(number)

    def report_path(self, number: int) -> pathlib.Path:
        """The report of a finished shard. If there is no manifest, `prepare` resumes by it."""
        return self.folder / "reports" / f"{number:05d}.json"

    def record_indices(self, number: int) -> range:
        """Which records of the data set a shard is made of."""
        start = number * self.shard_examples
        return range(start, min(start + self.shard_examples, len(self.reader)))


def plan_split(config: DataConfig, split: str, stage: StageConfig, *, encoding: str) -> Plan:
    """The plan for a split. Raises UserError as `sources.load_raw` does."""
    return Plan(
        folder=manifests.prepared_folder(config, split, stage),
        reader=processing_reader(config, split, stage),
        config=config,
        settings=manifests.settings_of(config, split, stage),
        encoding=encoding,
    )


def write_shard(number: int) -> manifests.Report:
    """Writes a shard, in a worker process that was given the plan and a shared counter.

    Raises:
      UserError: a record is corrupt, and the config says to fail.
    """
    plan, counter = workers.given()
    guard = CorruptionGuard(plan.config, len(plan.reader))
    labels: Counter[int] = Counter()
    skipped: list[manifests.Skipped] = []
    before = Counter(plan.reader.converted)
    contents = ContentDigest(labels=True)

    def records() -> Iterator[bytes]:
        for index in _counted(plan.record_indices(number), counter):
            try:
                example = contents.read(plan.reader.raw, index)
                record = plan.reader.processed(example, index)
            except CorruptRecord as e:
                where = plan.reader.describe(index)
                guard.note(index, where, str(e))
                skipped.append({"index": index, "where": where, "problem": str(e)})
            else:
                labels[int(record["label"])] += 1
                yield encode_record(record, index, png=plan.encoding == "png")

    path = plan.shard_path(number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_array_record(str(temporary), records())
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        size, digest = temporary.stat().st_size, sha256_of(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "file": path.name,
        "count": sum(labels.values()),
        "bytes": size,
        "sha256": digest,
        "content": contents.hexdigest(),
        "class_counts": [labels[k] for k in range(len(plan.reader.class_names))],
        "skipped": skipped,
        "converted": dict(plan.reader.converted - before),
        "fingerprint": plan.fingerprint,
        "times": plan.reader.times,
    }


def source_content(number: int) -> str:
    """The digest of what a shard is made of, as it is now; in a worker, as `write_shard`."""
    plan, counter = workers.given()
    contents = ContentDigest(labels=True)
    for index in _counted(plan.record_indices(number), counter):
        with contextlib.suppress(CorruptRecord):
            contents.read(plan.reader.raw, index)
    return contents.hexdigest()


def _counted(indices: range, counter: Any) -> Iterator[int]:
    """The indices; adds to the shared counter how many are done."""
    waiting = 0
    for index in indices:
        yield index
        waiting += 1
        if waiting == _REPORT_EVERY or index == indices[-1]:
            with counter.get_lock():
                counter.value += waiting
            waiting = 0


def finished_shard(plan: Plan, number: int) -> manifests.Report | None:
    """The report of an undamaged shard that an earlier process finished by the same plan."""
    path = plan.shard_path(number)
    try:
        report = json.loads(plan.report_path(number).read_bytes())
        if manifests.problem_of(report, manifests.Report) is not None:
            return None
        counts, skipped = report["class_counts"], report["skipped"]
        expected = {
            "file": path.name,
            "fingerprint": plan.fingerprint,
            "times": plan.reader.times,
            "count": len(plan.record_indices(number)) - len(skipped),
            "bytes": path.stat().st_size,
        }
        same = all(report[key] == value for key, value in expected.items())
        if not same or len(counts) != len(plan.reader.class_names):
            return None
        return cast(manifests.Report, report) if sha256_of(path) == report["sha256"] else None
    except (OSError, ValueError, RecursionError):
        return None  # whatever is wrong, the shard is made anew


def manifest_of(
    plan: Plan, reports: Sequence[manifests.Report], content_sample: str
) -> manifests.Manifest:
    """The manifest of all shards."""
    skipped = [item for report in reports for item in report["skipped"]]
    converted: Counter[str] = Counter()
    for report in reports:
        converted.update(report["converted"])
    identity = plan.reader.identity
    if skipped:
        without = hashlib.sha256(str([item["index"] for item in skipped]).encode()).hexdigest()[:8]
        identity = f"{identity} but {len(skipped)} corrupt:{without}"
    num_classes, names = len(plan.reader.class_names), manifests.Shard.__annotations__
    manifest = {
        **plan.settings,
        "classes": num_classes,
        "identity": identity,
        "source_identity": plan.reader.identity,
        "times": plan.reader.times,
        "content_sample": content_sample,
        "encoding": plan.encoding,
        "num_examples": sum(report["count"] for report in reports),
        "class_names": list(plan.reader.class_names),
        "class_counts": [sum(r["class_counts"][k] for r in reports) for k in range(num_classes)],
        "skipped": skipped,
        "converted": dict(converted),
        "shards": [{name: report[name] for name in names} for report in reports],
    }
    return cast(manifests.Manifest, manifest)


def in_processes(
    function: Callable[[int], T],
    plan: Plan,
    shards: Sequence[int],
    num_workers: int,
    label: str,
    progress: workers.MakeProgress,
    done: Callable[[int, T], None],
) -> None:
    """Calls `function(number)` for shards in worker processes, and `done(number, result)` here."""
    total = len(plan.reader)
    before = total - sum(len(plan.record_indices(number)) for number in shards)
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    bar = progress(total, unit="images", label=label, initial=before)
    pool = workers.worker_pool(min(num_workers, max(1, len(shards))), (plan, counter))
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
                        " again to resume, with a smaller --workers"
                    ) from e
                done(number, result)
            bar.update(min(total, before + counter.value))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        bar.close()
    pool.shutdown()
