"""Makes prepared data: one shard at a time, each by one process. See `prepared` for the format."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from cascaded_diffusion.config import DataConfig, StageConfig
from cascaded_diffusion.data import workers
from cascaded_diffusion.data.array_record_files import write_array_record
from cascaded_diffusion.data.corruption import CorruptionGuard, CorruptRecord
from cascaded_diffusion.data.prepared import digest_of, encode_record, prepared_folder, settings_of
from cascaded_diffusion.data.sources import ProcessingReader, load_raw

_SHARD_BYTES = 128_000_000
_MIN_SHARD_EXAMPLES = 256
ENCODINGS = ("raw", "png")
_REPORT_EVERY = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a split is to be prepared.

    Attributes:
      folder: where.
      reader: of the images, at their sizes.
      config: the data section.
      settings: what decides the content of a record, `prepared.settings_of`.
      encoding: of `ENCODINGS`.
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
        """Of all that decides what is in which shard."""
        return digest_of(
            {
                "settings": self.settings,
                "identity": self.reader.identity,
                "encoding": self.encoding,
                "shard_examples": self.shard_examples,
            }
        )

    def shard_path(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:05d}.array_record"

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


def write_shard(number: int) -> dict[str, Any]:
    """Writes a shard, in a worker process that was given the plan and a shared counter.

    Returns:
      Its report: `file`, `count`, `bytes`, `sha256`, `class_counts`, and the records
      `skipped` and `converted`.

    Raises:
      UserError: a record is corrupt, and the config says to fail.
    """
    plan, counter = workers.given()
    guard = CorruptionGuard(plan.config, len(plan.reader))
    labels: Counter[int] = Counter()
    skipped: list[list[Any]] = []
    before = Counter(plan.reader.converted)

    def records() -> Iterator[bytes]:
        done = 0
        for index in plan.rows(number):
            try:
                record = plan.reader.read(index)
            except CorruptRecord as e:
                where = plan.reader.describe(index)
                guard.note(index, where, str(e))
                skipped.append([index, where, str(e)])
            else:
                labels[int(record["label"])] += 1
                yield encode_record(record, index, png=plan.encoding == "png")
            done += 1
            if done % _REPORT_EVERY == 0:
                _add(counter, _REPORT_EVERY)
        _add(counter, done % _REPORT_EVERY)

    path = plan.shard_path(number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_array_record(str(temporary), records())
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "file": path.name,
        "count": sum(labels.values()),
        "bytes": size,
        "sha256": digest,
        "class_counts": [labels[k] for k in range(len(plan.reader.class_names))],
        "skipped": skipped,
        "converted": dict(plan.reader.converted - before),
        "fingerprint": plan.fingerprint,
    }


def _add(counter: Any, amount: int) -> None:
    with counter.get_lock():
        counter.value += amount


def finished_shard(plan: Plan, number: int, report: Any) -> bool:
    """Whether a report of an earlier process is of this plan, and its shard is whole."""
    path = plan.shard_path(number)
    if not isinstance(report, dict) or report.get("fingerprint") != plan.fingerprint:
        return False
    if not path.exists() or path.stat().st_size != report["bytes"]:
        return False
    return file_sha256(path) == report["sha256"]


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def manifest_of(plan: Plan, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of all shards, with its own digest."""
    skipped = [item for report in reports for item in report["skipped"]]
    converted: Counter[str] = Counter()
    for report in reports:
        converted.update(report["converted"])
    identity = plan.reader.identity
    if skipped:
        without = hashlib.sha256(str([index for index, _, _ in skipped]).encode()).hexdigest()[:8]
        identity = f"{identity} but {len(skipped)} corrupt:{without}"
    num_classes = len(plan.reader.class_names)
    manifest = {
        **plan.settings,
        "classes": num_classes,
        "identity": identity,
        "encoding": plan.encoding,
        "fingerprint": plan.fingerprint,
        "num_examples": sum(report["count"] for report in reports),
        "class_names": list(plan.reader.class_names),
        "class_counts": [sum(r["class_counts"][k] for r in reports) for k in range(num_classes)],
        "skipped": [{"index": i, "where": where, "problem": why} for i, where, why in skipped],
        "converted": dict(converted),
        "shards": [
            {name: report[name] for name in ("file", "count", "bytes", "sha256")}
            for report in reports
        ],
    }
    return {**manifest, "digest": digest_of(manifest)}
