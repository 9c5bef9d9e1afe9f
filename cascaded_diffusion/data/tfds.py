"""Image data sets of TensorFlow Datasets (TFDS), read without TensorFlow.

Both formats have random access: `array_record`, which TFDS prepares for us, and `tfrecord`, in
which others prepared their copies. The only home of tensorflow_datasets.
"""

import difflib
import pathlib
import re
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from cascaded_diffusion.config.convert import fail
from cascaded_diffusion.config.run_checks import BUILTIN_DATA, FILE_DATA
from cascaded_diffusion.data import record_files, records
from cascaded_diffusion.data.records import CorruptRecord, DataMissing, RawExample
from cascaded_diffusion.data.splits import split_problem
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import is_url, path_of, set_up_gcsfs
from cascaded_diffusion.files.local_copies import local_copy

# A name, a builder config, a version. No namespace: TFDS would run code it downloads for it.
_NAME = re.compile(r"[a-z][a-z0-9_]*(/[A-Za-z0-9_.\-]+)?(:\d+\.\d+\.\d+)?")
_REMEDY = "copy the data set anew, or remove the folder and prepare it again"
_SHARDS: dict[str, type[record_files.Shards]] = {
    "array_record": record_files.ArrayRecordShards,
    "tfrecord": record_files.TfRecordShards,
}


class TfdsSource(records.RawSource):
    """A split of a TFDS image data set; `load_tfds` makes it."""

    def __init__(self, name: str, split: str, builder: tfds.core.DatasetBuilder):
        self._features = features = builder.info.features
        self._image_key, self._label_key = _keys(name, features)
        if self._label_key:
            self.class_names = tuple(features[self._label_key].names)
        shape = features[self._image_key].shape
        self.fixed_shape = tuple(shape) if None not in shape else None
        # Images stay encoded, since decoding them takes our own checks.
        self._decoders = {self._image_key: tfds.decode.SkipDecoding()}
        try:
            instructions = builder.info.splits[split].file_instructions
        except (KeyError, ValueError, AssertionError) as e:
            there = f"{name!r} has {', '.join(map(repr, builder.info.splits))}"
            line = split_problem(split, f"{there}, and parts of them like 'train[:90%]'")
            raise UserError(line) from e
        if not instructions:
            raise UserError(split_problem(split, "holds no images"))
        where = {file: path_of(file) for file in sorted({str(i.filename) for i in instructions})}
        copies = {file: str(local_copy(path)) for file, path in where.items()}
        parts = [
            record_files.ShardPart(copies[str(i.filename)], i.skip, i.take, i.examples_in_shard)
            for i in instructions
        ]
        file_format = builder.info.file_format.value if builder.info.file_format else "tfrecord"
        if file_format not in _SHARDS:
            raise UserError(
                f"{builder.data_path}: prepared as {file_format}, expected {' or '.join(_SHARDS)}"
            )
        self.origin = _SHARDS[file_format](parts, remedy=_REMEDY)
        found = [path.stat() for path in where.values()]
        names = [path.name.encode() for path in where.values()]
        digest = records.digest_of_files(names, (status.st_size for status in found))
        self.identity = f"{builder.info.full_name}:{split}:{len(self)} images:{digest}"
        self.times = records.digest_of_files(names, (int(status.st_mtime) for status in found))

    def read(self, index: int) -> RawExample:
        data = self.origin.read(index)
        try:
            example = self._features.deserialize_example_np(data, decoders=self._decoders)
            image = example[self._image_key]
            label = int(example[self._label_key]) if self._label_key else 0
        except Exception as e:  # whatever protobuf and TFDS raise for other bytes
            raise CorruptRecord(f"cannot be parsed ({' '.join(str(e).split())[:200]})") from e
        return RawExample(bytes(image) if not isinstance(image, np.ndarray) else image, label)


