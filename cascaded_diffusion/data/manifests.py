"""What is recorded of prepared data: its manifest, and the reports of its shards.

    PREPARED/<data>/<split>_<size>px/00000.array_record, ...      see `sized`
    PREPARED/<data>/<split>_<size>px/reports/00000.json, ...      by which `prepare` resumes
    PREPARED/<data>/<split>_<size>px/manifest.json

The manifest is written last: where it exists, the shards are complete. It says which images
the data was made of and how, and has the size and SHA-256 of every shard, and a SHA-256 of the
records of the data set that went into it.
"""

import hashlib
import json
import re
import types
import typing
from typing import Any, TypedDict

from cascaded_diffusion.config.run_checks import FILE_DATA
from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data.records import RawSource
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, path_of
from cascaded_diffusion.files.json_files import read_json, write_json

MANIFEST = "manifest.json"
FORMAT = 2
ENCODINGS = ("raw", "png")


class Shard(TypedDict):
    """A file: its name, records, bytes, SHA-256, and a SHA-256 of the records it is made of."""

    file: str
    count: int
    bytes: int
    sha256: str
    content: str


class Skipped(TypedDict):
    """A corrupt record: its index in the data set, where it is for people, and its problem."""

    index: int
    where: str
    problem: str


class Report(Shard):
    """What is known about a written shard; `fingerprint` and `times` are those of its plan."""

    class_counts: list[int]
    skipped: list[Skipped]
    converted: dict[str, int]
    fingerprint: str
    times: str


class Settings(TypedDict):
    """Everything in a config that decides what is in the records; `path` is for people."""

    format: int
    data: str
    path: str | None
    split: str
    crop: str
    resize: str
    resolution: int
    low_res_resolution: int | None
    channels: int
    classes: int


class Manifest(Settings):
    """What is known about a split when all its shards have been written.

    `identity` is `source_identity` and what was left out.
    """

    identity: str
    source_identity: str
    times: str
    content_sample: str
    encoding: str
    num_examples: int
    class_names: list[str]
    class_counts: list[int]
    skipped: list[Skipped]
    converted: dict[str, int]
    shards: list[Shard]


def problem_of(value: object, kind: Any, where: str = "it") -> str | None:
    """What is wrong with a JSON value that should be of a kind; None for nothing.

    The kind is a type, a union of types, a TypedDict, or a list or dict of kinds. The answer
    calls the value `where`.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{where} is {_kind_of(value)}, expected an object"
        hints = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()) or sorted(hints.keys() - value.keys()):
            name = unknown[0]
            return f"{where} {'lacks' if name in hints else 'has an unknown'} {name!r:.60}"
        parts = [(value[name], hint, repr(name)) for name, hint in hints.items()]
    elif origin is types.UnionType:
        problems = [problem_of(value, each, where) for each in inner]
        return None if None in problems else problems[0]
    elif origin in (list, dict):
        if not isinstance(value, origin):
            return f"{where} is {_kind_of(value)}, expected a {origin.__name__}"
        values = value.values() if origin is dict else value
        parts = [(each, inner[-1], f"an element of {where}") for each in values]
    else:
        # True is an int to Python.
        right = type(value) is kind and (kind is not int or value >= 0)
        return None if right else f"{where} is {_kind_of(value)}, expected {_NAMES[kind]}"
    return next((p for part in parts if (p := problem_of(*part)) is not None), None)


_NAMES = {int: "a number from 0 on", str: "text", type(None): "null"}


def _kind_of(value: object) -> str:
    return f"{value}" if type(value) is int else f"a {type(value).__name__}"


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:05d}.array_record"


def _safe(name: str) -> str:
    """The folder named after a data set or split: 'train[:90%]' -> 'train--90pct-'."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name.replace("%", "pct"))


def stored_low_res(config: DataConfig, stage: StageConfig) -> int | None:
    """The resolution of the low-res images that are stored beside the images; None for none."""
    return stage.low_res_resolution if config.low_res == "stored" else None


def prepared_folder(config: DataConfig, split: str, stage: StageConfig) -> AnyPath:
    """Where a split is if it is prepared as the config wants it."""
    low_res = stored_low_res(config, stage)
    sizes = f"{config.resolution}px" + ("" if low_res is None else f"_low{low_res}px")
    return path_of(config.prepared_dir) / _safe(config.name) / f"{_safe(split)}_{sizes}"


def is_prepared(folder: AnyPath) -> bool:
    """Whether a split has been prepared in a folder, with whatever settings."""
    return (folder / MANIFEST).exists()


