"""Reference statistics, which samples are compared with, and a record of their origin.

A reference is used only if every field of its fingerprint is what the comparison needs. The file
is an `.npz` with the keys that other tools use too, `mu` and `sigma` (of the pooled features),
`mu_s` and `sigma_s` (spatial), and our own: `features`, `pixels`, `fingerprint`, `digest`. ADM's
reference batches were made with Inception's original, "legacy" resizing and are treated so.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor, Features
from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, Moments
from cascaded_diffusion.evaluation.metrics.pixel_statistics import PixelStatistics
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, batches
from cascaded_diffusion.files.bucket import AnyPath, path_of
from cascaded_diffusion.files.npz_archive import array_names, read_arrays
from cascaded_diffusion.files.whole import sha256_of_arrays, write_npz_whole
from cascaded_diffusion.runtime.progress import Progress

_BATCH = 500
# The features of this many images, spread over the set, are kept for KID, precision and recall.
_KEPT_FEATURES = 10_000
S = TypeVar("S")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The origin of reference statistics."""

    data: str  # name of the data set, the file or the folder
    split: str  # of the data set; "" for files
    num_images: int
    crop: str  # how images were made square
    resolution: int  # height in pixels at which they are compared
    channels: int
    resize: str  # how they were brought to that resolution; "none" if they had it
    features: str  # identity of the extractor, which includes its own resizing
    pixels: str  # SHA-256 of all pixels in order, first 12 digits

    def __str__(self) -> str:
        where = f"{self.data}:{self.split}" if self.split else self.data
        how = f"crop {self.crop}:resize {self.resize}"
        return f"{where}:{self.num_images}:{self.resolution}px:{how}:{self.pixels}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images, as far as they are known."""

    name: str  # in records
    fingerprint: Fingerprint | None  # None for a file of another tool
    pooled: FeatureStatistics | Moments
    spatial: FeatureStatistics | Moments | None
    features: np.ndarray | None  # the pooled ones of up to 10,000 images [m, F], float32
    pixels: PixelStatistics | None


def added(sums: S | None, more: S) -> S:
    """`sums + more`, where None stands for no sums yet."""
    return more if sums is None else sums + more


class ImageSums:
    """Sums over images, their pooled and, if there are any, spatial features."""

    def __init__(self) -> None:
        self.count = 0
        self.pooled: FeatureStatistics | None = None
        self.spatial: FeatureStatistics | None = None
        self.pixels: PixelStatistics | None = None

    def add(self, images: np.ndarray, features: Features) -> None:
        """Adds images uint8 [b, H, W, C]. Raises ValueError if a feature is not finite."""
        self.count += len(images)
        self.pooled = added(self.pooled, FeatureStatistics.of(features.pooled))
        if features.spatial is not None:
            self.spatial = added(self.spatial, FeatureStatistics.of(features.spatial))
        self.pixels = added(self.pixels, PixelStatistics.of(images))


def measure_reference(
    batches: Iterable[np.ndarray],
    extractor: FeatureExtractor,
    *,
    num_images: int,
    label: str,
    **origin: str,
) -> Reference:
    """Statistics of `num_images` images uint8 [b, H, W, C] that come batch by batch.

    `label` is for the progress line; `origin` has `data`, `split`, `crop` and `resize` of the
    fingerprint. Raises ValueError if a feature is not finite, or there are more or fewer images.
    """
    progress = Progress(num_images, unit="images", label=label)
    num_kept = min(num_images, _KEPT_FEATURES)
    kept_rows = np.arange(num_kept) * num_images // num_kept
    sums, kept, digest, shape = ImageSums(), [], hashlib.sha256(), ()
    for images in batches:
        features, shape, start = extractor(images), images.shape[1:], sums.count
        sums.add(images, features)
        wanted = kept_rows[(kept_rows >= start) & (kept_rows < sums.count)]
        kept.append(features.pooled[wanted - start].astype(np.float32))
        digest.update(np.ascontiguousarray(images).tobytes())
        progress.update(sums.count)
    progress.close()
    if sums.count != num_images:
        raise ValueError(f"{sums.count} images, expected {num_images}")
    made = Fingerprint(
        num_images=num_images,
        resolution=shape[0],
        channels=shape[2],
        features=extractor.identity,
        pixels=digest.hexdigest()[:12],
        **origin,
    )
    return Reference(
        name=str(made),
        fingerprint=made,
        pooled=sums.pooled,
        spatial=sums.spatial,
        features=np.concatenate(kept),
        pixels=sums.pixels,
    )


def measure_stored(images: StoredImages, extractor: FeatureExtractor) -> Reference:
    """Statistics of the images of a file or folder, as they are."""
    origin = {"data": f"file:{images.path}", "split": "", "crop": "none", "resize": "none"}
    parts = batches(images.images, _BATCH)
    return measure_reference(parts, extractor, num_images=len(images), label="reference", **origin)


