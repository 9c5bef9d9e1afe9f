"""Makes prepared data: one shard at a time, each by one process. See `prepared` for the format."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data import workers
from cascaded_diffusion.data.array_record_files import write_array_record
from cascaded_diffusion.data.corruption import CorruptionGuard, CorruptRecord
from cascaded_diffusion.data.prepared import (
    Manifest,
    Report,
    Shard,
    Skipped,
    digest_of,
    encode_record,
    prepared_folder,
    problem_of,
    settings_of,
    shard_name,
)
from cascaded_diffusion.data.raw import ContentDigest
from cascaded_diffusion.data.sources import ProcessingReader, load_raw
from cascaded_diffusion.files.whole import sha256_of

_SHARD_BYTES = 128_000_000
_MIN_SHARD_EXAMPLES = 256
_REPORT_EVERY = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a split is to be prepared.

    Attributes:
      folder: where.
      reader: of the images, at their sizes.
      config: the data section.
      settings: what decides the content of a record, `prepared.settings_of`.
      encoding: of `prepared.ENCODINGS`.
    """

    folder: pathlib.Path
    reader: ProcessingReader
    config: DataConfig
    settings: dict[str, Any]
    encoding: str

    @property
    def bytes_per_image(self) -> int:
        """Of pixels: an upper bound for PNG, nearly."""
        shapes = (self.reader.image_shape, self.reader.low_res_shape or (0, 0, 0))
        return sum(h * w * c for h, w, c in shapes)

    @property
    def shard_examples(self) -> int:
        """Records of the data set per shard: a function of the data, so that any process
        that goes on cuts it alike."""
        by_size = max(1, _SHARD_BYTES // self.bytes_per_image)
        by_count = max(_MIN_SHARD_EXAMPLES, -(-len(self.reader) // 16))
        return min(by_size, by_count)

    @property
    def num_shards(self) -> int:
        return -(-len(self.reader) // self.shard_examples)

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is in which shard, but for contents replaced in place."""
        return digest_of(
            {
                # The images may have moved.
                "settings": {**self.settings, "path": None},
                "identity": self.reader.identity,
                "encoding": self.encoding,
                "shard_examples": self.shard_examples,
            }
        )

    def shard_path(self, number: int) -> pathlib.Path:
        return self.folder / shard_name(number)

    def report_path(self, number: int) -> pathlib.Path:
        """What is known of a finished shard; where the manifest is lost, others go on by it."""
        return self.folder / "reports" / f"{number:05d}.json"

    def rows(self, number: int) -> range:
        """Which records of the data set a shard is of."""
        start = number * self.shard_examples
        return range(start, min(start + self.shard_examples, len(self.reader)))


def plan_split(config: DataConfig, split: str, stage: StageConfig, *, encoding: str) -> Plan:
    """The plan for a split.

    Raises:
      UserError: as `sources.load_raw`.
    """
    low_res = stage.low_res_resolution if config.low_res == "stored" else None
    reader = ProcessingReader(
        load_raw(config, split, stage), config, channels=stage.channels, low_res_resolution=low_res
    )
    return Plan(
        folder=prepared_folder(config, split, low_res_resolution=low_res),
        reader=reader,
        config=config,
        settings=settings_of(config, split, stage, low_res_resolution=low_res),
        encoding=encoding,
    )


def write_shard(number: int) -> Report:
    """Writes a shard, in a worker process that was given the plan and a shared counter.

    Raises:
      UserError: a record is corrupt, and the config says to fail.
    """
    plan, counter = workers.given()
    guard = CorruptionGuard(plan.config, len(plan.reader))
    labels: Counter[int] = Counter()
    skipped: list[Skipped] = []
    before = Counter(plan.reader.converted)
    contents = ContentDigest(labels=True)

    def records() -> Iterator[bytes]:
        for index in _counted(plan.rows(number), counter):
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
        digest = sha256_of(temporary)
        size = temporary.stat().st_size
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
    """The digest of what a shard is of, as it is now, in a worker process as `write_shard`."""
    plan, counter = workers.given()
    contents = ContentDigest(labels=True)
    for index in _counted(plan.rows(number), counter):
        with contextlib.suppress(CorruptRecord):
            contents.read(plan.reader.raw, index)
    return contents.hexdigest()


def _counted(rows: range, counter: Any) -> Iterator[int]:
    """The rows; adds to the shared counter how many are done."""
    waiting = 0
    for row in rows:
        yield row
        waiting += 1
        if waiting == _REPORT_EVERY or row == rows[-1]:
            with counter.get_lock():
                counter.value += waiting
            waiting = 0


def finished_shard(plan: Plan, number: int) -> Report | None:
    """The report of a shard that an earlier process finished by the same plan, if it is whole."""
    path = plan.shard_path(number)
    try:
        report = json.loads(plan.report_path(number).read_bytes())
        if problem_of(report, Report) is not None:
            return None
        same = (report["file"], report["fingerprint"], report["times"]) == (
            path.name, plan.fingerprint, plan.reader.times,
        )  # fmt: skip
        counts, skipped = report["class_counts"], report["skipped"]
        whole = len(counts) == len(plan.reader.class_names) and (
            report["count"] + len(skipped) == len(plan.rows(number))
        )
        if not same or not whole or path.stat().st_size != report["bytes"]:
            return None
        return cast(Report, report) if sha256_of(path) == report["sha256"] else None
    except (OSError, ValueError, RecursionError):
        return None  # whatever it is, the shard is made anew


def manifest_of(plan: Plan, reports: Sequence[Report], content_sample: str) -> Manifest:
    """The manifest of all shards, to be stored by `stored_manifest`."""
    skipped = [item for report in reports for item in report["skipped"]]
    converted: Counter[str] = Counter()
    for report in reports:
        converted.update(report["converted"])
    identity = plan.reader.identity
    if skipped:
        without = hashlib.sha256(str([item["index"] for item in skipped]).encode()).hexdigest()[:8]
        identity = f"{identity} but {len(skipped)} corrupt:{without}"
    num_classes = len(plan.reader.class_names)
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
        "shards": [{name: report[name] for name in Shard.__annotations__} for report in reports],
    }
    return cast(Manifest, manifest)


def stored_manifest(manifest: Manifest) -> bytes:
    """A manifest as a file, with its own digest."""
    return json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1).encode() + b"\n"
