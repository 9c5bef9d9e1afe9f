"""The records of prepared data, in the ArrayRecord shards of a folder (see `manifests`).

A record is

    label int32, source index int64, number of images uint8, the length of each uint32,
    then the images: raw pixels, or PNG

all little-endian; the manifest has the shape of the images.
"""

from __future__ import annotations

import pathlib
import struct

import cv2
import numpy as np

from cascaded_diffusion.config.schema import DataConfig
from cascaded_diffusion.data import manifests
from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.record_files import ArrayRecordShards, ShardPart
from cascaded_diffusion.data.records import PREPARE, Sized, Source
from cascaded_diffusion.errors import UserError

_HEAD = struct.Struct("<iqB")


def encode_record(record: Sized, index: int, *, png: bool) -> bytes:
    """One example as bytes; see the module."""
    images = [record[name] for name in ("image", "low_res") if name in record]
    payloads = [_png(image) if png else np.ascontiguousarray(image).tobytes() for image in images]
    count, lengths = len(payloads), map(len, payloads)
    head = struct.pack(f"<iqB{count}I", int(record["label"]), index, count, *lengths)
    return b"".join([head, *payloads])


def _png(image: np.ndarray) -> bytes:
    # cv2 has blue first.
    _, data = cv2.imencode(".png", image[..., ::-1] if image.shape[2] == 3 else image)
    return data.tobytes()


class PreparedSource(Source):
    """Reads what `prepare` wrote in a folder."""

    def __init__(self, folder: pathlib.Path, manifest: manifests.Manifest, config: DataConfig):
        manifest_path = folder / manifests.MANIFEST
        remedy = f"remove {manifest_path} and prepare again by {PREPARE}: what is whole is kept"
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
        size = manifest["resolution"]
        image_shape = (size, size, manifest["channels"])
        super().__init__(config, len(self._shards), image_shape, manifest["low_res_resolution"])
        self.identity, self.times = manifest["identity"], manifest["times"]
        self.class_names = tuple(manifest["class_names"])
        self.class_counts = np.asarray(manifest["class_counts"])
        self._manifest = manifest

    def __len__(self) -> int:
        return len(self._shards)

    def describe(self, index: int) -> str:
        return self._shards.describe(index)

    def content_sample(self) -> str:
        """The sample that was taken when the images were prepared."""
        return self._manifest["content_sample"]

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
        if self._manifest["encoding"] == "png":
            image, _ = decode_image(data, channels=shape[2], max_pixels=shape[0] * shape[1])
        else:
            image = np.frombuffer(data, np.uint8)
        if image.size != np.prod(shape):
            raise CorruptRecord("its image has another size than the manifest says")
        return image.reshape(shape)
