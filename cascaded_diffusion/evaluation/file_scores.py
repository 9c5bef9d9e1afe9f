"""Samples of any framework against any reference, by Inception; no run is needed."""

import dataclasses

from cascaded_diffusion.config.run_checks import check_sample_count
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import reference as reference_lib
from cascaded_diffusion.evaluation.evaluator import Evaluator, InceptionLoader
from cascaded_diffusion.evaluation.features.extractor import Features
from cascaded_diffusion.evaluation.features.inception_extractor import load_inception
from cascaded_diffusion.evaluation.reference import Reference
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, open_images
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.files.npz_archive import array_names


def measure_files(
    samples: StoredImages,
    reference: str,
    *,
    num_samples: int | None = None,
    resize: str | None = None,
    allow_few_samples: bool = False,
    inception: InceptionLoader = load_inception,
) -> Record:
    """Measures the first samples, by default all, against images or statistics.

    `samples` are from `stored_images.open_images`; `reference` is the path of an `.npz` or of a
    folder of PNGs; `resize` is "legacy", "clean" or "pytorch_fid", by default the reference's own
    way. `allow_few_samples` allows an FID of fewer than 2,048 samples. Returns the record. Raises
    UserError if a file cannot be read, images differ in size, or the reference is of another
    extractor or resolution.

        record = cd.measure_files(open_images("A.npz", flag="samples"), "B.npz", resize="legacy")
    """
    count = samples.count(num_samples)
    check_sample_count(count, "inception", allow_few=allow_few_samples)
    statistics = images = why = None
    shape = tuple(samples.images.shape[1:])
    if reference_lib.holds_statistics(reference, flag="reference"):
        statistics = reference_lib.read_reference(reference, flag="reference")
        if statistics.fingerprint is not None:
            size = {"resolution": shape[0], "channels": shape[2]}
            why = reference_lib.differing_field(statistics, **size)
    if statistics is None or (statistics.features is None and "arr_0" in array_names(reference)):
        images = open_images(reference, flag="reference")
        found = tuple(images.images.shape[1:])
        why = why or (f"images of {found}, expected {shape}" if found != shape else None)
    if why is not None:
        raise UserError(f"--reference={reference}: {why}, as --samples={samples.path} has")
    if statistics is not None:
        _print_missing_metrics(statistics, images)
    extractor = inception(resize=_chosen_resize(resize, reference, statistics))
    if statistics is not None:
        identity = extractor.identity
        reference_lib.check_reference(statistics, reference, "reference", features=identity)
        _check_features(reference, statistics, extractor(samples.images[:1]))
    if images is not None:
        measured = reference_lib.measure_stored(images, extractor)
        # ADM's reference batches hold statistics of a whole training set and, for precision and
        # recall, 10,000 images of it.
        of_set = statistics or measured
        statistics = dataclasses.replace(of_set, features=measured.features)
    evaluator = Evaluator(extractor, {"train": statistics}, classes=False)
    try:
        scores = evaluator.scores(samples.images, None, count)
    except ValueError as e:  # features of another size, or a matrix that is no covariance
        raise UserError(f"--reference={reference}: {e}") from e
    return {
        "samples": samples.path,
        "num_samples": count,
        "samples_digest": samples.digest(labels=False),
        "resolution": samples.images.shape[1],
        "reference": statistics.name,
        "features": extractor.identity,
        **scores,
    }


def _chosen_resize(resize: str | None, reference: str, statistics: Reference | None) -> str:
    """Inception's way of resizing: the one asked for, else the reference's own."""
    if statistics is None:
        return resize or "legacy"
    if statistics.fingerprint is not None:
        features = statistics.fingerprint.features
        own = next((m for m in ("clean", "pytorch_fid") if f":{m}:" in features), "legacy")
    elif statistics.spatial is not None:  # ADM's files have them, and were resized like this
        own = "legacy"
    elif resize is not None:  # the file may have been made either way
        return resize
    else:
        raise UserError(
            f"--reference={reference}: does not say how its images came to Inception's 299 px; say"
            " it with --resize=legacy, --resize=clean or --resize=pytorch_fid"
        )
    if resize not in (None, own):
        foreign = "" if statistics.fingerprint else " (as those of every file that does not say)"
        raise UserError(
            f"--resize={resize}: the statistics of --reference={reference} are of"
            f" --resize={own}{foreign}; the two are never mixed"
        )
    return own


def _print_missing_metrics(statistics: Reference, images: StoredImages | None) -> None:
    """Prints which metrics the statistics do not allow, before anything is measured."""
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


def _check_features(reference: str, statistics: Reference, features: Features) -> None:
    """Raises UserError unless the statistics are of features of the extractor's sizes."""
    for name, moments, own in (
        ("features", statistics.pooled, features.pooled),
        ("spatial features", statistics.spatial, features.spatial),
    ):
        if moments is not None and own is not None and len(moments.mean) != own.shape[1]:
            raise UserError(
                f"--reference={reference}: {name} of sizes {own.shape[1]} and"
                f" {len(moments.mean)} cannot be compared: they come from different extractors"
            )


def write_file_reference(
    images: StoredImages,
    output: AnyPath,
    *,
    resize: str = "legacy",
    inception: InceptionLoader = load_inception,
) -> Reference:
    """Measures images by Inception and writes their statistics, an `.npz`."""
    extractor = inception(resize=resize)
    reference = reference_lib.measure_stored(images, extractor)
    reference_lib.save_reference(output, reference)
    print(f"{output}: {reference.name}, {extractor.identity}", flush=True)
    return reference
