"""Parts of a split: they are what their bounds say, and complements do not overlap."""

import pytest

from cascaded_diffusion.data.splits import overlap, part_of
from cascaded_diffusion.errors import UserError


def _part(split, count):
    return set(part_of([str(i).encode() for i in range(count)], split).tolist())


@pytest.mark.parametrize("count", [1, 7, 49, 50, 60, 150, 250])
@pytest.mark.parametrize("percent", [1, 10, 33, 50])
def test_a_part_from_the_end_and_the_rest_are_the_whole_once(count, percent):
    parts = []
    for split in (f"train[:-{percent}%]", f"train[-{percent}%:]"):
        try:
            parts.append(_part(split, count))
        except UserError as e:
            assert "holds none of" in str(e)  # and not all of them
            parts.append(set())
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(count))
    assert abs(len(parts[1]) - count * percent / 100) <= 0.5


def test_percents_from_either_end_meet():
    assert _part("train[:99%]", 60) | _part("train[-1%:]", 60) == set(range(60))
    assert not _part("train[:90%]", 60) & _part("train[-10%:]", 60)
    with pytest.raises(UserError, match="holds none of 49 images"):
        _part("train[-1%:]", 49)


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ("train", "test", False),
        ("train", "train", True),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:90%]", "train[-10%:]", False),
        ("train[:90%]", "train[85%:]", True),
        ("train[:-10%]", "train[-20%:]", True),
        ("train[:1000]", "train[1000:]", False),
        ("train[:1000]", "train", True),
        ("train[:1000]", "train[:1000]", True),
        ("train[:1000]", "train[999:2000]", True),
        ("train[:1000]", "train[:50%]", True),  # both have the first image
        ("train[1000:]", "train[-50%:]", True),  # both have the last one
        ("train[0:]", "train[5%:10%]", True),
        ("train[-100%:10%]", "train[:100]", True),
        ("train[-1000:-500]", "train[-500:]", False),
        ("train[-1000:-500]", "train[-600:-100]", True),
        ("train[:1000]", "train[-1000:]", False),  # as far as is known
        ("train[:1000]", "train[50%:]", False),
        ("all", "train", True),  # the folder that the other is in
        ("train+test", "train", False),  # of TFDS, which is not parsed here
    ],
)
def test_splits_that_have_images_in_common_are_known(first, second, common):
    assert overlap(first, second) is common
    assert overlap(second, first) is common
