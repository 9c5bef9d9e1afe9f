"""Checkpoints that declare more than they hold: refused in a moment, without the memory."""

import io
import pickle
import re
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from cascaded_diffusion.files.torch_file import read_tensors
from tests.evaluation.features.test_inception_weights import FIXTURES, SMALL
from tests.interchange.files import integer as _int
from tests.interchange.files import integers as _ints
from tests.interchange.files import text as _text

_HEADERS = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


def _storage(count, key="0", kind="FloatStorage"):
    return (
        b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text("cpu")
        + _int(count) + b"NtQ"
    )  # fmt: skip


def _tensor(count, shape, *, strides=None, **kwargs):
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :], dtype=object)) for i in range(len(shape))]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + _storage(count, **kwargs) + _int(0)
        + _ints(shape) + _ints(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def _state(*tensors):
    items = b"".join(_text(f"t{i}") + tensor for i, tensor in enumerate(tensors))
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


def _legacy(state, keys=b"]\x94X\x01\x00\x00\x000a.", numbers=b""):
    headers = b"".join(pickle.dumps(x, protocol=2) for x in _HEADERS)
    return headers + state + keys.replace(b"\x94", b"q\x00") + numbers


def _zip(state, numbers=b"", *, key="0", compression=zipfile.ZIP_STORED, extra=()):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("a/data.pkl", state)
        archive.writestr(f"a/data/{key}", numbers)
        for name, data in extra:
            archive.writestr(name, data)
    return out.getvalue()


ONES = np.ones(6, np.float32).tobytes()
GOOD = _state(_tensor(6, (2, 3)))
COUNT = struct.pack("<q", 6)


def test_files_of_these_parts_are_read(tmp_path):
    for data in (_legacy(GOOD, numbers=COUNT + ONES), _zip(GOOD, ONES)):
        (tmp_path / "a.pth").write_bytes(data)
        np.testing.assert_array_equal(read_tensors(tmp_path / "a.pth")["t0"], np.ones((2, 3)))


MANY = 50_000
MEGABYTE = bytes(1_000_000)
SHARED = _state(*[_tensor(250_000, (250_000,))] * 2_000)  # 1 MB of numbers, 2 GB of tensors
NEST = b"\x80\x02)" + b"".join(b"q\x00h\x00\x86" for _ in range(200)) + b"."  # 2**200 tuples
BOMBS = {
    "views that are copied apart, legacy": (
        _legacy(SHARED, numbers=struct.pack("<q", 250_000) + MEGABYTE),
        "its tensors would take 2000000000 bytes, and it has ",
    ),
    "views that are copied apart, zip": (_zip(SHARED, MEGABYTE), "its tensors would take 20000"),
    # Made by the test alone: compressing them takes seconds.
    "a storage that inflates": (
        lambda: _zip(
            _state(_tensor(50_000_000, (50_000_000,))),
            bytes(200_000_000),
            compression=zipfile.ZIP_DEFLATED,
        ),
        "its parts are compressed",
    ),
    "a pickle that inflates": (
        lambda: _zip(b"\x80\x02" + b"N" * 100_000_000, compression=zipfile.ZIP_DEFLATED),
        "its parts are compressed",
    ),
    "a storage that is not there": (
        _legacy(_state(_tensor(1 << 40, (1 << 40,))), numbers=struct.pack("<q", 1 << 40)),
        "its storages would take 4398046511104 bytes",
    ),
    "a count beyond int64": (
        _legacy(_state(_tensor(1 << 70, (1,)))),
        "a storage without a key or a count",
    ),
    "a shape whose product overflows": (
        _legacy(_state(_tensor(6, (1 << 32, 1 << 32)))),
        "lies outside of its storage",
    ),
    "a shape beyond int64": (_legacy(_state(_tensor(6, (1 << 64, 0)))), "memory can hold"),
    "a shape of many dimensions": (
        _legacy(_state(_tensor(1, (1,) * MANY, strides=(1,) * MANY))),
        "memory can hold",
    ),
    "a tuple doubled 200 times": (_legacy(NEST), "something else than a dict of tensors"),
    "a tuple doubled 200 times as a list of keys": (
        _legacy(GOOD, keys=b"\x80\x02](" + NEST[2:-1] + b"e.", numbers=COUNT + ONES),
        "its list of storages is none of names",
    ),
    "a tuple doubled 200 times as a storage's kind": (
        _legacy(
            b"\x80\x02(" + _text("storage") + NEST[2:-1] + _text("0") + _text("cpu") + b"K\x01NtQ."
        ),
        "a storage of something else",
    ),
    "a deep nest": (
        _legacy(b"\x80\x02)" + b"\x85" * MANY + b"."),
        "something else than a dict of tensors",
    ),
    "a deep nest as a name": (
        _legacy(b"\x80\x02}(" + b")" + b"\x85" * MANY + b"Nu."),
        "items of something that is no dict of names",
    ),
    "millions of opcodes": (_legacy(b"\x80\x02" + b"N" * 300_000 + b"."), "opcodes"),
    "a long name": (
        _legacy(b"\x80\x02c" + b"os\n" + b"x" * 1_000_000 + b"\n."),
        "which no state dict of tensors needs",
    ),
    "two storages of one key": (
        _legacy(_state(_tensor(6, (2, 3)), _tensor(1, (1,))), numbers=COUNT + ONES),
        "two storages of one key",
    ),
    "two pickles": (_zip(GOOD, ONES, extra=[("b/data.pkl", GOOD)]), "it has 2 data.pkl"),
    "big-endian": (_zip(GOOD, ONES, extra=[("a/byteorder", b"big")]), "little-endian"),
    "a storage of another size": (_zip(GOOD, ONES[:-4]), "not of the size it declares"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_declares_more_than_it_holds_is_refused_at_once(name, tmp_path):
    data, message = BOMBS[name]
    data = data() if callable(data) else data
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read_tensors(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 300
    assert peak < 200e6 + 3 * len(data)
    assert time.monotonic() - start < 60


def test_a_file_larger_than_any_network_is_not_read(tmp_path):
    with (tmp_path / "a.pth").open("wb") as f:
        f.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match="1073741825 bytes, expected at most 1073741824"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("layout", ["legacy", "zip"])
def test_changed_bytes_are_refused_or_leave_arrays(layout, tmp_path):
    data = (FIXTURES / f"torch_{layout}.pth").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        (tmp_path / "a.pth").write_bytes(changed)
        try:
            tensors = read_tensors(tmp_path / "a.pth")
        except ValueError as e:
            assert len(str(e)) < 300
        else:
            total = sum(array.nbytes for array in SMALL.values())
            assert sum(array.nbytes for array in tensors.values()) <= total + 100
