"""From images to metrics: sums that are streamed batch by batch, and the metrics of those sums.

The number of samples is part of every metric's name, and so is the extractor unless it is
Inception: `fid_50k`, `is_50k`, `fd_classifier_1k`, `precision_classifier_1k`. A distance between
features of another network is never called FID.
"""

from functools import partial

import numpy as np

from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor, Features
from cascaded_diffusion.evaluation.metrics.frechet import frechet_distance
from cascaded_diffusion.evaluation.metrics.inception_score import ScoreStatistics
from cascaded_diffusion.evaluation.metrics.kernel_distance import kernel_distance
from cascaded_diffusion.evaluation.metrics.precision_recall import precision_recall
from cascaded_diffusion.evaluation.reference import ImageSums, Reference, added

# The seed of KID's random subsets and of the inception score's splits.
_SEED = 0
_NUM_SPLITS = 10
_NUM_NEIGHBOURS = 3


def metric_name(metric: str, extractor: str, num_samples: int) -> str:
    """`fid`, "inception", 50000 -> "fid_50k"; with "classifier" it is "fd_classifier_50k"."""
    if extractor != "inception":
        metric = f"{'fd' if metric == 'fid' else metric}_{extractor}"
    return counted(metric, num_samples)


def counted(metric: str, num_samples: int) -> str:
    """A metric's name with the number of samples: `fid`, 10000 -> "fid_10k"."""
    thousands, rest = divmod(num_samples, 1000)
    return f"{metric}_{num_samples if rest or not thousands else f'{thousands}k'}"


class Measurement:
    """The sums over a set of `num_samples` samples from which its metrics are computed.

    With `classes`, the extractor's logits are those of the samples' own classes.
    """

    def __init__(self, extractor: FeatureExtractor, num_samples: int, *, classes: bool):
        self._extractor, self._num_samples, self._classes = extractor, num_samples, classes
        self._name = partial(metric_name, extractor=extractor.name, num_samples=num_samples)
        self.sums = ImageSums()
        self._score: ScoreStatistics | None = None
        self._features: list[np.ndarray] = []
        self._correct = self._labelled = 0
        # Samples often come sorted by class, and a split with one class has an inception score
        # of 1, so the splits are random.
        self._order = np.random.default_rng(_SEED).permutation(num_samples)

    def add(
        self, images: np.ndarray, labels: np.ndarray | None, features: Features | None = None
    ) -> None:
        """Adds samples uint8 [b, H, W, C], labels int [b], and their features if they are known.

        Raises ValueError if features are not finite.
        """
        features = self._extractor(images) if features is None else features
        rows = self._order[self.sums.count :][: len(images)]
        self.sums.add(images, features)
        self._features.append(features.pooled.astype(np.float32))
        if features.logits is None:
            return
        # The inception score of a single sample is 1, whatever the sample is.
        if self._num_samples >= 2 * _NUM_SPLITS:
            score = ScoreStatistics.of(
                features.logits, rows, num_samples=self._num_samples, num_splits=_NUM_SPLITS
            )
            self._score = added(self._score, score)
        if self._classes and labels is not None:
            self._correct += int((features.logits.argmax(-1) == labels).sum())
            self._labelled += len(labels)

    def distances(self, reference: Reference) -> dict[str, float]:
        """FID, sFID, KID, precision and recall, as far as the reference has the features."""
        self._check_complete()
        values = {self._name("fid"): frechet_distance(self.sums.pooled, reference.pooled)}
        if self.sums.spatial is not None and reference.spatial is not None:
            values[self._name("sfid")] = frechet_distance(self.sums.spatial, reference.spatial)
        real, own = reference.features, np.concatenate(self._features)
        if real is not None and min(len(real), len(own)) > _NUM_NEIGHBOURS:
            numbers = (
                *kernel_distance(own, real, seed=_SEED),
                *precision_recall(real, own, num_neighbours=_NUM_NEIGHBOURS),
            )
            names = map(self._name, ("kid", "kid_std", "precision", "recall"))
            values.update(zip(names, numbers, strict=True))
        return values

    def own(self) -> dict[str, float]:
        """The metrics that need no reference: inception score and accuracy."""
        self._check_complete()
        values = {}
        if self._score is not None:
            values[self._name("is")], values[self._name("is_std")] = self._score.score()
        if self._labelled:
            values[self._name("accuracy")] = self._correct / self._labelled
        return values

    def _check_complete(self) -> None:
        if (count := self.sums.count) != self._num_samples:
            raise ValueError(f"{count} samples were measured, expected {self._num_samples}")
