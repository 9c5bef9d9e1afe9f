"""What a run is evaluated with: a feature extractor and the statistics of real images."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.config.run_checks import (
    LABELLED_FEATURES,
    check_sample_count,
    evaluation_mesh,
)
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.classifier_extractor import load_or_train
from cascaded_diffusion.evaluation.features.classifier_training import ROTATION, Task
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor
from cascaded_diffusion.evaluation.features.inception_extractor import load_inception
from cascaded_diffusion.evaluation.measure import Measurement
from cascaded_diffusion.evaluation.reference import (
    Reference,
    differing_field,
    measure_reference,
    read_reference,
    save_reference,
)
from cascaded_diffusion.evaluation.samples.real_images import RealSplit
from cascaded_diffusion.evaluation.samples.stored_images import Images, check_labels
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.runtime.run_folder import RunFolder

_BATCH = 500
# An accuracy on rotations; guessing gets a quarter right.
_LEAST_ROTATIONS = 0.4
# A run's real images by role: "train" and "val".
Splits = Mapping[str, RealSplit]
# (resize=, mesh=) -> FID's extractor.
InceptionLoader = Callable[..., FeatureExtractor]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A feature extractor, references by role ("train", "val") and what the logits mean.

    With `classes`, the extractor's logits are those of the samples' own classes.
    """

    extractor: FeatureExtractor
    references: Mapping[str, Reference]
    classes: bool

    @property
    def features(self) -> str:
        """The extractor's identity, which is part of every record."""
        return self.extractor.identity

    @property
    def reference(self) -> str:
        """The training images' fingerprint, which is part of every record."""
        return self.references["train"].name

    def measurement(self, num_samples: int) -> Measurement:
        """Empty sums, to which batches of samples can be added."""
        return Measurement(self.extractor, num_samples, classes=self.classes)

    def scores(
        self, images: Images, labels: np.ndarray | None, count: int | None = None
    ) -> dict[str, float]:
        """Every metric of samples against the training images, the primary one first.

        Images are uint8 [n, H, W, C] at the references' resolution, labels int [n] if the samples
        have classes. Only the first `count` samples are measured if it is given.
        """
        count = len(images) if count is None else count
        measurement = self.measurement(count)
        for start in range(0, count, _BATCH):
            rows = slice(start, min(start + _BATCH, count))
            measurement.add(images[rows], None if labels is None else labels[rows])
        return {**measurement.distances(self.references["train"]), **measurement.own()}


def default_mesh(settings: RunConfig | CascadeConfig) -> Mesh:
    """The mesh that samples are made on. Raises UserError if a batch cannot be split over it."""
    return build_mesh(evaluation_mesh(settings, jax.device_count()))


def evaluated_labels(labels: np.ndarray, num_classes: int) -> np.ndarray | None:
    """The labels as which samples should be recognised; None for a model without classes.

    Raises UserError if a label is no class.
    """
    if not num_classes:
        return None
    reason = f", since config.stage.num_classes is {num_classes}"
    check_labels(labels, num_classes, "samples", reason)
    return labels


def build_extractor(
    config: RunConfig,
    folder: RunFolder,
    train: RealSplit,
    held_out: RealSplit,
    mesh: Mesh,
    *,
    load_inception: InceptionLoader,
    say: Callable[[str], None] = print,
) -> FeatureExtractor:
    """The extractor that a run is scored by: `config.eval.features`.

    A classifier is trained on the real images `train` unless the run folder has it already, and
    `say` is told its accuracy on the `held_out` images.

    Raises:
      UserError: the real images are of a single class, or fewer than the devices.
    """
    stage, features = config.stage, config.eval.features
    if features == "inception":
        return load_inception(resize=config.eval.resize)
    real, others = train.whole(stage.resolution), held_out.whole(stage.resolution)
    task = Task(
        network="small" if features == "classifier" else features,
        num_classes=stage.num_classes,
        seed=config.eval.seed,
        mesh=mesh,
    )
    classifier = load_or_train(folder.eval / f"{features}.npz", task, real, others, say=say)
    accuracy, is_rotation = classifier.accuracy, features == ROTATION
    say(
        f"{stage.name}: {features} at {stage.resolution} px"
        f" {'tells the rotation of' if is_rotation else 'recognises'} {100 * accuracy:.1f} % of the"
        f" {len(others.labels)} held-out real images"
    )
    if is_rotation:
        doubtful, guess = accuracy < _LEAST_ROTATIONS, "near the 25 % of guessing"
    else:
        most = np.bincount(others.labels).max() / len(others.labels)
        guess = f"no more than the {100 * most:.1f} % of their most frequent class"
        doubtful = accuracy <= most
    if doubtful:
        say(
            f"{stage.name}: that is {guess}: the features are those of an all but untrained"
            " network; take Inception's by a call of `main` with --config.eval.features=inception"
            " --config.eval.resize=legacy"
        )
    return classifier


