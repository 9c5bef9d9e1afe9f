import numpy as np
import pytest

from cascaded_diffusion.evaluation.features.extractor import Features
from cascaded_diffusion.evaluation.measure import Measurement, metric_name
from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from cascaded_diffusion.evaluation.metrics.inception_score import ScoreStatistics
from cascaded_diffusion.evaluation.metrics.kernel_distance import kernel_distance
from cascaded_diffusion.evaluation.metrics.precision_recall import precision_recall
from cascaded_diffusion.evaluation.reference import measure_reference
from tests.evaluation.stubs import Extractor

RNG = np.random.default_rng(0)
REAL = RNG.integers(0, 256, (60, 8, 8, 1), np.uint8)
SAMPLES = np.clip(RNG.integers(0, 300, (40, 8, 8, 1)), 0, 255).astype(np.uint8)
LABELS = np.arange(40) % 10


@pytest.mark.parametrize(
    ("metric", "extractor", "num_samples", "name"),
    [
        ("fid", "inception", 50_000, "fid_50k"),
        ("fid", "inception", 10_000, "fid_10k"),
        ("is", "inception", 2500, "is_2500"),
        ("fid", "classifier", 1000, "fd_classifier_1k"),
        ("recall", "resnet", 40, "recall_resnet_40"),
    ],
)
def test_names_say_how_many_and_by_what(metric, extractor, num_samples, name):
    assert metric_name(metric, extractor, num_samples) == name


def _reference(extractor):
    return measure_reference(
        [REAL], extractor, num_images=60, label="", data="", split="", crop="", resize=""
    )


def _values(extractor, *, batch_size=40, classes=True):
    measurement = Measurement(extractor, 40, classes=classes)
    for i in range(0, 40, batch_size):
        measurement.add(SAMPLES[i : i + batch_size], LABELS[i : i + batch_size])
    return {**measurement.distances(_reference(extractor)), **measurement.own()}


def test_every_metric_is_that_of_all_features_at_once():
    extractor = Extractor("inception", spatial=True)
    values = _values(extractor)
    real, own = extractor(REAL), extractor(SAMPLES)
    distance = frechet_distance(FeatureStatistics.of(own.pooled), FeatureStatistics.of(real.pooled))
    spatial = frechet_distance(
        FeatureStatistics.of(own.spatial), FeatureStatistics.of(real.spatial)
    )
    order = np.random.default_rng(0).permutation(40)
    score = ScoreStatistics.of(own.logits, order, num_samples=40).score()
    kid = kernel_distance(own.pooled, real.pooled, seed=0)
    precision, recall = precision_recall(real.pooled, own.pooled)
    assert values == {
        "fid_40": pytest.approx(distance, rel=1e-9),
        "sfid_40": pytest.approx(spatial, rel=1e-9),
        "kid_40": pytest.approx(kid[0], rel=1e-9),
        "kid_std_40": pytest.approx(kid[1], rel=1e-9),
        "precision_40": precision,
        "recall_40": recall,
        "is_40": pytest.approx(score[0], rel=1e-9),
        "is_std_40": pytest.approx(score[1], rel=1e-9),
        "accuracy_40": (own.logits.argmax(-1) == LABELS).mean(),
    }
    assert "accuracy_40" not in _values(extractor, classes=False)


@pytest.mark.parametrize("batch_size", [1, 7, 39])
def test_any_batch_size_gives_the_same(batch_size):
    whole, parts = _values(Extractor()), _values(Extractor(), batch_size=batch_size)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_a_distance_of_other_features_is_no_fid():
    assert "fd_projection_40" in _values(Extractor())
    assert not any(name.startswith(("fid", "sfid")) for name in _values(Extractor()))


@pytest.mark.parametrize(("count", "there"), [(19, False), (20, True)])
def test_the_inception_score_is_of_at_least_two_samples_to_a_split(count, there):
    measurement = Measurement(Extractor(), count, classes=True)
    measurement.add(SAMPLES[:count], None)
    assert (f"is_projection_{count}" in measurement.own()) == there


def test_features_without_logits_give_no_score_and_no_accuracy():
    class Unlabelled(Extractor):
        """Knows no classes."""

        def __call__(self, images):
            return Features(super().__call__(images).pooled)

    values = _values(Unlabelled(), batch_size=7)
    assert set(values) == {f"{x}_projection_40" for x in ("fd", "kid", "kid_std")} | {
        "precision_projection_40",
        "recall_projection_40",
    }


def test_fewer_samples_than_said_are_an_error():
    measurement = Measurement(Extractor(), 40, classes=True)
    measurement.add(SAMPLES[:30], None)
    with pytest.raises(ValueError, match="30 samples were measured, expected 40"):
        measurement.distances(_reference(Extractor()))


def test_the_inception_score_of_sorted_samples_is_not_that_of_single_classes():
    class Sure(Extractor):
        """As sure of the class as can be; pixel (0, 0) is the class."""

        def __call__(self, images):
            features = super().__call__(images)
            return Features(features.pooled, 100.0 * np.eye(10)[images[:, 0, 0, 0]])

    images = np.zeros((1000, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(1000) // 100
    measurement = Measurement(Sure(), 1000, classes=True)
    measurement.add(images, None)
    assert measurement.own()["is_projection_1k"] > 9
