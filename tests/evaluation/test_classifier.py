import numpy as np
import pytest

from cascaded_diffusion.data.builtin import load_mnist
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import classifier as lib
from cascaded_diffusion.evaluation.judge import resized
from cascaded_diffusion.runtime.samples import load_samples, save_samples
from tests.tiny import tiny_sr


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
    features, predictions = first(held_out.images)
    assert features.shape == (1000, 64)
    assert (predictions == held_out.labels).mean() == first.accuracy
    assert said == []

    second = load()
    assert (second.digest, second.accuracy) == (first.digest, first.accuracy)
    np.testing.assert_array_equal(second(held_out.images[:9])[0], first(held_out.images[:9])[0])


def _small(seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(128) % 2
    images = (labels[:, None, None, None] * 200 + rng.integers(0, 50, (128, 16, 16, 1))).astype(
        np.uint8
    )
    return lib.LabelledImages(images, labels.astype(np.int32))


def test_a_stored_classifier_is_only_used_for_its_own_data(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "_EPOCHS", 2)
    path = tmp_path / "classifier.npz"
    said = []

    def load(data, seed=0):
        return lib.load_or_train(path, data, data, num_classes=2, seed=seed, say=said.append).digest

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


def test_samples_are_stored_as_adm_does_and_checked(tmp_path):
    stage = tiny_sr().stage
    path = tmp_path / "samples.npz"
    images = np.zeros((4, 32, 32, 1), np.uint8)
    save_samples(path, images, np.arange(4, dtype=np.int32))
    with np.load(path) as stored:
        assert stored.files == ["arr_0", "arr_1"]
        assert (stored["arr_0"].dtype, stored["arr_1"].dtype) == (np.uint8, np.int64)
    loaded, labels = load_samples(str(path), stage)
    np.testing.assert_array_equal(labels, np.arange(4))
    assert loaded.shape == images.shape

    for wrong, message in (
        ({"arr_0": images.astype(np.float32), "arr_1": np.arange(4)}, "arr_0 is float32"),
        ({"arr_0": images[:, :16], "arr_1": np.arange(4)}, r"expected uint8 \(n, 32, 32, 1\)"),
        ({"arr_0": images, "arr_1": np.arange(3)}, "expected 4 integer labels"),
        ({"images": images}, "expected an .npz with arr_0"),
    ):
        np.savez(path, **wrong)
        with pytest.raises(UserError, match=message):
            load_samples(str(path), stage)
    with pytest.raises(UserError, match="expected an .npz"):
        load_samples(str(tmp_path / "none.npz"), stage)
    np.savez(path, arr_0=np.asarray([object()]), arr_1=np.arange(1))  # a pickle inside
    with pytest.raises(UserError, match="expected an .npz"):
        load_samples(str(path), stage)
