import io
import os
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from cascaded_diffusion.files import npz_archive as npz_file
from cascaded_diffusion.files.npz_archive import read_arrays

_IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


def _header(shape, descr="|u1", version=1):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text


def _archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_numpys(tmp_path, save):
    arrays = {
        "arr_0": _IMAGES,
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big_endian": np.arange(5, dtype=">i4"),
        "text": np.asarray("caf\u00e9"),
        "names": np.asarray(["a", "bcd"]),
        "scalar": np.float64(3.5),
    }
    save(tmp_path / "x.npz", **arrays)
    found = read_arrays(tmp_path / "x.npz")
    assert found.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert found[name].dtype == np.asarray(expected).dtype
        np.testing.assert_array_equal(found[name], expected)
    assert read_arrays(str(tmp_path / "x.npz"), ["arr_0", "other"]).keys() == {"arr_0"}


def test_a_large_array_that_is_not_compressed_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_file, "_FREE_BYTES", 1000)
    np.savez(tmp_path / "x.npz", np.zeros((100, 8, 8, 3), np.uint8))
    assert read_arrays(tmp_path / "x.npz")["arr_0"].shape == (100, 8, 8, 3)


@pytest.mark.parametrize(
    ("shape", "descr", "message"),
    [
        ((3 * 10**15,), "|u1", "declared as uint8 of shape .3000000000000000,., 3,000,000,000,000"),
        ((10**20,), "|u1", "100,000,000,000,000,000,000 bytes, and holds 4"),
        ((2**62, 8), "<f8", "bytes, and holds 4"),
        ((5, 0, 10, 3), "|u1", r"shape \(5, 0, 10, 3\), which is empty"),
        ((-4,), "|u1", r"shape \(-4,\), which is empty"),
        ((10**30,), "|V0", "which is empty"),
        ((True, 2, 2), "|u1", r"shape \(True, 2, 2\), which is empty"),
        ((1,), "|O", "holds Python objects"),
        ((5,), "|u1", "5 bytes, and holds 4"),
        ((3,), "|u1", "3 bytes, and holds 4"),
        ("x", "|u1", "header that cannot be read"),
        ("(" * 4000, "|u1", "header that cannot be read"),
        ((1,), "nothing", "header that cannot be read"),
    ],
)
def test_what_a_header_declares_is_compared_with_the_file(tmp_path, shape, descr, message):
    path = _archive(tmp_path / "x.npz", {"arr_0.npy": _header(shape, descr) + b"abcd"})
    with pytest.raises(ValueError, match=message) as e:
        read_arrays(path)
    assert "\n" not in str(e.value)


def test_what_inflates_too_much_is_refused_before_it_does(tmp_path):
    shape = (3_000_000_000,)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("arr_0.npy", _header((100_000_000,)) + bytes(100_000_000))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    assert len(data) < 1_000_000
    # Thirty times as large, by the directory: what is allocated would be that.
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", shape[0])
    (tmp_path / "x.npz").write_bytes(data)
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=r"arr_0 declares 3,000,000,000 bytes, which 4\d\d,\d"):
            read_arrays(tmp_path / "x.npz")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        assert time.monotonic() - start < 1
    finally:
        tracemalloc.stop()
    # A hundredfold is what honest arrays of few values are compressed by.
    monkey = np.zeros((1000, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "y.npz", monkey)
    assert read_arrays(tmp_path / "y.npz")["arr_0"].shape == monkey.shape


def test_a_sparse_file_is_no_larger_than_memory(tmp_path):
    path = _archive(tmp_path / "x.npz", {"arr_0.npy": _header((100,)) + bytes(100)})
    with pytest.raises(ValueError, match=r"holds \d+ bytes of arrays, expected at most 50"):
        read_arrays(path, max_bytes=50)
    assert npz_file._memory() > 500_000_000


def test_what_is_no_archive_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", _IMAGES)
    np.savez(tmp_path / "x.npz", _IMAGES)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes((tmp_path / "x.npz").read_bytes()[:500])
    _archive(tmp_path / "lzma", {"arr_0.npy": _header((4,)) + b"abcd"}, zipfile.ZIP_LZMA)
    os.mkfifo(tmp_path / "fifo")
    for name in ("x.npy", "empty", "cut", "lzma", "fifo", "."):
        with pytest.raises(ValueError, match="damaged, or no .npz|compressed in a way|not a file"):
            read_arrays(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none")


def test_no_flipped_bit_or_cut_gives_other_arrays_or_a_stack_trace(tmp_path):
    data = io.BytesIO()
    np.savez_compressed(data, arr_0=_IMAGES[:2], arr_1=np.arange(2))
    whole, rng = data.getvalue(), np.random.default_rng(0)
    expected = {"arr_0": _IMAGES[:2], "arr_1": np.arange(2)}
    path = tmp_path / "x.npz"
    for at in rng.integers(0, len(whole), 600):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged if rng.random() < 0.8 else whole[:at])
        try:
            found = read_arrays(path)
        except (ValueError, OSError):
            continue
        for name, array in found.items():  # names are not covered by checksums
            if name in expected:
                np.testing.assert_array_equal(array, expected[name])


def test_names_are_told_without_reading(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), arr_0=np.zeros(3, object))
    assert npz_file.array_names(tmp_path / "a.npz") == {"mu", "arr_0"}
    (tmp_path / "b.npz").write_bytes(b"nothing")
    os.mkfifo(tmp_path / "c.npz")
    for name in "bc":
        with pytest.raises(ValueError, match="no .npz|not a file"):
            npz_file.array_names(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        npz_file.array_names(tmp_path / "d.npz")
