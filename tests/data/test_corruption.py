import errno
import itertools
import os
import pickle

import numpy as np
import pytest

from cascaded_diffusion.data import folder
from cascaded_diffusion.data.loader import build_stream, iterate
from cascaded_diffusion.data.records import CorruptRecord
from cascaded_diffusion.data.sources import load_source
from cascaded_diffusion.errors import UserError
from tests.data.photos import photo, photo_config, write_tree

# 24 images: of these four, two stand next to each other, and one is the last.
_BAD = {3: b"", 4: photo(4)[:200], 11: b"no image", 23: 3_000_000_000}


@pytest.fixture
def damaged(tmp_path):
    write_tree(tmp_path)
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    for index, data in _BAD.items():
        if isinstance(data, int):
            os.truncate(files[index], data)  # a file with holes, which takes no space
        else:
            files[index].write_bytes(data)
    return tmp_path


def _take(config, steps, start=0, source=None, **kwargs):
    source = source or load_source(config.data, "train", config.stage)
    stream = build_stream(source, config.data, global_batch_size=8, **kwargs)
    batches = iterate(stream, source, config.data, start_step=start)
    try:
        return list(itertools.islice(batches, steps)), batches.num_skipped
    finally:
        batches.close()


def test_a_storage_that_fails_for_a_while_says_nothing_about_an_image(damaged, monkeypatch):
    """No other image may take its place: the stream is a function of seed, step and row."""
    config = photo_config(damaged, data__on_corrupt="skip", data__max_corrupt_fraction=0.5)

    def stale(*args, **kwargs):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    source = load_source(config.data, "train", config.stage)
    monkeypatch.setattr(folder, "open", stale, raising=False)
    with pytest.raises(OSError, match="Stale file handle"):
        source[0]
    # A file that is not there any more, or that may not be read, is another matter.
    for number in (errno.ENOENT, errno.EACCES):
        monkeypatch.setattr(errno, "ESTALE", number)
        with pytest.raises(CorruptRecord, match="cannot be read"):
            source.origin.read(0)


def test_fail_names_the_file(damaged):
    config = photo_config(damaged, data__on_corrupt="fail")
    source = load_source(config.data, "train", config.stage)
    with pytest.raises(UserError, match=r"ant/003.jpg: empty, 0 bytes; replace it, or .*=skip"):
        source[3]
    with pytest.raises(UserError, match=r"cow/007.jpg: 3,000,000,000 bytes, expected at most 2,0"):
        source[23]
    (damaged / "train" / "cow" / "006.jpg").unlink()
    with pytest.raises(UserError, match=r"cow/006.jpg: cannot be read \(No such file"):
        source[22]
    # And so does the loader, through its threads.
    with pytest.raises(UserError, match=r"\.jpg: "):
        _take(config, 3)


def test_skip_takes_the_next_good_record_and_counts(damaged, capsys):
    config = photo_config(damaged, data__on_corrupt="skip", data__max_corrupt_fraction=0.2)
    source = load_source(config.data, "train", config.stage)
    for index, instead in ((3, 5), (4, 5), (11, 12), (23, 0)):
        record = source[index]
        assert (record["index"], record["skipped"]) == (instead, index)
        np.testing.assert_array_equal(record["image"], source[instead]["image"])
    assert source.guard.num_found == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == 4  # each is told once
    assert "ant/003.jpg: empty, 0 bytes" in lines[0]


def test_skips_change_neither_order_nor_resuming(damaged):
    config = photo_config(damaged, data__on_corrupt="skip", data__max_corrupt_fraction=0.2)
    whole, skipped = _take(config, 9)
    assert skipped == 4
    for count in (2, 4):
        parts = [_take(config, 9, process_index=p, process_count=count)[0] for p in range(count)]
        for step, batch in enumerate(whole):
            joined = np.concatenate([part[step]["image"] for part in parts])
            np.testing.assert_array_equal(joined, batch["image"])
    for start in range(1, 9):
        (batch,), _ = _take(config, 1, start=start)
        np.testing.assert_array_equal(batch["image"], whole[start]["image"])


