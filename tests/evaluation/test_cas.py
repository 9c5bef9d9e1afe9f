import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import cas
from cascaded_diffusion.evaluation.features import classifier_training
from cascaded_diffusion.evaluation.features.classifier_training import (
    RECIPES,
    LabelledImages,
    Task,
    train_classifier,
)
from cascaded_diffusion.networks.classifier import CLASSIFIERS, ResNet
from cascaded_diffusion.runtime.mesh import build_mesh

NUM_CLASSES = 6


def _task(devices):
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.devices()[:devices])
    return Task(network="resnet", num_classes=NUM_CLASSES, seed=0, mesh=mesh)


def _bars(n, seed, *, shuffled=False):
    """A bright column per class, over noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % NUM_CLASSES
    images = rng.integers(0, 120, (n, 8, 8, 1))
    images[np.arange(n), :, 1 + labels] += 130
    given = rng.permutation(labels) if shuffled else labels
    return LabelledImages(images.astype(np.uint8), given.astype(np.int32))


def _record(generated, devices=1):
    train = {"generated": generated, "real": _bars(96, 1)}
    return cas.cas_record(_task(devices), train, _bars(60, 2), epochs=8)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    # A shift would move one class's bar to another's.
    recipe = dataclasses.replace(RECIPES["resnet"], batch_size=16)
    monkeypatch.setitem(RECIPES, "resnet", recipe)
    monkeypatch.setattr(classifier_training, "_SHIFT_FRACTION", 0)


def test_good_samples_teach_what_real_images_do_and_bad_ones_do_not():
    good = _record(_bars(96, 3))
    assert good["generated"]["top1"] > 0.9
    assert good["real"]["top1"] > 0.9
    assert good["generated"]["num_images"] == good["real"]["num_images"] == 96
    assert good["train_steps"] == 8 * 96 // 16
    assert good["test_images"] == 60
    assert good["per_class"]["generated_better"] <= NUM_CLASSES

    bad = _record(_bars(96, 3, shuffled=True))
    assert bad["generated"]["top1"] < 0.6
    assert bad["real"] == good["real"]
    assert bad["generated"]["top1"] <= bad["generated"]["top5"]


def test_one_device_and_eight_train_the_same(monkeypatch):
    two_blocks = partial(ResNet, widths=(32, 64), num_blocks=(1, 1))
    monkeypatch.setitem(CLASSIFIERS, "resnet", two_blocks)
    data, trained = _bars(48, 0), {}
    for devices in (1, 8):
        trained[devices] = train_classifier(_task(devices), data, train_steps=3)
    for one, eight in zip(*(jax.tree.leaves(v) for v in trained.values()), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-3, atol=2e-4)
    again = train_classifier(_task(8), data, train_steps=3)
    for one, other in zip(jax.tree.leaves(trained[8]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_accuracies_are_counted_as_by_hand():
    logits = np.random.default_rng(0).normal(size=(50, 9))
    labels = np.random.default_rng(1).integers(0, 8, 50)
    top1, top5, accuracies = cas.accuracy_of(logits, labels)
    best = [list(np.argsort(row)[::-1]) for row in logits]
    right = [b[0] == y for b, y in zip(best, labels, strict=True)]
    assert top1 == np.mean(right)
    assert top5 == np.mean([y in b[:5] for b, y in zip(best, labels, strict=True)])
    for k in range(8):
        of_class = [r for r, y in zip(right, labels, strict=True) if y == k]
        assert accuracies[k] == np.mean(of_class)
    assert np.isnan(accuracies[8])
    _, top5, _ = cas.accuracy_of(logits[:, :3], labels % 3)
    assert top5 == 1.0


def test_a_class_without_samples_is_said(capsys):
    some = _bars(116, 3)
    keep = np.flatnonzero(some.labels != 2)[:96]
    _record(LabelledImages(some.images[keep], some.labels[keep]))
    assert "no training image of 1 of the 6 classes" in capsys.readouterr().out


def test_bad_input_is_named():
    small = LabelledImages(_bars(96, 3).images[:, :6, :6], _bars(96, 3).labels)
    with pytest.raises(UserError, match=r"images of \(6, 6, 1\), expected \(8, 8, 1\)"):
        _record(small)
    one_class = LabelledImages(_bars(96, 3).images, np.zeros(96, np.int32))
    with pytest.raises(UserError, match="generated images: all 96 training images are of one"):
        _record(one_class)
    with pytest.raises(UserError, match="classifier of 6 training images: expected at least 8"):
        _record(LabelledImages(_bars(6, 3).images, _bars(6, 3).labels), devices=8)
    with pytest.raises(UserError, match="labels from 1 to 6, expected 0 to 5"):
        _record(LabelledImages(_bars(96, 3).images, _bars(96, 3).labels + 1))


def test_parts_are_cut_out_and_enlarged():
    image = jnp.linspace(-1, 1, 16)[:, None, None] * jnp.ones((16, 16, 1))
    keys = jax.random.split(jax.random.key(0), 40)
    cropped = jax.jit(jax.vmap(partial(classifier_training._cropped, image)))
    parts = np.asarray(cropped(keys))
    assert parts.shape == (40, 16, 16, 1)
    slopes = (parts[:, 12, 8, 0] - parts[:, 4, 8, 0]) / (8 * 2 / 15)
    # Enlarged in height by 1 to 1 / sqrt(0.08 * 3 / 4), never shrunk.
    assert slopes.max() <= 1.001
    assert slopes.min() > np.sqrt(0.08 * 3 / 4) * 0.9
    assert slopes.std() > 0.05
    assert parts.min() >= -1.001
    assert parts.max() <= 1.001


def test_images_are_mirrored_only_if_asked():
    images = jnp.arange(8.0)[None, None, :, None] * jnp.ones((20, 8, 8, 1))
    keys = jax.random.split(jax.random.key(0), 20)
    augmented = jax.jit(classifier_training._augmented, static_argnames=("crop", "flip"))
    plain = augmented(images, keys, crop="shift", flip=False)
    np.testing.assert_array_equal(plain, images)
    flipped = augmented(images, keys, crop="shift", flip=True)
    mirrored = np.asarray(flipped[:, 0, 0, 0] == 7)
    assert 0 < mirrored.sum() < 20