def build_evaluator(
    config: RunConfig, folder: RunFolder, extractor: FeatureExtractor, splits: Splits
) -> Evaluator:
    """A run's evaluator, with references of the given splits: see `run_reference`."""
    references = {
        role: run_reference(config, folder, extractor, role, split)
        for role, split in splits.items()
    }
    return Evaluator(extractor, references, classes=config.eval.features in LABELLED_FEATURES)


def run_reference(
    config: RunConfig,
    folder: RunFolder,
    extractor: FeatureExtractor,
    role: str,
    split: RealSplit,
    *,
    say: Callable[[str], None] = print,
) -> Reference:
    """The reference of a split at the run's resolution, read or made: RUN/eval/reference_ROLE.npz.

    If the stored one is damaged, or of other images or another extractor, it is replaced and
    `say` is told why. Raises UserError if the split has fewer than two images.
    """
    path, resolution = folder.eval / f"reference_{role}.npz", config.stage.resolution
    if len(split) < 2:
        raise UserError(
            f"split {split.split!r} of config.data: {len(split)} image, expected at least 2 to"
            " compare samples with"
        )
    origin = {key: getattr(split, key) for key in ("data", "split", "crop", "resize")}
    if path.exists():
        try:
            stored = read_reference(str(path), flag="workdir")
            why = differing_field(
                stored,
                **origin,
                num_images=len(split),
                resolution=resolution,
                channels=config.stage.channels,
                features=extractor.identity,
            )
        except UserError as e:
            why = str(e).removeprefix(f"--workdir={path}: ").removesuffix("; make it anew")
        if why is None:
            return stored
        say(f"{path}: {why}; it is made anew")
    reference = measure_reference(
        (chunk.images for chunk in split.chunks(resolution)),
        extractor,
        num_images=len(split),
        label=f"reference, {split.data}:{split.split}",
        **origin,
    )
    save_reference(path, reference)
    return reference


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a run is evaluated with.

    Attributes:
      splits: the run's real images by role, "train" and "val".
      allow_few_samples: allow an FID of fewer than 2,048 samples, which is mostly bias.
      inception: (resize=, mesh=) -> FID's extractor, for a run that is scored by it.
    """

    splits: Splits
    allow_few_samples: bool = False
    inception: InceptionLoader = load_inception

    def check_count(self, num_samples: int, config: RunConfig) -> None:
        """Raises UserError for an FID of too few samples."""
        check_sample_count(num_samples, config.eval.features, allow_few=self.allow_few_samples)

    @contextlib.contextmanager
    def evaluator(
        self, folder: RunFolder, config: RunConfig, mesh: Mesh, roles: Sequence[str] = ("train",)
    ) -> Iterator[Evaluator]:
        """Holds a run's lock and yields its evaluator, with the references of these roles."""
        real, load = self.splits, partial(self.inception, mesh=mesh)
        with folder.writer_lock("eval"):
            extractor = build_extractor(
                config, folder, real["train"], real["val"], mesh, load_inception=load
            )
            yield build_evaluator(config, folder, extractor, {role: real[role] for role in roles})
