"""An extractor that takes no network, and a evaluator whose verdicts are known."""

import dataclasses
import types

import jax
import numpy as np

from cascaded_diffusion.config.schema import CascadeConfig
from cascaded_diffusion.evaluation.evaluator import Evaluation
from cascaded_diffusion.evaluation.features.extractor import Features
from cascaded_diffusion.evaluation.measure import metric_name
from cascaded_diffusion.evaluation.settings import chain_of
from cascaded_diffusion.networks.classifier import init_classifier


def untrained_classifier(task, train, label):
    """In place of `train_classifier`: all variables are 0, and the likeliest class is the first."""
    key, shape = jax.random.key(0), train.images.shape
    variables = jax.eval_shape(lambda: init_classifier(task.module, key, shape))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)


class Extractor:
    """Random projections of the first pixels; ten classes."""

    _matrix = np.random.default_rng(1).normal(size=(64, 12)).astype(np.float32)

    def __init__(self, name="projection", *, spatial=False, identity=None):
        self.name, self.identity, self._spatial = name, identity or f"{name}:1", spatial

    def __call__(self, images):
        features = np.tanh(images.reshape(len(images), -1)[:, :64] / 255 @ self._matrix)
        spatial = features[:, :5] if self._spatial else None
        return Features(features.astype(np.float32), 3 * features[:, :10], spatial)


class WithoutNetwork(Evaluation):
    """An evaluation by features that take no network."""

    def extractor(self, folder, config, mesh, *, say=print):
        return Extractor()


def cascade_of(config, **changes):
    """A cascade of one run, with changes of its section."""
    section = dataclasses.replace(chain_of([config]), **changes)
    return CascadeConfig(cascade=section, mesh=config.mesh)


class Evaluator:
    """Gives each set of samples the next of a list of distances.

    `seen` has the images and labels of every set.
    """

    reference = "stub"
    extractor = Extractor("stub", identity="stub")
    references = types.MappingProxyType({"train": None})

    def __init__(self, distances):
        self.distances = iter(distances)
        self.seen = []

    def measurement(self, num_samples):
        return _Measurement(self, num_samples)

    def scores(self, images, labels):
        measurement = self.measurement(len(images))
        measurement.add(images, labels)
        return {**measurement.distances(None), **measurement.own()}


class _Measurement:
    def __init__(self, evaluator, num_samples):
        self._evaluator, self._num_samples = evaluator, num_samples
        self._images, self._labels = [], []

    def add(self, images, labels, features=None):
        assert features is None or len(features.pooled) == len(images)
        self._images.append(images)
        self._labels.append(labels)

    def distances(self, reference):
        del reference
        labels = None if self._labels[0] is None else np.concatenate(self._labels)
        self._evaluator.seen.append((np.concatenate(self._images), labels))
        return {metric_name("fid", "stub", self._num_samples): next(self._evaluator.distances)}

    def own(self):
        return {metric_name("accuracy", "stub", self._num_samples): 0.5}
