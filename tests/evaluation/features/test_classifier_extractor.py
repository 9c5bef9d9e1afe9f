import dataclasses
import zipfile

import jax
import numpy as np
import pytest

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features import classifier_extractor as lib
from cascaded_diffusion.evaluation.features.classifier_training import (
    NUM_TURNS,
    RECIPES,
    Task,
    turned,
)
from cascaded_diffusion.runtime.mesh import build_mesh
from tests.evaluation.stubs import untrained_classifier


def _task(network="small", num_classes=2, seed=0):
    mesh = build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    return Task(network=network, num_classes=num_classes, seed=seed, mesh=mesh)


def _small(seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(128) % 2
    images = (labels[:, None, None, None] * 200 + rng.integers(0, 50, (128, 16, 16, 1))).astype(
        np.uint8
    )
    return lib.LabelledImages(images, labels.astype(np.int32))


@pytest.fixture
def _two_epochs(monkeypatch):
    for network in ("small", "resnet"):
        monkeypatch.setitem(RECIPES, network, dataclasses.replace(RECIPES[network], epochs=2))


@pytest.mark.usefixtures("_two_epochs")
@pytest.mark.parametrize("network", ["small", "resnet"])
def test_a_stored_classifier_is_only_used_for_its_own_data(network, tmp_path):
    path = tmp_path / "classifier.npz"
    said = []

    def load(data, seed=0):
        task = _task(network, seed=seed)
        return lib.load_or_train(path, task, data, data, say=said.append)

    data = _small(0)
    first, second = load(data), load(data)
    assert (second.digest, second.accuracy) == (first.digest, first.accuracy)
    np.testing.assert_array_equal(second(data.images).pooled, first(data.images).pooled)
    assert said == []
    assert load(_small(1)).digest != first.digest
    assert "other data" in said.pop()
    assert load(data, seed=1).digest != first.digest
    assert "other data" in said.pop()

    assert load(data).digest == first.digest  # deterministic
    said.clear()
    path.write_bytes(path.read_bytes()[:-100])
    assert load(data).digest == first.digest
    assert "cannot be read" in said.pop()


def _upright(seed, count=96):
    """Photos by daylight: bright at the top, noise over it."""
    rng = np.random.default_rng(seed)
    light = np.linspace(200, 0, 16)[None, :, None, None]
    images = light + rng.integers(0, 56, (count, 16, 16, 1))
    return lib.LabelledImages(images.astype(np.uint8), np.zeros(count, np.int32))


def test_turned_images_are_those_of_numpy():
    images = np.arange(4 * 6 * 6 * 2).reshape(4, 6, 6, 2)
    turns = np.asarray([2, 0, 3, 1])
    expected = [np.rot90(x, k) for x, k in zip(images, turns, strict=True)]
    np.testing.assert_array_equal(turned(images, turns), expected)


def test_images_without_labels_are_told_apart_by_rotation(tmp_path):
    path, said = tmp_path / "rotation.npz", []

    def load(data):
        task = _task("rotation", num_classes=0)
        return lib.load_or_train(path, task, data, _upright(1, 20), say=said.append)

    data = _upright(0)
    first = load(data)
    assert first.accuracy > 0.9
    assert (first.name, first.identity) == ("rotation", f"rotation:{first.digest}")
    turns = np.random.default_rng(0).integers(0, NUM_TURNS, 20)
    images = np.stack([np.rot90(x, k) for x, k in zip(data.images, turns, strict=False)])
    assert (first.predictions(images) == turns).mean() > 0.9
    # Rotations are no classes: neither an accuracy nor an inception score is made of them.
    features = first(data.images[:20])
    assert (features.pooled.shape, features.logits) == ((20, 64), None)

    # Labels do not matter.
    again = load(lib.LabelledImages(data.images, np.arange(96, dtype=np.int32) % 3))
    assert again.digest == first.digest
    assert said == []
    assert load(_upright(2)).digest != first.digest
    assert "made from other data" in said.pop()


def test_rotations_of_symmetric_images_cannot_be_told(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 1), np.uint8)
    noise = np.maximum.reduce([np.rot90(noise, k, (1, 2)) for k in range(NUM_TURNS)])
    data = lib.LabelledImages(noise, np.zeros(64, np.int32))
    task = _task("rotation", num_classes=0)
    found = lib.load_or_train(tmp_path / "rotation.npz", task, data, data)
    assert found.accuracy == 0.25


def test_a_classifier_of_one_class_is_refused(tmp_path):
    data = _small(0)
    one = lib.LabelledImages(data.images, np.full_like(data.labels, 3))
    path = tmp_path / "classifier.npz"
    with pytest.raises(UserError, match="all 128 training images are of one class, expected at"):
        lib.load_or_train(path, _task(num_classes=10), one, data)
    assert not path.exists()


def test_classes_without_images_count(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.training, "train_classifier", untrained_classifier)
    path, data, said = tmp_path / "classifier.npz", _small(0), []

    def load(num_classes):
        task = _task(num_classes=num_classes)
        return lib.load_or_train(path, task, data, data, say=said.append)

    load(2)
    assert load(5)(data.images[:3]).logits.shape == (3, 5)
    assert "made for other classes" in said.pop()
    assert load(5)(data.images[:3]).logits.shape == (3, 5)
    assert said == []


@pytest.mark.usefixtures("_two_epochs")
def test_a_stored_classifier_that_declares_petabytes_is_made_again(tmp_path):
    path, data, said = tmp_path / "classifier.npz", _small(0), []
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("params.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, header)
    lib.load_or_train(path, _task(), data, data, say=said.append)
    (line,) = said
    assert "cannot be read (params is declared as" in line
