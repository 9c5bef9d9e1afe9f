"""Samples are made once each, however often the job is killed."""

import jax
import numpy as np
import pytest

from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.generate import fill
from cascaded_diffusion.evaluation.samples.sample_store import DamagedBatchError, SampleStore

NUM, BATCH = 23, 5


def _maker(made, offset=0):
    def make(indices):
        made.append(indices)
        images = np.broadcast_to(indices[:, None, None, None], (len(indices), 2, 2, 1))
        return {"images": (images + offset).astype(np.uint8), "labels": indices}

    return make


def _store(path, **identity):
    return SampleStore(path, identity, num_samples=NUM, batch_size=BATCH)


def test_every_sample_once_and_in_order(tmp_path):
    made, store = [], _store(tmp_path)
    fill(store, _maker(made, 3), label="")
    assert store.missing() == []
    labels = np.concatenate([b["labels"] for b in store.batches()])
    np.testing.assert_array_equal(labels, np.arange(NUM))
    images = np.concatenate([b["images"] for b in store.batches()])
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(NUM) + 3)
    assert {len(indices) for indices in made} == {BATCH}  # one shape to compile

    # Nothing is made twice, but for what went missing or was damaged.
    fill(store, _maker(made, 3), label="")
    assert len(made) == 5
    path = sorted(tmp_path.rglob("0*.npz"))[2]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedBatchError, match="missing or damaged; run the same command again"):
        list(store.batches())
    fill(store, _maker(made, 3), label="")
    np.testing.assert_array_equal(made[-1], np.arange(10, 15))
    assert len(list(store.batches())) == 5
    store.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_moved_is_not_made_again(tmp_path):
    store = _store(tmp_path / "run/samples")

    def make(indices):
        if indices[0]:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return _maker([])(indices)

    with pytest.raises(OSError, match="was moved or removed while samples were written"):
        fill(store, make, label="")
    assert not (tmp_path / "run").exists()


def test_a_flipped_bit_is_noticed(tmp_path):
    store = _store(tmp_path)
    fill(store, _maker([]), label="")
    path = sorted(tmp_path.rglob("0*.npz"))[1]
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 130] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedBatchError, match="000001.npz: missing or damaged"):
        list(store.batches())
    assert store.missing() == [1]


def test_other_samples_have_another_store(tmp_path):
    fill(_store(tmp_path, step=1), _maker([]), label="")
    assert _store(tmp_path, step=1).missing() == []
    assert len(_store(tmp_path, step=2).missing()) == 5
    assert len(SampleStore(tmp_path, {"step": 1}, num_samples=NUM, batch_size=4).missing()) == 6


def test_a_batch_of_the_wrong_size_is_refused(tmp_path):
    store = _store(tmp_path)
    with pytest.raises(ValueError, match="batch 4: 5 images, expected 3"):
        store.write(4, {"images": np.zeros((5, 2, 2, 1), np.uint8)})


def test_progress_counts_samples_that_are_kept(tmp_path, monkeypatch):
    seen = []

    class Progress:
        def __init__(self, total, *, initial=0, **kwargs):
            seen.append((initial, total))

        def update(self, position):
            seen.append(position)

        def close(self):
            pass

    monkeypatch.setattr(generate, "Progress", Progress)
    store = _store(tmp_path)
    fill(store, _maker([], 3), label="")
    assert seen == [(0, 23), 5, 10, 15, 20, 23]
    for batch in (1, 4):
        (path,) = tmp_path.rglob(f"{batch:06d}.npz")
        path.unlink()
    seen.clear()
    fill(store, _maker([], 3), label="")
    assert seen == [(15, 23), 20, 23]

    # Of two processes, each counts its own; batches are filled up for the devices alone.
    store, made, seen[:] = _store(tmp_path, cascade=True), [], []

    def sample(params, indices):
        made.append(indices)
        return [np.zeros((len(indices), 2, 2, 1), np.uint8)]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        fill(store, generate.cascade_maker(sample, [], np.asarray([7, 3])), devices=4, label="")
    assert seen == [(0, 13), 5, 10, 13, (0, 10), 5, 10]
    assert {len(indices) for indices in made} == {8}
    labels = np.concatenate([b["labels"] for b in store.batches()])
    np.testing.assert_array_equal(labels, np.resize([7, 3], NUM))


def test_stores_of_other_samples_are_found(tmp_path):
    fill(_store(tmp_path, step=1), _maker([]), label="")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "identity.json").write_text("[" * 100_000)
    _store(tmp_path, step=3)  # nothing is made of it
    (other,) = _store(tmp_path, step=2).others()
    assert (other.settings["step"], other.num_samples) == (1, NUM)
    assert other.num_bytes > 0
    assert _store(tmp_path, step=1).others() == []
