"""Images at a stage's sizes: processed as they are read, or prepared before.

A record of prepared data, in the ArrayRecord shards of a folder (see `manifests`), is

    label int32, source index int64, number of images uint8, the length of each uint32,
    then the images: raw pixels, or PNG

all little-endian; the manifest has the shape of the images.
"""

import struct
import time
from collections import Counter
from collections.abc import Callable

import cv2
import numpy as np

from cascaded_diffusion.config.schema import DataConfig
from cascaded_diffusion.data import manifests, records
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.record_files import ArrayRecordShards, ShardPart
from cascaded_diffusion.data.records import CorruptRecord, RawExample, RawSource, Sized, Source
from cascaded_diffusion.data.transforms import cropped_and_resized
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.local_copies import local_copies

# What `measure_parts` measures at most.
_MAX_IMAGES, _MAX_SECS = 512, 5.0
_HEAD = struct.Struct("<iqB")


class ProcessedSource(Source):
    """A raw source, cropped and resized as `config` says, with 1 or 3 channels.

    A low-res image is made of the crop too if there is a `low_res_resolution`. `say` is told
    about the first image of each kind that was converted to 8-bit RGB or grey, and about the
    first that was enlarged; `converted` counts them by kind, of which "enlarged" is one.
    """

    def __init__(
        self,
        raw: RawSource,
        config: DataConfig,
        *,
        channels: int,
        low_res_resolution: int | None = None,
        say: Callable[[str], None] | None = None,
    ):
        size = config.resolution
        super().__init__(config, len(raw), (size, size, channels), low_res_resolution)
        self.raw = self.origin = raw
        self._config, self._say = config, say
        self.class_names, self.class_counts = raw.class_names, raw.class_counts
        self.identity, self.times = raw.identity, raw.times
        self.converted: Counter[str] = Counter()

    def read(self, index: int) -> Sized:
        return self.processed(self.raw.read(index), index)

    def processed(self, example: RawExample, index: int) -> Sized:
        """Processes a record that has been read already, as `read` does."""
        self.check_label(example.label, index)
        pixels, size = self.decoded(example.image, index), self.image_shape[0]
        height, width = pixels.shape[:2]
        if min(height, width) < size:
            what = f"{self.describe(index)} ({width} x {height} pixels) to {size} px"
            self._note("enlarged", f"enlarged: {what}; so are others that are smaller")
        return self.sized(pixels, example.label)

    def check_label(self, label: int, index: int) -> None:
        """Raises UserError for a label that is none of the classes."""
        if self.class_names and not 0 <= label < len(self.class_names):
            raise UserError(
                f"{self.describe(index)}: label {label} is out of range, expected 0 to"
                f" {len(self.class_names) - 1}; take another config.data.train_split or"
                " eval_split, or --config.stage.num_classes=0 for a model without classes"
            )

    def _note(self, kind: str, line: str) -> None:
        self.converted[kind] += 1
        if self.converted[kind] == 1 and self._say is not None:
            self._say(line)

    def decoded(self, image: bytes | np.ndarray, index: int) -> np.ndarray:
        """The pixels of an image: uint8 [H, W, C] of any size."""
        if isinstance(image, np.ndarray):
            return image
        channels, max_pixels = self.image_shape[2], self._config.pixel_limit
        pixels, note = decode_image(image, channels=channels, max_pixels=max_pixels)
        if note is not None:
            what = f"{self.describe(index)} ({note}) to 8-bit {'grey' if channels == 1 else 'RGB'}"
            self._note(note, f"converted: {what}; so are others like it")
        return pixels

    def sized(self, pixels: np.ndarray, label: int) -> Sized:
        """Crops pixels, and resizes the crop to every size that is wanted."""
        how = (self._config.crop, self._config.resize)
        image = cropped_and_resized(pixels, self.image_shape[0], *how)
        record: Sized = {"image": image, "label": np.int32(label)}
        if self.low_res_shape is not None:
            record["low_res"] = cropped_and_resized(pixels, self.low_res_shape[0], *how)
        return record


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

    def __init__(self, folder: AnyPath, manifest: manifests.Manifest, config: DataConfig):
        about = folder / manifests.MANIFEST
        remedy = f"remove {about} and prepare again by {records.PREPARE}: what is whole is kept"
        parts, shards = [], manifest["shards"]
        paths = local_copies(
            {folder / shard["file"]: (shard["bytes"], shard["sha256"]) for shard in shards},
            remedy=remedy,
        )
        for path, shard in zip(paths, shards, strict=True):
            if path.exists() and path.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, expected {shard['bytes']}: it was cut or"
                    f" is another file; {remedy}"
                )
            if shard["count"]:
                parts.append(ShardPart(str(path), 0, shard["count"], shard["count"]))
        self.origin = ArrayRecordShards(parts, remedy=remedy)
        size = manifest["resolution"]
        image_shape = (size, size, manifest["channels"])
        super().__init__(config, len(self.origin), image_shape, manifest["low_res_resolution"])
        self.identity, self.times = manifest["identity"], manifest["times"]
        self.class_names = tuple(manifest["class_names"])
        self.class_counts = np.asarray(manifest["class_counts"])
        self._manifest = manifest

    def content_sample(self) -> str:
        """The sample that was taken when the images were prepared."""
        return self._manifest["content_sample"]

    def read(self, index: int) -> Sized:
        data = self.origin.read(index)
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


def measure_parts(source: Source, say: Callable[[str], None]) -> tuple[dict[str, float], int]:
    """Milliseconds per image for each part of reading, and the number of images measured.

    They are spread over the data set. `say` is told about corrupt ones, which are not among them.
    """
    seconds: Counter[str] = Counter()
    count, start = len(source), time.monotonic()
    indices = np.unique(np.linspace(0, count - 1, min(count, _MAX_IMAGES)).astype(int))
    done = 0
    for index in np.random.default_rng(0).permutation(indices).tolist():
        try:
            seconds.update(_seconds_of_parts(source, index))
        except CorruptRecord as e:
            say(f"corrupt: {source.describe(index)}: {e}")
            continue
        done += 1
        if time.monotonic() - start > _MAX_SECS:
            break
    return {name: 1000 * secs / max(done, 1) for name, secs in seconds.items()}, done


def _seconds_of_parts(source: Source, index: int) -> dict[str, float]:
    start = time.perf_counter()
    if not isinstance(source, ProcessedSource):
        source.read(index)
        return {"read a prepared record": time.perf_counter() - start}
    image, label = source.raw.read(index)
    read = time.perf_counter()
    source.check_label(label, index)
    pixels = source.decoded(image, index)
    decoded = time.perf_counter()
    source.sized(pixels, label)
    return {
        "read the file or record": read - start,
        "decode": decoded - read,
        "crop and resize": time.perf_counter() - decoded,
    }


def class_counts(
    source: Source, *, max_examples: int, say: Callable[[int], None]
) -> tuple[np.ndarray, int]:
    """How many examples each class has, int [K], and the number of examples that were counted.

    If that is not known without reading, at most `max_examples` spread over the data set are
    read, and `say` is told how many have been.
    """
    if source.class_counts is not None:
        return source.class_counts, len(source)
    count, labels = min(len(source), max_examples), []
    for done in range(1, count + 1):
        index = (done - 1) * len(source) // count
        try:
            label = source.raw.read(index).label
        except CorruptRecord as e:
            source.guard.note(index, source.describe(index), str(e))
            continue
        source.check_label(label, index)
        labels.append(label)
        say(done)
    return np.bincount(np.asarray(labels, np.int64), minlength=source.num_classes), len(labels)
