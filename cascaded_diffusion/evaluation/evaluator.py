"""What a run is evaluated with: a feature extractor and the statistics of real images."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.config import run_checks
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import reference as reference_lib
from cascaded_diffusion.evaluation.features.classifier_extractor import load_or_train
from cascaded_diffusion.evaluation.features.classifier_training import ROTATION, Task
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor
from cascaded_diffusion.evaluation.features.inception_extractor import load_inception
from cascaded_diffusion.evaluation.measure import Measurement
from cascaded_diffusion.evaluation.reference import Reference
from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit
from cascaded_diffusion.evaluation.samples.stored_images import Images, check_labels
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.runtime.run_folder import RunFolder

_BATCH = 500
# A run's real images by role: "train" and "val".
Splits = Mapping[str, RealSplit]
# (resize=, mesh=) -> FID's extractor.
InceptionLoader = Callable[..., FeatureExtractor]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A feature extractor, and references by role: "train" and "val"."""

    extractor: FeatureExtractor
    references: Mapping[str, Reference]
    classes: bool  # whether the extractor's logits are those of the samples' own classes

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
    """The mesh of this process's devices, on which it makes samples.

    Raises UserError if a batch cannot be split over it.
    """
    devices = jax.local_devices()
    return build_mesh(run_checks.evaluation_mesh(settings, len(devices)), devices)


def evaluated_labels(labels: np.ndarray, num_classes: int) -> np.ndarray | None:
    """The labels of samples, or None without classes. Raises UserError if a label is no class."""
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
    `say` is told its accuracy on the `held_out` images. Raises UserError if the real images are of
    a single class, or fewer than the devices.
    """
    stage, features = config.stage, config.eval.features
    if features == "inception":
        return load_inception(resize=config.eval.resize)
    real, others = train.whole(stage.resolution), held_out.whole(stage.resolution)
    network = "small" if features == "classifier" else features
    task = Task(network=network, num_classes=stage.num_classes, seed=config.eval.seed, mesh=mesh)
    classifier = load_or_train(folder.eval / f"{features}.npz", task, real, others, say=say)
    if features == ROTATION:
        does, doubtful = "tells the rotation of", classifier.accuracy < 0.4
        guess = "near the 25 % of guessing"
    else:
        most = np.bincount(others.labels).max() / len(others.labels)
        does, doubtful = "recognises", classifier.accuracy <= most
        guess = f"no more than the {100 * most:.1f} % of their most frequent class"
    told = f"{does} {100 * classifier.accuracy:.1f} % of the {len(others.labels)}"
    say(f"{stage.name}: {features} at {stage.resolution} px {told} held-out real images")
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
    make = partial(run_reference, config, folder, extractor)
    references = {role: make(role, split) for role, split in splits.items()}
    classes = config.eval.features in run_checks.LABELLED_FEATURES
    return Evaluator(extractor, references, classes)


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
    path, stage = folder.eval / f"reference_{role}.npz", config.stage
    if len(split) < 2:
        found = f"split {split.split!r} of config.data: {len(split)} image"
        raise UserError(f"{found}, expected at least 2 to compare samples with")
    origin = {key: getattr(split, key) for key in ("data", "split", "crop", "resize")}
    if path.exists():
        sizes = dict(num_images=len(split), resolution=stage.resolution, channels=stage.channels)
        wanted = {**origin, **sizes, "features": extractor.identity}
        try:
            stored = reference_lib.read_reference(str(path), flag="workdir")
            why = reference_lib.differing_field(stored, **wanted)
        except UserError as e:
            why = str(e).removeprefix(f"--workdir={path}: ").removesuffix("; make it anew")
        if why is None:
            return stored
        say(f"{path}: {why}; it is made anew")
    batches = (chunk.images for chunk in split.chunks(stage.resolution))
    how = dict(num_images=len(split), label=f"reference, {split.data}:{split.split}", **origin)
    reference = reference_lib.measure_reference(batches, extractor, **how)
    reference_lib.save_reference(path, reference)
    return reference


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a run is evaluated with.

    run = cd.RunFolder("RUN/base16")
    evaluation = cd.Evaluation(real_splits(run, run.read_config(), data_path=None))
    """

    splits: Splits
    allow_few_samples: bool = False  # allow an FID of fewer than 2,048, which is mostly bias
    inception: InceptionLoader = load_inception  # for a run that is scored by it

    def check_count(self, num_samples: int, config: RunConfig) -> None:
        """Raises UserError for an FID of too few samples."""
        allow_few = self.allow_few_samples
        run_checks.check_sample_count(num_samples, config.eval.features, allow_few=allow_few)

    def check_final_count(self, num_samples: int, config: RunConfig, *, generated: bool) -> None:
        """Raises UserError unless so many samples can be measured.

        Where classes are `generated` in turn, all have as many, unless few samples are allowed.
        """
        self.check_count(num_samples, config)
        what = f"{num_samples} samples (--num_samples, config.cascade.num_samples)"
        if num_samples < 2:
            raise UserError(f"{what}: expected at least 2")
        num_classes = config.stage.num_classes if generated else 0
        if num_classes and num_samples % num_classes and not self.allow_few_samples:
            raise UserError(
                f"{what}: expected a multiple of config.stage.num_classes, which is {num_classes},"
                " for the samples to be class-balanced; to measure them all the same, add"
                " --allow_few_samples"
            )

    def extractor(
        self,
        folder: RunFolder,
        config: RunConfig,
        mesh: Mesh,
        *,
        say: Callable[[str], None] = print,
    ) -> FeatureExtractor:
        """The extractor that a run is scored by, see `build_extractor`."""
        splits, load = (
            (self.splits["train"], self.splits["val"]),
            partial(self.inception, mesh=mesh),
        )
        return build_extractor(config, folder, *splits, mesh, load_inception=load, say=say)

    @contextlib.contextmanager
    def evaluator(
        self, folder: RunFolder, config: RunConfig, mesh: Mesh, roles: Sequence[str] = ("train",)
    ) -> Iterator[Evaluator]:
        """Holds a run's lock and yields its evaluator, with the references of these roles."""
        wanted = {role: self.splits[role] for role in roles}
        with folder.writer_lock("eval"):
            extractor = self.extractor(folder, config, mesh)
            yield build_evaluator(config, folder, extractor, wanted)
