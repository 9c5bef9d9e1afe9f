"""What is measured of samples: distances to real images, as sets and one by one."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
from jax.sharding import Mesh
from real_images import Samples, Split

from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.evaluation.evaluator import Evaluator, build_evaluator
from cascaded_diffusion.evaluation.features import classifier_training
from cascaded_diffusion.evaluation.features.classifier_extractor import Classifier, load_or_train
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages, Task
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor
from cascaded_diffusion.evaluation.measure import metric_name
from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from cascaded_diffusion.evaluation.reference import Reference
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.run_folder import RunFolder

Scores = dict[str, float]


class Scorer:
    """Measures samples in the features of a network that is trained on the real images.

    Args:
      config: whose data the images are, with a stage of their size.
      images: the real ones by role, "train" and "val".
      network: its name among the product's classifiers.
      folder: where the network and the statistics of its features are kept.
      mesh: the devices that compute.
      check_time: raises when time is up.
      inception: FID's network, for the FID besides.
    """

    def __init__(
        self,
        config: RunConfig,
        images: Mapping[str, Split],
        *,
        network: str,
        folder: RunFolder,
        mesh: Mesh,
        check_time: Callable[[], None],
        inception: FeatureExtractor | None = None,
    ):
        self._config, self._images, self._name = config, images, network
        self._inception = inception
        self._folder, self._mesh, self._check_time = folder, mesh, check_time

    def scores(self, samples: Samples, *, cas: bool, seed: int) -> Scores:
        """Distances and rates of samples in the features of a network trained on real images.

        `fd` is the Fréchet distance to the training images, `accuracy` the share of samples whose
        label the network recognises, `cas` the accuracy of the same network, trained on the
        samples alone, on the held-out real images that none of them is made of. `fid` is FID to
        the training images, if its network is there.
        """
        self._check_time()
        count = len(samples.images)
        found = self._evaluator.scores(samples.images, samples.labels)
        names = {"fd": "fid", **{n: n for n in ("precision", "recall", "is", "accuracy")}}
        scores = {
            name: found[key]
            for name, metric in names.items()
            if (key := metric_name(metric, self._evaluator.extractor.name, count)) in found
        }
        if self._inception is not None:
            self._check_time()
            pooled = FeatureStatistics.of(self._inception(samples.images).pooled)
            scores["fid"] = float(frechet_distance(pooled, self._inception_reference.pooled))
        test = self._images["val"].whole
        unseen = np.ones(len(test.labels), bool)
        if samples.made_of is not None:
            unseen[samples.made_of] = False
        if cas and samples.labels is not None and unseen.any():
            self._check_time()
            task = dataclasses.replace(self.network.task, seed=seed)
            labels = samples.labels.astype(np.int32)
            made = classifier_training.train_classifier(
                task, LabelledImages(samples.images, labels), label="CAS"
            )
            hits = Classifier(task, made).predictions(test.images[unseen]) == test.labels[unseen]
            scores["cas"] = float(hits.mean())
        return scores

    def neighbours(self, samples: Samples, picture: pathlib.Path | None) -> Scores:
        """Distances of samples to their nearest real images, by pixels and by features.

        Medians over the samples of the distance to the nearest training and the nearest held-out
        image, of as many, so that neither are nearer by chance: `nearer` is the share of samples
        that a training image is nearest to, one half if none is memorised. `least` is the least
        distance of any sample to any training image, by which a single copy shows. Held-out images
        that are samples themselves are left out. Pixels differ by a root mean square in grey
        levels. With a `picture`, the first samples and their nearest training images are drawn
        there.
        """
        self._check_time()
        held_out = self._images["val"].whole.images
        others = held_out[~_is_among(held_out, samples.images)]
        train = self._images["train"].whole.images
        some = np.random.default_rng(0).permutation(len(train))[: len(others)]

        def features(images: np.ndarray) -> np.ndarray:
            parts = range(0, len(images), 500)
            return np.concatenate([self.network(images[i : i + 500]).pooled for i in parts])

        def pixels(images: np.ndarray) -> np.ndarray:
            return images.reshape(len(images), -1).astype(np.float32)

        found: Scores = {}
        per_pixel = train[0].size  # the features are not averaged
        for name, of, scale in (("pixels", pixels, per_pixel), ("features", features, 1)):
            own, seen = of(samples.images), of(train)
            to_seen, _ = _nearest(own, seen[some])
            to_others, _ = _nearest(own, of(others))
            found[f"{name}_train"] = float(np.median(to_seen) / np.sqrt(scale))
            found[f"{name}_held_out"] = float(np.median(to_others) / np.sqrt(scale))
            found[f"{name}_nearer"] = float((to_seen < to_others).mean())
            found[f"{name}_least"] = float(_nearest(own, seen)[0].min() / np.sqrt(scale))
        if picture is not None:
            shown = samples.images[:10]
            rows = [("the first ten, not selected", shown)]
            for name, of in (("pixels", pixels), ("features", features)):
                _, nearest = _nearest(of(shown), of(train))
                rows.append((f"the nearest training image by {name}", train[nearest]))
            pictures.save_png(picture, pictures.labelled_rows(rows, scale=3))
        return found

    @cached_property
    def network(self) -> Classifier:
        """The network whose features measure; `accuracy` is that on held-out real images."""
        train, held_out = self._images["train"], self._images["val"]
        num_classes = int(train.whole.labels.max()) + 1
        how = dict(network=self._name, num_classes=num_classes, mesh=self._mesh)
        task = Task(**how, seed=0, flip=self._config.data.random_flip)
        path = self._folder.eval / f"{self._name}.npz"
        return load_or_train(path, task, train.whole, held_out.whole)

    @property
    def identity(self) -> str:
        """The networks whose features measure."""
        networks = (self.network, self._inception)
        return ", ".join(network.identity for network in networks if network is not None)

    @cached_property
    def _evaluator(self) -> Evaluator:
        return self._evaluator_by(self.network, self._folder)

    @cached_property
    def _inception_reference(self) -> Reference:
        # The statistics of the training images have a file for each network.
        folder = RunFolder(self._folder.path / "inception")
        return self._evaluator_by(self._inception, folder).references["train"]

    def _evaluator_by(self, extractor: FeatureExtractor, folder: RunFolder) -> Evaluator:
        train = {"train": self._images["train"].split}
        return build_evaluator(self._config, folder, extractor, train)


def _is_among(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the images are among the others, bool [n]."""
    known = {x.tobytes() for x in others}
    return np.asarray([x.tobytes() in known for x in images])


def _nearest(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each point's distance to its nearest neighbour among the others, and which that is."""
    squares = np.square(others).sum(1)
    distances, which = [], []
    for i in range(0, len(points), 200):
        part = points[i : i + 200]
        nearest = (squares - 2 * part @ others.T).argmin(1)
        which.append(nearest)
        distances.append(np.linalg.norm(part - others[nearest], axis=1))
    return np.concatenate(distances), np.concatenate(which)
