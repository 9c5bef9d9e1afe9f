"""Prepared data: a split's images at a stage's sizes, in ArrayRecord shards with a manifest.

    PREPARED/<data>/<split>_<size>px/00000.array_record, ...
    PREPARED/<data>/<split>_<size>px/reports/00000.json, ...      (for `prepare` to go on by)
    PREPARED/<data>/<split>_<size>px/manifest.json

The manifest is written last: where it is, the shards are whole. It says of what the images
are and what was done to them, and has the size and SHA-256 of every shard, and a SHA-256 of
the records of the data set that it was made of. A record is

    label int32, source index int64, number of images uint8, the length of each uint32,
    then the images: raw pixels, or PNG

all little-endian; the shape of the images is the manifest's.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import struct
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np

from cascaded_diffusion.config.run_checks import FILE_DATA
from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.data.array_record_files import ArrayRecordShards, ShardPart
from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.raw import PREPARE, DataMissing, RawSource
from cascaded_diffusion.errors import UserError

if TYPE_CHECKING:
    from cascaded_diffusion.data.sources import Sized

MANIFEST = "manifest.json"
FORMAT = 2
ENCODINGS = ("raw", "png")
_HEAD = struct.Struct("<iqB")


class Shard(TypedDict):
    """One file: its name, records, bytes, SHA-256, and the `content_digest` of its sources."""

    file: str
    count: int
    bytes: int
    sha256: str
    content: str


class Skipped(TypedDict):
    """A corrupt record: which of the source, its place for people, what is wrong with it."""

    index: int
    where: str
    problem: str


class Report(Shard):
    """What is known of a shard when it has been written.

    `converted` counts by kind; `fingerprint` and `times` are of the plan that the shard was
    written by.
    """

    class_counts: list[int]
    skipped: list[Skipped]
    converted: dict[str, int]
    fingerprint: str
    times: str


class Manifest(TypedDict):
    """What is known of a split when all its shards have been written.

    The first ten are `settings_of`, of which `path` is for people; `identity` is
    `source_identity` and what was left out of it; `times` and `content_sample` are the source's.
    """

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


def problem_of(value: Any, kind: Any, where: str = "it") -> str | None:
    """What is wrong with a JSON value that ought to be of a kind; None for nothing.

    Args:
      value: what was read.
      kind: a type, a union of types, a TypedDict, or a list, dict or tuple of kinds.
      where: what to call the value.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{where} is {_kind_of(value)}, expected an object"
        hints = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()) or sorted(hints.keys() - value.keys()):
            return (
                f"{where} {'lacks' if unknown[0] in hints else 'has an unknown'} {unknown[0]!r:.60}"
            )
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
        right = kind is Any or (type(value) is kind and (kind is not int or value >= 0))
        return None if right else f"{where} is {_kind_of(value)}, expected {_NAMES[kind]}"
    return next((p for part in parts if (p := problem_of(*part)) is not None), None)


_NAMES = {int: "a number from 0 on", str: "text", type(None): "null"}


def _kind_of(value: Any) -> str:
    return f"{value}" if type(value) is int else f"a {type(value).__name__}"


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:05d}.array_record"


def _safe(name: str) -> str:
    """A data set's or split's name as a folder's: 'train[:90%]' -> 'train--90pct-'."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name.replace("%", "pct"))


def prepared_folder(
    config: DataConfig, split: str, *, low_res_resolution: int | None
) -> pathlib.Path:
    """Where a split lies, prepared as the config wants it."""
    sizes = f"{config.resolution}px"
    if low_res_resolution is not None:
        sizes += f"_low{low_res_resolution}px"
    return pathlib.Path(config.prepared_dir) / _safe(config.name) / f"{_safe(split)}_{sizes}"


def is_there(config: DataConfig, split: str, low_res_resolution: int | None) -> bool:
    """Whether a split is prepared, in whatever way."""
    folder = prepared_folder(config, split, low_res_resolution=low_res_resolution)
    return (folder / MANIFEST).exists()


def data_path(config: DataConfig) -> str | None:
    """Which folder or file the images are of, where the name alone does not say it."""
    return os.path.realpath(config.path) if config.name in FILE_DATA else None


def settings_of(
    config: DataConfig, split: str, stage: StageConfig, *, low_res_resolution: int | None
) -> dict[str, Any]:
    """All of a config that decides what is in the records."""
    return {
        "format": FORMAT,
        "data": config.name,
        "path": data_path(config),
        "split": split,
        "crop": config.crop,
        "resize": config.resize,
        "resolution": config.resolution,
        "low_res_resolution": low_res_resolution,
        "channels": stage.channels,
        "classes": stage.num_classes,
    }


# Which config key each of these settings is. Not the path: the images may have moved.
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


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: pathlib.Path) -> Manifest:
    """The manifest of a folder, checked to be one.

    Raises:
      UserError: it is not there, is of another version, or is not as it was written.
    """
    path = folder / MANIFEST
    anew = "remove the folder and prepare the data anew"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataMissing(f"{path}: missing; prepare the data by {PREPARE}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read ({' '.join(str(e).split())}); {anew}") from e
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: no manifest, but {_kind_of(manifest)}; {anew}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: of another version of this program; {anew}")
    digest = manifest.pop("digest", None)
    problem = problem_of(manifest, Manifest) or _contradiction(cast(Manifest, manifest))
    if problem is not None:
        raise UserError(f"{path}: {problem}; {anew}")
    if digest != digest_of(manifest):
        raise UserError(f"{path}: has changed since it was written; {anew}")
    return cast(Manifest, manifest)


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


def check_settings(manifest: Manifest, wanted: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Raises UserError, naming the config key, if the data was prepared in another way."""
    for name, key in _KEYS.items():
        if name == "classes" and not wanted[name]:
            continue  # labels that are there may go unused
        if manifest[name] != wanted[name]:
            raise UserError(
                f"config.{key} = {wanted[name]!r}: the data in {folder} was prepared with"
                f" {manifest[name]!r}; set it back, or prepare into another"
                " config.data.prepared_dir"
            )


