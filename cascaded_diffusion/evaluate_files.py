"""`evaluate` without a run: the samples of any framework against any reference, by Inception."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from absl import flags

from cascaded_diffusion import cli
from cascaded_diffusion.config import MeshConfig
from cascaded_diffusion.config_checks import check_sample_count
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.samples import StoredImages, batches, open_images

_BATCH = 500
# How ADM's reference statistics were resized, as those of every file without a fingerprint.
_FOREIGN_RESIZE = "legacy"


def evaluate_files(fv: flags.FlagValues) -> int:
    """Measures --samples against --reference: one JSON line. Returns the exit code.

    Raises:
      UserError: a file that cannot be read, images of different sizes, fewer samples
        than asked for, or a reference of another extractor or resolution.
    """
    cli.require(fv, "reference")
    samples = open_images(fv.samples, flag="samples")
    count = num_samples(fv, samples)
    check_sample_count(count, "inception", allow_few=fv.allow_few_samples)

    cli.set_up_jax()
    from cascaded_diffusion.evaluation import reference as reference_lib
    from cascaded_diffusion.evaluation.judge import Judge
    from cascaded_diffusion.runtime.mesh import build_mesh

    statistics = None
    if reference_lib.holds_statistics(fv.reference):
        statistics = reference_lib.read_reference(fv.reference, flag="reference")
    resize = _resize(fv, statistics)
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    images = None
    if statistics is None or statistics.features is None:
        images = _reference_images(fv, samples, required=statistics is None)
    if statistics is not None:
        _check_size(fv, statistics, samples)
    extractor = cli.inception_loader(fv, mesh)(resize)
    if statistics is not None:
        reference_lib.check_reference(
            statistics, fv.reference, "reference", features=extractor.identity
        )
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
    judge = Judge(extractor=extractor, references={"train": statistics}, classes=False)
    try:
        scores = judge.scores(samples.images, None, count)
    except ValueError as e:  # features of another size, a covariance that is none
        raise UserError(f"--reference={fv.reference}: {e}") from e
    record = {
        "samples": fv.samples,
        "num_samples": count,
        "samples_digest": samples.digest(labels=False),
        "resolution": samples.images.shape[1],
        "reference": statistics.name,
        "features": extractor.identity,
        **scores,
    }
    print(json.dumps(record), flush=True)
    return 0


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


def _reference_images(
    fv: flags.FlagValues, samples: StoredImages, *, required: bool
) -> StoredImages | None:
    """The images of --reference; None where it has statistics alone."""
    try:
        images = open_images(fv.reference, flag="reference")
    except UserError:
        if required:
            raise
        return None
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


def _joined(statistics: Any, images: Any) -> Any:
    """Statistics of a file, with the features of the images beside them.

    ADM's reference batches hold statistics of a whole training set, and 10,000 images
    of it for precision and recall.
    """
    if statistics is None:
        return images
    return dataclasses.replace(statistics, features=images.features)