def settings_of(config: DataConfig, split: str, stage: StageConfig) -> Settings:
    """The settings of a split that is prepared as a config wants it."""
    return {
        "format": FORMAT,
        "data": config.name,
        "path": str(path_of(config.path).resolve()) if config.name in FILE_DATA else None,
        "split": split,
        "crop": config.crop,
        "resize": config.resize,
        "resolution": config.resolution,
        "low_res_resolution": stored_low_res(config, stage),
        "channels": stage.channels,
        "classes": stage.num_classes,
    }


# The config keys of the settings. The path is left out, since the images may have moved.
_KEYS = {
    "data": "data.name",
    "split": "data.train_split or eval_split",
    "crop": "data.crop",
    "resize": "data.resize",
    "resolution": "data.resolution",
    "low_res_resolution": "stage.low_res_resolution",
    "channels": "stage.channels",
    "classes": "stage.num_classes",
}


def digest_of_json(value: object) -> str:
    """SHA-256 of a JSON value, with its keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: AnyPath, manifest: Manifest) -> None:
    """Writes a manifest with its own digest."""
    write_json(folder / MANIFEST, {**manifest, "digest": digest_of_json(manifest)}, indent=1)


def read_manifest(folder: AnyPath) -> Manifest:
    """The manifest of a folder. Raises UserError if it is missing, or not as it was written."""
    path = folder / MANIFEST
    anew = "remove the folder and prepare the data anew"
    manifest = read_json(path, remedy=anew)
    digest = manifest.pop("digest", None) if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict):
        problem = f"no manifest, but {_kind_of(manifest)}"
    elif manifest.get("format") != FORMAT:
        problem = "written by another version of this program"
    else:
        problem = problem_of(manifest, Manifest) or _contradiction(manifest)
    if problem is None and digest != digest_of_json(manifest):
        problem = "has changed since it was written"
    if problem is not None:
        raise UserError(f"{path}: {problem}; {anew}")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    for number, shard in enumerate(manifest["shards"]):
        # No other name, so no other folder either.
        if shard["file"] != shard_name(number):
            return f"'file' is {shard['file']!r:.60}, expected {shard_name(number)!r}"
    if sum(shard["count"] for shard in manifest["shards"]) != manifest["num_examples"]:
        return "'num_examples' is not the sum of its shards"
    if not manifest["num_examples"]:
        return "'num_examples' is 0, expected images"
    if not len(manifest["class_names"]) == len(manifest["class_counts"]) == manifest["classes"]:
        return "'class_names', 'class_counts' and 'classes' are of different numbers of classes"
    if manifest["encoding"] not in ENCODINGS:
        return f"'encoding' is {manifest['encoding']!r}, expected one of {', '.join(ENCODINGS)}"
    if manifest["channels"] not in (1, 3):
        return f"'channels' is {manifest['channels']}, expected 1 or 3"
    if manifest["resolution"] < 1 or manifest["low_res_resolution"] == 0:
        return "'resolution' is 0, expected pixels"
    return None


def check_settings(manifest: Manifest, wanted: Settings, folder: AnyPath) -> None:
    """Raises UserError, naming the config key, if the data was prepared with other settings."""
    for name, key in _KEYS.items():
        if name == "classes" and not wanted[name]:
            continue  # a model without classes ignores labels
        if manifest[name] != wanted[name]:
            raise UserError(
                f"config.{key} = {wanted[name]!r}: the data in {folder} was prepared with"
                f" {manifest[name]!r}; set it back, or prepare into another"
                " config.data.prepared_dir"
            )


def check_skipped(manifest: Manifest, max_pixels: int, folder: AnyPath) -> None:
    """Raises UserError if images were left out as too large that would now be taken."""
    for item in manifest["skipped"]:
        size = re.fullmatch(
            r"(\d+) x (\d+) pixels, .*\(config\.data\.max_pixels\)", item["problem"]
        )
        if size and int(size[1]) * int(size[2]) <= max_pixels:
            raise UserError(
                f"config.data.max_pixels = {max_pixels}: the data in {folder} was prepared without"
                f" {item['where']} ({item['problem']}); set it back, or remove the folder and"
                " prepare the data anew"
            )


def check_source(manifest: Manifest, source: RawSource, folder: AnyPath) -> None:
    """Raises UserError if data was prepared from another source.

    If only the modification times differ, as those of a copy do, a sample of the contents is
    compared.
    """
    if manifest["source_identity"] != source.identity:
        what = f"of {manifest['source_identity']!r}, not of {source.identity!r}"
    elif (
        manifest["times"] != source.times and manifest["content_sample"] != source.content_sample()
    ):
        what = f"of other images than are there now, with the same names and sizes ({source!r})"
    else:
        return
    raise UserError(
        f"{folder}: was prepared {what}; remove the folder and prepare again, bring those images"
        " back, or choose another config.data.prepared_dir"
    )
