"""What samples are compared with: a feature extractor and the statistics of real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.resize import area_resize
from cascaded_diffusion.config import RunConfig
from cascaded_diffusion.evaluation.classifier import Classifier, LabelledImages, load_or_train
from cascaded_diffusion.evaluation.frechet import FeatureStatistics, frechet_distance
from cascaded_diffusion.runtime.run_folder import RunFolder

METRIC = "fd_classifier"
ACCURACY = "classifier_accuracy"


def labelled(examples: Mapping[str, np.ndarray]) -> LabelledImages:
    """Examples as a data source gives them: `image` and `label`."""
    return LabelledImages(examples["image"], examples["label"])


def judged_labels(labels: np.ndarray, num_classes: int) -> np.ndarray | None:
    """The labels that samples are to be recognised as; None for a model without classes."""
    return labels if num_classes else None


def resized(data: LabelledImages, resolution: int) -> LabelledImages:
    """Data shrunk by the cascade's own area operator and rounded by its own rule."""
    images = uint8_from_float(area_resize(float_from_uint8(data.images), resolution))
    return LabelledImages(np.asarray(images), data.labels)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Feature extractor and reference statistics of one run.

    Attributes:
      classifier: the extractor.
      reference: what the statistics are of, in words; part of every record.
      statistics: of the real training images at the stage's resolution.
    """

    classifier: Classifier
    reference: str
    statistics: FeatureStatistics

    @property
    def features(self) -> str:
        """The extractor's identity; part of every record."""
        return f"classifier:{self.classifier.digest}"

    def scores(self, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """Fréchet distance to the reference, and how many are recognised as their label.

        Args:
          images: uint8 [n, H, W, C] at the stage's resolution.
          labels: int [n], or None for samples without classes.
        """
        features, predictions = self.classifier(images)
        values = {METRIC: frechet_distance(FeatureStatistics.of(features), self.statistics)}
        if labels is not None:
            values[ACCURACY] = float((predictions == labels).mean())
        return values


def build_judge(
    config: RunConfig, folder: RunFolder, train: LabelledImages, held_out: LabelledImages
) -> Judge:
    """The run's judge; its classifier is trained if the folder does not hold it yet."""
    resolution = config.stage.resolution
    train, held_out = resized(train, resolution), resized(held_out, resolution)
    classifier = load_or_train(
        folder.eval / "classifier.npz",
        train,
        held_out,
        num_classes=int(train.labels.max()) + 1,
        seed=config.eval.seed,
    )
    features, _ = classifier(train.images)
    data = config.data
    return Judge(
        classifier=classifier,
        reference=f"{data.name}:{data.train_split}:{len(train.images)}:{resolution}px",
        statistics=FeatureStatistics.of(features),
    )
