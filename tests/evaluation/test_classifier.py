import dataclasses

import numpy as np
import pytest

from cascaded_diffusion.data.builtin import load_mnist
from cascaded_diffusion.evaluation import classifier as lib
from cascaded_diffusion.evaluation.classifier_training import RECIPES
from cascaded_diffusion.evaluation.real_images import resized


@pytest.mark.parametrize("resolution", [16, 32])
def test_it_recognises_real_digits(resolution, tmp_path):
    train, held_out = (
        resized(lib.LabelledImages(*load_mnist(split)), resolution) for split in ("train", "test")
    )
    said = []
    path = tmp_path / "classifier.npz"

    def load():
        return lib.load_or_train(path, train, held_out, num_classes=10, seed=0, say=said.append)

    first = load()
    assert first.accuracy >= 0.97
    features = first(held_out.images)
    assert (features.pooled.shape, features.logits.shape) == ((1000, 64), (1000, 10))
    assert (features.logits.argmax(-1) == held_out.labels).mean() == first.accuracy
    assert (first.name, first.identity) == ("classifier", f"classifier:{first.digest}")
    assert said == []

    second = load()
    assert (second.digest, second.accuracy) == (first.digest, first.accuracy)
    again = second(held_out.images[:9]).pooled
    np.testing.assert_array_equal(again, first(held_out.images[:9]).pooled)


def _small(seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(128) % 2
    images = (labels[:, None, None, None] * 200 + rng.integers(0, 50, (128, 16, 16, 1))).astype(
        np.uint8
    )
    return lib.LabelledImages(images, labels.astype(np.int32))


@pytest.mark.parametrize("network", ["small", "resnet"])
def test_a_stored_classifier_is_only_used_for_its_own_data(network, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, network, dataclasses.replace(RECIPES[network], epochs=2))
    path = tmp_path / "classifier.npz"
    said = []

    def load(data, seed=0):
        return lib.load_or_train(
            path, data, data, num_classes=2, seed=seed, network=network, say=said.append
        ).digest

    first = load(_small(0))
    assert load(_small(0)) == first
    assert said == []
    assert load(_small(1)) != first
    assert "other data" in said.pop()
    assert load(_small(0), seed=1) != first
    assert "other data" in said.pop()

    assert load(_small(0)) == first  # deterministic
    said.clear()
    path.write_bytes(path.read_bytes()[:-100])
    assert load(_small(0)) == first
    assert "cannot be read" in said.pop()