def save_reference(path: AnyPath, reference: Reference) -> None:
    """Writes a reference with its fingerprint and the digest of its arrays."""
    arrays = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    if (sums := reference.pixels) is not None:
        count = np.full_like(sums.total, sums.count)
        arrays["pixels"] = np.stack([count, sums.total, sums.squares])
    fingerprint = dataclasses.asdict(reference.fingerprint)
    arrays["fingerprint"] = np.asarray(json.dumps(fingerprint, sort_keys=True))
    write_npz_whole(path, {**arrays, "digest": np.asarray(sha256_of_arrays(arrays))})


def holds_statistics(path: str, *, flag: str) -> bool:
    """Whether a path holds statistics. Raises UserError unless it is a folder or whole `.npz`."""
    if path_of(path).is_dir():
        return False
    try:
        return "mu" in array_names(path)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"--{flag}={path}: expected a folder of PNGs, or an .npz with arr_0 (images) or mu and"
            f" sigma (statistics) that is whole ({reason})"
        ) from e


def read_reference(path: str, *, flag: str) -> Reference:
    """The statistics of a file, any tool's. Raises UserError if it is damaged or has none."""
    try:
        names = [name for name in array_names(path) if not name.startswith("arr_")]
        arrays = read_arrays(path, names, max_bytes=1 << 31)  # Inception's take some 150 MB
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"--{flag}={path}: cannot be read as .npz ({reason})") from e
    try:
        return _reference_of(arrays, path_of(path).name)
    except ValueError as e:
        raise UserError(f"--{flag}={path}: {e}") from e


def _reference_of(arrays: dict[str, np.ndarray], name: str) -> Reference:
    """The reference of a file called `name`. Raises ValueError if its arrays are wrong."""
    recorded, digest = arrays.pop("digest", None), sha256_of_arrays(arrays)
    if recorded is not None and str(recorded) != digest:
        raise ValueError("its arrays have changed since it was written; make it anew")
    if not {"mu", "sigma"} <= set(arrays):
        raise ValueError("expected statistics, mu and sigma, in it")
    if ("mu_s" in arrays) != ("sigma_s" in arrays):
        raise ValueError("of mu_s and sigma_s it has one, expected both or none")
    pixels, stored = None, arrays.get("fingerprint")
    fingerprint = None if stored is None else _fingerprint_of(str(stored))
    pooled = _moments(arrays["mu"], arrays["sigma"])
    if (features := arrays.get("features")) is not None:
        wanted = f"expected finite numbers (n, {len(pooled.mean)})"
        if features.shape[1:] != pooled.mean.shape or not _is_finite(features):
            raise ValueError(f"features are {features.dtype} {features.shape}, {wanted}")
    if (sums := arrays.get("pixels")) is not None:
        wanted = "expected count, sum and sum of squares of every channel"
        if sums.ndim != 2 or len(sums) != 3 or not _is_finite(sums) or sums[0, 0] < 1:
            raise ValueError(f"pixels are {sums.dtype} {sums.shape}, {wanted}")
        pixels = PixelStatistics(int(sums[0, 0]), sums[1], sums[2])
    return Reference(
        name=str(fingerprint) if fingerprint else f"{name}:{digest[:12]}",
        fingerprint=fingerprint,
        pooled=pooled,
        spatial=_moments(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None,
        features=features,
        pixels=pixels,
    )


def _fingerprint_of(text: str) -> Fingerprint:
    types = typing.get_type_hints(Fingerprint)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError("its fingerprint is no JSON; make it anew") from e
    if not isinstance(values, dict) or {k: type(v) for k, v in values.items()} != types:
        raise ValueError(
            f"its fingerprint is of another version, expected the fields {', '.join(types)}; make"
            " it anew"
        )
    return Fingerprint(**values)


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiu" and bool(np.isfinite(array).all())


def _moments(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    square = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
    if not (square and _is_finite(mean) and _is_finite(covariance)):
        raise ValueError(
            f"a mean of {mean.dtype} {mean.shape} and a covariance of {covariance.dtype}"
            f" {covariance.shape}, expected [F] and [F, F], finite numbers"
        )
    # A covariance stored in float32 is asymmetric by less, relative to its largest number.
    asymmetry, tolerance = np.abs(covariance - covariance.T), 1e-5 * np.abs(covariance).max()
    if asymmetry.max() > tolerance or covariance.diagonal().min() < -tolerance:
        raise ValueError("its covariance is none: not symmetric, or with negative variances")
    return Moments(mean.astype(np.float64), covariance.astype(np.float64))


def differing_field(reference: Reference, **wanted: str | int) -> str | None:
    """The first field of a reference's fingerprint that is not as wanted, in a few words."""
    if reference.fingerprint is None:
        return "it has no fingerprint"
    for field, value in wanted.items():
        found = getattr(reference.fingerprint, field)
        if found != value:
            return f"its field {field!r} is {found!r}, expected {value!r}"
    return None


def check_reference(reference: Reference, path: str, flag: str, **wanted: str | int) -> None:
    """Raises UserError if a reference has a fingerprint and a field of it is not as wanted."""
    if reference.fingerprint is not None and (why := differing_field(reference, **wanted)):
        raise UserError(
            f"--{flag}={path}: {why}; make it anew with `python -m cascaded_diffusion.reference`"
        )
