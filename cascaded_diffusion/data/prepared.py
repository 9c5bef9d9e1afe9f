"""Prepared data: a split's images at a stage's sizes, in ArrayRecord shards with a manifest.

    PREPARED/<data>/<split>_<size>px/00000.array_record, ...
    PREPARED/<data>/<split>_<size>px/reports/00000.json, ...      (for `prepare` to go on by)
    PREPARED/<data>/<split>_<size>px/manifest.json

The manifest is written last: where it is, the shards are whole. It says of what the images
are and what was done to them, and has the size and SHA-256 of every shard. A record is

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
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cascaded_diffusion.config import DataConfig, StageConfig
from cascaded_diffusion.config_checks import FILE_DATA
from cascaded_diffusion.data.array_record_files import ArrayRecordShards, ShardPart
from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.errors import UserError

if TYPE_CHECKING:
    from cascaded_diffusion.data.sources import Sized

MANIFEST = "manifest.json"
FORMAT = 1
_HEAD = struct.Struct("<iqB")
_PREPARE = "python -m cascaded_diffusion.prepare --config=..."


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


# Which config key each of these settings is.
_KEYS = {
    "data": "data.name",
    "path": "data.path",
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


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
      UserError: it is not there, or is not as it was written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; prepare the data by `{_PREPARE}`") from None
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(
            f"{path}: cannot be read ({e}); remove the folder and prepare the data anew"
        ) from e
    if digest != digest_of(manifest):
        raise UserError(
            f"{path}: has changed since it was written; remove the folder and prepare the data anew"
        )
    return manifest


def check_settings(
    manifest: Mapping[str, Any], wanted: Mapping[str, Any], folder: pathlib.Path
) -> None:
    """Raises UserError, naming the config key, if the data was prepared in another way."""
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder}: of another version of this program; remove it and prepare the data anew"
        )
    for name, key in _KEYS.items():
        if name == "classes" and not wanted[name]:
            continue  # labels that are there may go unused
        if manifest[name] != wanted[name]:
            raise UserError(
                f"config.{key} = {wanted[name]!r}: the data in {folder} was prepared with"
                f" {manifest[name]!r}; set it back, or prepare into another"
                " config.data.prepared_dir"
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

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        remedy = (
            f"remove {folder / MANIFEST} and prepare again by `{_PREPARE}`: what is whole is kept"
        )
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
        self.identity = manifest["identity"]

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, index: int) -> Sized:
        data = self._shards.read(index)
        try:
            label, _, count = _HEAD.unpack_from(data)
            lengths = struct.unpack_from(f"<{count}I", data, _HEAD.size)
        except struct.error as e:
            raise CorruptRecord(f"not a record of prepared data ({e})") from e
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


def open_prepared(
    config: DataConfig, split: str, stage: StageConfig, *, low_res_resolution: int | None
) -> PreparedReader:
    """Opens a split that was prepared as the config wants it.

    Raises:
      UserError: it was not, or in another way, or its files are not whole.
    """
    folder = prepared_folder(config, split, low_res_resolution=low_res_resolution)
    if not (folder / MANIFEST).exists():
        others = sorted(p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}"))
        there = f" (there: {', '.join(others)})" if others else ""
        begun = ", which has begun there and is not done" if folder.exists() else ""
        raise UserError(
            f"config.data.name = {config.name!r}: split {split!r} is not prepared in"
            f" {folder}{there}: run `{_PREPARE}` of this config{begun}, or set"
            " --config.data.prepared_dir=None to decode each image when it is read"
        )
    manifest = read_manifest(folder)
    wanted = settings_of(config, split, stage, low_res_resolution=low_res_resolution)
    check_settings(manifest, wanted, folder)
    return PreparedReader(folder, manifest)