def test_too_many_halt(damaged):
    config = photo_config(damaged, data__on_corrupt="skip", data__max_corrupt_fraction=0.1)
    with pytest.raises(UserError, match=r"3 of 24 records are corrupt, the last .*jpg .*= 0.1 of"):
        _take(config, 9)
    # By default, of a thousand one: here the first is one too many.
    config = photo_config(damaged, data__on_corrupt="skip")
    with pytest.raises(UserError, match=r"1 of 24 records are corrupt.*max_corrupt_fraction = 0.0"):
        _take(config, 9)


def test_the_advice_to_skip_names_the_other_key_where_it_is_needed(tmp_path):
    from cascaded_diffusion.data.records import CorruptionGuard

    config = photo_config(tmp_path, data__on_corrupt="fail").data
    with pytest.raises(UserError, match=r"on_corrupt=skip$"):
        CorruptionGuard(config, 1000).note(0, "a.jpg", "damaged")
    for count, fraction in ((999, "0.01"), (24, "0.05"), (3, "0.34"), (1, "1")):
        with pytest.raises(
            UserError,
            match=rf"on_corrupt=skip --config.data.max_corrupt_fraction={fraction} \(at 0.001, ",
        ):
            CorruptionGuard(config, count).note(0, "a.jpg", "damaged")
        enough = photo_config(
            tmp_path, data__on_corrupt="skip", data__max_corrupt_fraction=float(fraction)
        ).data
        CorruptionGuard(enough, count).note(0, "a.jpg", "damaged")


def test_a_set_with_nothing_good_says_so(tmp_path):
    write_tree(tmp_path, per_class=1)
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    config = photo_config(tmp_path, data__on_corrupt="skip", data__max_corrupt_fraction=1.0)
    source = load_source(config.data, "train", config.stage)
    with pytest.raises(UserError, match="none of 3 records can be read"):
        source[0]


def test_worker_processes_report_what_they_skip(damaged):
    config = photo_config(
        damaged, data__on_corrupt="skip", data__max_corrupt_fraction=0.2, data__read_workers=2
    )
    plain, skipped = _take(
        photo_config(damaged, data__on_corrupt="skip", data__max_corrupt_fraction=0.2), 6
    )
    found, skipped_there = _take(config, 6)
    assert skipped_there == skipped == 4
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    # And their errors arrive as what they are.
    config = photo_config(damaged, data__on_corrupt="fail", data__read_workers=2)
    with pytest.raises(UserError, match=r"\.jpg: "):
        _take(config, 6)


def test_conversions_are_said_once(tmp_path, capsys):
    from PIL import Image

    write_tree(tmp_path)
    for name in ("000.jpg", "001.jpg"):
        path = tmp_path / "train" / "ant" / name
        Image.open(path).convert("CMYK").save(path, "JPEG")
    config = photo_config(tmp_path)
    source = load_source(config.data, "train", config.stage)
    assert source[0]["image"].shape == source[1]["image"].shape == (16, 16, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("converted: ")
    assert line.endswith("ant/000.jpg (CMYK) to 8-bit RGB; so are others like it")
    assert source.converted == {"CMYK": 2}


def test_a_source_survives_pickling(damaged):
    config = photo_config(damaged, data__on_corrupt="skip", data__max_corrupt_fraction=0.2)
    source = load_source(config.data, "train", config.stage)
    source[3]  # and 4, on the way to 5
    copy = pickle.loads(pickle.dumps(source))
    assert copy.guard.num_found == 2
    np.testing.assert_array_equal(copy[4]["image"], source[4]["image"])
    copy.guard.note(7, "there", "damaged")  # its lock is its own
    assert (copy.guard.num_found, source.guard.num_found) == (3, 2)
