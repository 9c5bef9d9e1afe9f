"""Stored images: ADM-style `.npz` files and folders of PNGs, ours and other frameworks'."""

import dataclasses
import hashlib
import json
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from cascaded_diffusion.config.schema import StageConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.image_files import PngFolder
from cascaded_diffusion.files.npz_archive import layout_hint, read_arrays
from cascaded_diffusion.files.paths import check_path
from cascaded_diffusion.files.whole import whole_file, write_npz_whole

_DIGEST_BATCH = 1000
_MAX_PROVENANCE_BYTES = 1 << 24

# uint8 images [n, H, W, C], in memory or read on demand.
Images = np.ndarray | PngFolder


@dataclasses.dataclass(frozen=True)
class StoredImages:
    """Images of a file or folder: uint8 [n, H, W, C], and int64 labels [n] if it has any."""

    path: str
    images: Images
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)

    def count(self, num_samples: int | None) -> int:
        """How many are measured: the first `num_samples`, or all.

        Raises UserError if there are fewer.
        """
        if num_samples is not None and num_samples > len(self):
            raise UserError(
                f"--num_samples={num_samples}: --samples={self.path} has {len(self)} images;"
                " expected at least as many"
            )
        return num_samples or len(self)

    def digest(self, *, labels: bool = True) -> str:
        """SHA-256 of the pixels in order and of the labels if there are any, first 12 digits."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for batch in batches(self.images, _DIGEST_BATCH):
            digest.update(np.ascontiguousarray(batch).tobytes())
        if labels and self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:12]


def batches(images: Images, batch_size: int) -> Iterator[np.ndarray]:
    """The images in order, `batch_size` at a time; the last batch may be smaller."""
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def save_samples(
    path: AnyPath,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    provenance: Mapping[str, object] | None = None,
) -> None:
    """Writes an ADM-style file: `arr_0` uint8 NHWC, `arr_1` int64 labels.

    `provenance`, all that the samples depend on, is stored as JSON beside them.
    """
    arrays = {"arr_0": images, "arr_1": labels.astype(np.int64)}
    if provenance is not None:
        arrays["provenance"] = np.asarray(json.dumps(provenance))
    write_npz_whole(path, arrays)


def save_sample_batches(
    path: AnyPath,
    shape: tuple[int, ...],
    batches_of: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]],
) -> None:
    """Writes an ADM-style file from batches, of which it holds only one at a time.

    `shape` is (n, H, W, C) of all images. `batches_of` returns the batches (images, labels) in
    order each time it is called. Raises ValueError if there are more or fewer images.
    """
    arrays = ((shape, "|u1"), (shape[:1], "<i8"))
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for which, (array_shape, dtype) in enumerate(arrays):
            with archive.open(f"arr_{which}.npy", "w", force_zip64=True) as f:
                header = {"descr": dtype, "fortran_order": False, "shape": array_shape}
                np.lib.format.write_array_header_1_0(f, header)
                count = 0
                for batch in batches_of():
                    rows = np.ascontiguousarray(batch[which], dtype)
                    f.write(rows.tobytes())
                    count += len(rows)
            if count != shape[0]:
                raise ValueError(f"{count} samples, expected {shape[0]}")


def stored_samples(path: AnyPath, provenance: Mapping[str, object]) -> np.ndarray | None:
    """The images of a `save_samples` file; None if it is missing, damaged or of another origin."""
    try:
        about = read_arrays(path, ("provenance",), max_bytes=_MAX_PROVENANCE_BYTES)
        if json.loads(str(about["provenance"])) == provenance:
            return read_arrays(path, ("arr_0",))["arr_0"]
    except (OSError, ValueError, KeyError, RecursionError):
        pass
    return None


def open_images(path: str, *, flag: str, at_least: int = 2) -> StoredImages:
    """Opens an ADM-style `.npz` (`arr_0` uint8 NHWC, `arr_1` labels if any) or a folder of PNGs.

    Prints on stderr how many images there are and which files were passed over. Raises UserError
    if it is neither, or has fewer than `at_least` (a folder: two) uint8 images of one size.
    """
    rest = ""
    found = check_path(path, f"--{flag}")
    if isinstance(found, BucketPath) and found.is_dir():
        raise UserError(
            f"--{flag}={path}: a folder of PNGs is read on this machine alone: copy it here, or"
            " give an .npz, as samples.npz"
        )
    if isinstance(found, pathlib.Path) and found.is_dir():
        folder = PngFolder(found, flag=flag)
        rest = f" ({folder.passed_over})" if folder.passed_over else ""
        stored = StoredImages(path, folder, None)
    else:
        stored = _read_npz(path, flag, at_least)
    print(f"{flag}: {len(stored)} images{rest}", file=sys.stderr, flush=True)
    return stored


def _read_npz(path: str, flag: str, at_least: int) -> StoredImages:
    try:
        arrays = read_arrays(path, ("arr_0", "arr_1"))
        if "arr_0" not in arrays:
            raise ValueError("it has no arr_0")
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"--{flag}={path}: expected a folder of PNGs, or an .npz with arr_0 (images) that is"
            f" whole ({reason})"
        ) from e
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"--{flag}={path}: arr_0 is {images.dtype} {images.shape}{_range_of(images)}, expected"
            f" uint8 (n, height, width, 1 or 3), values 0 to 255{layout_hint(images.shape)}"
        )
    if len(images) < at_least:
        raise UserError(f"--{flag}={path}: {len(images)} images, expected at least {at_least}")
    if labels is not None:
        integers = np.issubdtype(labels.dtype, np.integer)
        if labels.shape != (len(images),) or not integers or labels.max() > np.iinfo(np.int64).max:
            raise UserError(
                f"--{flag}={path}: arr_1 is {labels.dtype} {labels.shape}, expected {len(images)}"
                " integer labels"
            )
        labels = labels.astype(np.int64)
    return StoredImages(path, images, labels)


def _range_of(images: np.ndarray) -> str:
    if not np.issubdtype(images.dtype, np.floating) or not images.size:
        return ""
    bad = int((~np.isfinite(images)).sum())
    if bad:
        return f" with {bad} values that are NaN or infinite"
    return f" with values from {images.min():g} to {images.max():g}"


def check_labels(labels: np.ndarray, num_classes: int, name: str, reason: str = "") -> None:
    """Raises UserError, with what `name` calls the labels, unless all of them are classes."""
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"{name}: labels from {labels.min()} to {labels.max()}, expected 0 to"
            f" {num_classes - 1}{reason}"
        )


def load_samples(path: str, stage: StageConfig, *, low_res: bool = False) -> StoredImages:
    """Opens `--samples`, which a stage can have made, or `--low_res_samples` for it to enlarge.

    Raises UserError if they cannot be read, or are of another size or kind.
    """
    flag, verb, size = "samples", "makes", stage.resolution
    if low_res:
        flag, verb, size = "low_res_samples", "enlarges", stage.low_res_resolution
    stored = open_images(path, flag=flag)
    given, shape = f"--{flag}={path}", tuple(stored.images.shape[1:])
    wanted = (size, size, stage.channels)
    if shape != wanted:
        raise UserError(f"{given}: images of {shape}, expected {wanted}, as {stage.name!r} {verb}")
    if stage.num_classes and stored.labels is None:
        raise UserError(
            f"{given}: no labels; {stage.name!r} has {stage.num_classes} classes, so that an .npz"
            " with arr_1 is needed"
        )
    if stage.num_classes:
        check_labels(stored.labels, stage.num_classes, given, f", as {stage.name!r} has")
    return stored