def find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a data set, prepared or not. Raises UserError if TFDS has none."""
    if not _NAME.fullmatch(name):
        fail("data.name", name, "a name like 'cifar10', 'lsun/bedroom' or 'cifar10:3.0.2'")
    if data_dir is not None and is_url(data_dir):
        set_up_gcsfs()
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as e:  # whatever TFDS and the data set's own code raise
        raise UserError(f"config.data.name = {name!r}: {_why_unknown(name, e)}") from e


def _why_unknown(name: str, error: Exception) -> str:
    ours = (*BUILTIN_DATA, *FILE_DATA)
    known = [*ours, *tfds.list_builders(with_community_datasets=False)]
    base, slash, builder_config = name.partition("/")
    if base not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return (
            f"expected one of {', '.join(map(repr, ours))}, or a data set of"
            f" tensorflow-datasets{hint}"
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    try:
        configs = sorted(tfds.builder_cls(base).builder_configs)
    except Exception:  # its code cannot be imported; the first error says why
        configs = []
    if slash and configs and builder_config.partition(":")[0] not in configs:
        return f"{base!r} has these configurations: {', '.join(configs)}"
    return f"TFDS cannot open it ({reason})"


def _by_hand(builder: tfds.core.DatasetBuilder) -> tuple[pathlib.Path, str | None]:
    """Where files go that are downloaded by hand, and which; None if TFDS downloads them."""
    folder = pathlib.Path(builder.data_dir_root) / "downloads" / "manual"
    text = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    return folder, f"{' '.join(text.split())} (manual_dir is {folder})" if text else None


def load_tfds(name: str, split: str, data_dir: str | None) -> TfdsSource:
    """Opens a split of a data set that TFDS has prepared.

    Raises DataMissing, which says how to get it, if it is not there, and UserError if it is
    damaged, has no such split, or is no data set of images.
    """
    builder = find_builder(name, data_dir)
    if not builder.info.splits:
        _, how = _by_hand(builder)
        by_hand = f"; before that, download by hand: {how}" if how else ""
        raise DataMissing(
            f"config.data.name = {name!r}: not found in {builder.data_path}; get and prepare it by"
            f" {records.PREPARE}, or give the folder of a copy as --config.data.path{by_hand}"
        )
    return TfdsSource(name, split, builder)


def _keys(name: str, features: tfds.features.FeatureConnector) -> tuple[str, str | None]:
    if not isinstance(features, tfds.features.FeaturesDict):
        features = {}
    images = [key for key, f in features.items() if type(f) is tfds.features.Image]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        found = f"found the features {', '.join(features) or 'none'}"
        fail("data.name", name, f"a data set with one image per example, {found}")
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if "label" in labels:
        labels = ["label"]
    return images[0], labels[0] if len(labels) == 1 else None


def get_tfds(name: str, data_dir: str | None, *, dry_run: bool, say: Callable[[str], None]) -> bool:
    """Has TFDS download and prepare a data set that it does not have, as array_record.

    A dry run says what would be downloaded instead. Returns whether the data set is there.
    Raises UserError if files must be downloaded by hand first, TensorFlow is needed, or TFDS fails.
    """
    builder = find_builder(name, data_dir)
    if builder.info.splits:
        return True
    if data_dir is not None and is_url(data_dir):
        raise UserError(
            f"config.data.path = {data_dir!r}: {name!r} is not prepared there; prepare it on a disk"
            " and copy the folder, as by `gcloud storage cp --recursive`"
        )
    manual_dir, by_hand = _by_hand(builder)
    if by_hand is None:
        say(f"{name}: not in {builder.data_path} yet; {_download_size(builder)}")
    elif dry_run:
        say(f"{name}: not in {builder.data_path} yet; its files are downloaded by hand: {by_hand}")
    elif not manual_dir.is_dir():
        raise UserError(
            f"{builder.name}: {manual_dir} is missing: make it, and put the files there that are"
            f" downloaded by hand: {by_hand}"
        )
    if dry_run:
        say("size and time of preparing are known when it is there")
        return False
    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig()
        )
    except Exception as e:  # whatever TFDS, the builder, the network and archives raise
        reason = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, ImportError) or "tensorflow" in reason.lower():
            raise UserError(
                f"{builder.name}: TFDS needs TensorFlow to prepare it (not to read it): run `pip"
                f" install -e '.[tf]'` and this command again ({reason[:200]})"
            ) from e
        raise UserError(
            f"{builder.name}: TFDS could not prepare it in {builder.data_path}"
            f" ({type(e).__name__}: {reason[:600]})"
        ) from e
    return True


def _download_size(builder: tfds.core.DatasetBuilder) -> str:
    sizes = {url: info.size for url, info in (builder.url_infos or {}).items()}
    if builder.builder_config:  # the URLs are those of all configurations
        name = builder.builder_config.name
        sizes = {url: size for url, size in sizes.items() if name in url} or sizes
    size = sum(sizes.values())
    return f"TFDS downloads up to {size / 1e9:.2f} GB" if size else "TFDS downloads it"
