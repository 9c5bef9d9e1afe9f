"""`evaluate` without a run: the samples of any framework against any reference, by Inception."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Any

from absl import flags

from cascaded_diffusion.commands import flag_checks, inception_flags, jax_setup
from cascaded_diffusion.config.run_checks import check_sample_count
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, batches, open_images
from cascaded_diffusion.files.npz_archive import array_names

_BATCH = 500
# How ADM's reference statistics were resized, as those of every file without a fingerprint.
_FOREIGN_RESIZE = "legacy"


def evaluate_files(fv: flags.FlagValues) -> int:
    """Measures --samples against --reference. Returns the exit code.

    On stdout there is one JSON line; progress and notes go to stderr.

    Raises:
      UserError: a file that cannot be read, images of different sizes, fewer samples
        than asked for, or a reference of another extractor or resolution.
    """
    with contextlib.redirect_stdout(sys.stderr):
        record = _record(fv)
    print(json.dumps(record), flush=True)
    return 0


def _record(fv: flags.FlagValues) -> dict[str, Any]:
    flag_checks.require(fv, "reference")
    flag_checks.check_paths(fv, "samples", "reference")
    inception_flags.check_inception(fv)
    samples = open_images(fv.samples, flag="samples")
    count = num_samples(fv, samples)
    check_sample_count(count, "inception", allow_few=fv.allow_few_samples)

    jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation import reference as reference_lib
    from cascaded_diffusion.evaluation.evaluator import Evaluator
    from cascaded_diffusion.runtime.mesh import build_mesh

    statistics = images = None
    if reference_lib.holds_statistics(fv.reference, flag="reference"):
        statistics = reference_lib.read_reference(fv.reference, flag="reference")
        _check_size(fv, statistics, samples)
    if statistics is None or (statistics.features is None and "arr_0" in array_names(fv.reference)):
        images = _reference_images(fv, samples)
    if statistics is not None:
        _say_what_is_missing(statistics, images)
    resize = _resize(fv, statistics)
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    extractor = inception_flags.inception_loader(fv, mesh)(resize)
    if statistics is not None:
        reference_lib.check_reference(
            statistics, fv.reference, "reference", features=extractor.identity
        )
        _check_features(fv, statistics, extractor(samples.images[:1]))
    if images is not None:
        measured = reference_lib.measure_reference(
            batches(images.images, _BATCH),
            extractor,
            num_images=len(images),
            label="reference",
            data=f"file:{fv.reference}",
            split="",
            crop="none",
            resize="none",
        )
        statistics = _joined(statistics, measured)
    evaluator = Evaluator(extractor=extractor, references={"train": statistics}, classes=False)
    try:
        scores = evaluator.scores(samples.images, None, count)
    except ValueError as e:  # features of another size, a covariance that is none
        raise UserError(f"--reference={fv.reference}: {e}") from e
    return {
        "samples": fv.samples,
        "num_samples": count,
        "samples_digest": samples.digest(labels=False),
        "resolution": samples.images.shape[1],
        "reference": statistics.name,
        "features": extractor.identity,
        **scores,
    }


def num_samples(fv: flags.FlagValues, samples: StoredImages) -> int:
    """How many samples to measure: all, or the first --num_samples.

    Raises:
      UserError: there are fewer than asked for.
    """
    found = len(samples)
    if fv.num_samples is not None and fv.num_samples > found:
        raise UserError(
            f"--num_samples={fv.num_samples}: --samples={samples.path} has {found} images;"
            " expected at least as many"
        )
    if fv.num_samples is not None and fv.num_samples < found:
        print(f"samples: the first {fv.num_samples} are measured", file=sys.stderr, flush=True)
    return fv.num_samples or found


def _resize(fv: flags.FlagValues, statistics: Any) -> str:
    """Inception's way of resizing: --resize, else the reference's own."""
    own = None
    if statistics is not None:
        # ADM's files have spatial statistics; others may be of any way.
        own = _FOREIGN_RESIZE if statistics.spatial is not None else fv.resize
        if own is None and statistics.fingerprint is None:
            raise UserError(
                f"--reference={fv.reference}: does not say how its images came to Inception's"
                " 299 px; say it with --resize=legacy or --resize=clean"
            )
        if statistics.fingerprint is not None:
            own = "clean" if ":clean:" in statistics.fingerprint.features else "legacy"
    resize = fv.resize or own or "legacy"
    if own is not None and resize != own:
        raise UserError(
            f"--resize={resize}: the statistics of --reference={fv.reference} are of"
            f" --resize={own}"
            + (" (as those of every file that does not say)" if not statistics.fingerprint else "")
            + "; the two are never mixed"
        )
    return resize


def _reference_images(fv: flags.FlagValues, samples: StoredImages) -> StoredImages:
    images = open_images(fv.reference, flag="reference")
    if tuple(images.images.shape[1:]) != tuple(samples.images.shape[1:]):
        raise UserError(
            f"--reference={fv.reference}: images of {tuple(images.images.shape[1:])}, expected"
            f" {tuple(samples.images.shape[1:])}, as --samples={fv.samples} has"
        )
    return images


def _check_size(fv: flags.FlagValues, statistics: Any, samples: StoredImages) -> None:
    if statistics.fingerprint is None:
        return
    for field, found in (
        ("resolution", samples.images.shape[1]),
        ("channels", samples.images.shape[3]),
    ):
        wanted = getattr(statistics.fingerprint, field)
        if wanted != found:
            raise UserError(
                f"--reference={fv.reference}: its field {field!r} is {wanted}, expected {found},"
                f" as --samples={fv.samples} has"
            )


def _say_what_is_missing(statistics: Any, images: StoredImages | None) -> None:
    """Says which metrics statistics do not allow, before anything is measured."""
    if statistics.fingerprint is not None:
        print(f"reference: statistics of {statistics.fingerprint.num_images} images")
    missing = []
    if statistics.spatial is None:
        missing.append("mu_s and sigma_s, so that sFID is left out")
    if statistics.features is None and images is None:
        missing.append(
            "features and images (arr_0), so that KID, precision and recall are left out"
        )
    if missing:
        print(
            f"reference: it lacks {'; and '.join(missing)}. For all metrics give the real images"
            " themselves, or what `python -m cascaded_diffusion.reference --images=...` makes of"
            " them",
            flush=True,
        )


def _check_features(fv: flags.FlagValues, statistics: Any, features: Any) -> None:
    """Raises UserError unless statistics are of features of the extractor's sizes."""
    for name, moments, own in (
        ("features", statistics.pooled, features.pooled),
        ("spatial features", statistics.spatial, features.spatial),
    ):
        if moments is not None and own is not None and len(moments.mean) != own.shape[1]:
            raise UserError(
                f"--reference={fv.reference}: {name} of sizes {own.shape[1]} and"
                f" {len(moments.mean)} cannot be compared: they come from different extractors"
            )


def _joined(statistics: Any, images: Any) -> Any:
    """Statistics of a file, with the features of the images beside them.

    ADM's reference batches hold statistics of a whole training set, and 10,000 images
    of it for precision and recall.
    """
    if statistics is None:
        return images
    return dataclasses.replace(statistics, features=images.features)