def check_source(manifest: Manifest, source: RawSource, folder: pathlib.Path) -> None:
    """Checks that prepared data is of a source, as far as that is known without reading it all.

    Where only the times of its files are others, as those of a copy are, a sample of their
    contents is compared.

    Raises:
      UserError: it is of another.
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


def encode_record(record: Sized, index: int, *, png: bool) -> bytes:
    """One example as bytes; see the module."""
    images = [record["image"]] + ([record["low_res"]] if "low_res" in record else [])
    payloads = [_png(image) if png else np.ascontiguousarray(image).tobytes() for image in images]
    lengths = [len(payload) for payload in payloads]
    head = _HEAD.pack(int(record["label"]), index, len(payloads))
    return b"".join([head, struct.pack(f"<{len(lengths)}I", *lengths), *payloads])


def _png(image: np.ndarray) -> bytes:
    import cv2

    # cv2 has blue first.
    done, data = cv2.imencode(".png", image[..., ::-1] if image.shape[2] == 3 else image)
    if not done:
        raise ValueError("cannot be encoded as PNG")
    return data.tobytes()


class PreparedReader:
    """Reads what `prepare` wrote; `open_prepared` makes it."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest):
        remedy = f"remove {folder / MANIFEST} and prepare again by {PREPARE}: what is whole is kept"
        parts = []
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            if path.exists() and path.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, expected {shard['bytes']}: it was cut or"
                    f" is another file; {remedy}"
                )
            if shard["count"]:
                parts.append(ShardPart(str(path), 0, shard["count"], shard["count"]))
        self._shards = ArrayRecordShards(parts, remedy=remedy)
        resolution, low_res = manifest["resolution"], manifest["low_res_resolution"]
        self._png, channels = manifest["encoding"] == "png", manifest["channels"]
        self.image_shape = (resolution, resolution, channels)
        self.low_res_shape = (low_res, low_res, channels) if low_res else None
        self.class_names = tuple(manifest["class_names"])
        self.class_counts = tuple(manifest["class_counts"])
        self.identity, self.times = manifest["identity"], manifest["times"]
        self._content_sample = manifest["content_sample"]

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, index: int) -> Sized:
        data = self._shards.read(index)
        try:
            label, _, count = _HEAD.unpack_from(data)
            lengths = struct.unpack_from(f"<{count}I", data, _HEAD.size)
        except struct.error as e:
            raise CorruptRecord(f"not a record of prepared data ({e})") from e
        if self.class_names and not 0 <= label < len(self.class_names):
            raise CorruptRecord(f"label {label}, expected 0 to {len(self.class_names) - 1}")
        at = _HEAD.size + 4 * count
        record: Sized = {"label": np.int32(label)}  # type: ignore[typeddict-item]
        shapes = {"image": self.image_shape, "low_res": self.low_res_shape}
        wanted = [name for name, shape in shapes.items() if shape]
        if count != len(wanted) or at + sum(lengths) != len(data):
            raise CorruptRecord("not a record of this prepared data")
        for name, length in zip(wanted, lengths, strict=True):
            record[name] = self._image(data[at : at + length], shapes[name])
            at += length
        return record

    def _image(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        if self._png:
            image, _ = decode_image(data, channels=shape[2], max_pixels=shape[0] * shape[1])
        else:
            image = np.frombuffer(data, np.uint8)
        if image.size != np.prod(shape):
            raise CorruptRecord("its image has another size than the manifest says")
        return image.reshape(shape)

    def describe(self, index: int) -> str:
        return self._shards.describe(index)

    def known_labels(self) -> None:
        return None

    def content_sample(self) -> str:
        """What the source gave when it was prepared."""
        return self._content_sample


def open_prepared(
    config: DataConfig,
    split: str,
    stage: StageConfig,
    *,
    low_res_resolution: int | None,
    find: Callable[[], RawSource],
) -> PreparedReader:
    """Opens a split that was prepared as the config wants it.

    Args:
      config: the data section.
      split: which.
      stage: what the images are for.
      low_res_resolution: of the low-res images stored beside them, if any.
      find: gives the split as it is in `config.path`, to compare with where that is another
        path than the images were prepared from.

    Raises:
      DataMissing: it was not prepared.
      UserError: in another way, or of other images, or its files are not whole.
    """
    folder = prepared_folder(config, split, low_res_resolution=low_res_resolution)
    if not (folder / MANIFEST).exists():
        others = sorted(p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}"))
        there = f" (there: {', '.join(others)})" if others else ""
        begun = ", which has begun there and is not done" if folder.exists() else ""
        raise DataMissing(
            f"config.data.name = {config.name!r}: split {split!r} is not prepared in"
            f" {folder}{there}: run {PREPARE}{begun}, or set"
            " --config.data.prepared_dir=None to decode each image when it is read"
        )
    manifest = read_manifest(folder)
    wanted = settings_of(config, split, stage, low_res_resolution=low_res_resolution)
    check_settings(manifest, wanted, folder)
    if manifest["path"] != wanted["path"]:
        try:
            source = find()
        except DataMissing as e:
            raise UserError(
                f"config.data.path = {config.path!r}: the images are not there to be compared, and"
                f" the data in {folder} was prepared from {manifest['path']}; give that path, or"
                " where they are now"
            ) from e
        check_source(manifest, source, folder)
    return PreparedReader(folder, manifest)
