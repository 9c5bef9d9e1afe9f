"""The public checkpoint's layout, read without executing it; and all that can be wrong with it."""

import hashlib
import http.server
import io
import json
import pickle
import shutil
import struct
import threading
import urllib.request
import zipfile

import numpy as np
import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features import inception_weights as lib
from cascaded_diffusion.files.torch_file import read_tensors
from cascaded_diffusion.networks.inception import checkpoint_tensors, params_from_checkpoint
from tests.evaluation.random_inception import random_checkpoint
from tests.tiny import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
SHARED = ROOT.parent / "shared" / "data"


class _Opcodes:
    """Writes the opcodes with which torch before 1.6 wrote a state dict."""

    def __init__(self):
        self.out = io.BytesIO()

    def text(self, value):
        data = value.encode()
        self.out.write(b"X" + struct.pack("<I", len(data)) + data)

    def number(self, value):
        self.out.write(b"J" + struct.pack("<i", value))

    def numbers(self, values):
        self.out.write(b"(")
        for value in values:
            self.number(value)
        self.out.write(b"t")

    def name(self, module, name):
        self.out.write(f"c{module}\n{name}\n".encode())


def write_legacy(path, tensors):
    """A file in the layout of torch.save before 1.6."""
    o = _Opcodes()
    o.out.write(b"\x80\x02")
    o.name("collections", "OrderedDict")
    o.out.write(b")R(")
    for key, (name, array) in enumerate(tensors.items()):
        o.text(name)
        o.name("torch._utils", "_rebuild_tensor_v2")
        o.out.write(b"((")
        o.text("storage")
        o.name("torch", "LongStorage" if array.dtype == np.int64 else "FloatStorage")
        o.text(str(key))
        o.text("cpu")
        o.number(array.size)
        o.out.write(b"NtQ")
        o.number(0)
        o.numbers(array.shape)
        o.numbers([int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)])
        o.out.write(b"\x89")
        o.name("collections", "OrderedDict")
        o.out.write(b")RtR")
    o.out.write(b"u.")
    with path.open("wb") as f:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, f, protocol=2)
        f.write(o.out.getvalue())
        pickle.dump([str(i) for i in range(len(tensors))], f, protocol=2)
        for array in tensors.values():
            f.write(struct.pack("<q", array.size) + array.tobytes())


SMALL = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.count": np.asarray(5),
    "b.bias": np.asarray([1.5, -2], np.float32),
}


@pytest.mark.parametrize("layout", ["legacy", "zip"])
def test_files_that_torch_wrote_are_read(layout):
    tensors = read_tensors(FIXTURES / f"torch_{layout}.pth")
    assert list(tensors) == list(SMALL)
    for name, array in SMALL.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].dtype == array.dtype


def test_our_writer_writes_what_is_read(tmp_path):
    write_legacy(tmp_path / "a.pth", SMALL)
    for name, array in read_tensors(tmp_path / "a.pth").items():
        np.testing.assert_array_equal(array, SMALL[name])


@pytest.mark.parametrize("layout", ["legacy", "zip"])
def test_every_cut_is_noticed(layout, tmp_path):
    data = (FIXTURES / f"torch_{layout}.pth").read_bytes()
    path = tmp_path / "a.pth"
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError):
            read_tensors(path)
    path.write_bytes(data + b"x")
    if layout == "legacy":
        with pytest.raises(ValueError, match="something after its end"):
            read_tensors(path)


class _Trap:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_trapped_file_is_refused_and_not_executed(protocol, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "a.pth"
    trap = {"a": _Trap(canary)}
    with path.open("wb") as f:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, trap, []):
            pickle.dump(header, f, protocol=protocol)
    with pytest.raises(ValueError, match="which no state dict"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(trap, protocol=protocol))
    with pytest.raises(ValueError, match="which no state dict"):
        read_tensors(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.replace(b"FloatStorage", b"HalfStorage\n"[:11] + b"x"), "the name"),
        (lambda d: d.replace(b"_rebuild_tensor_v2", b"_rebuild_parameter"), "the name"),
        (
            lambda d: d.replace(b"J\x03\x00\x00\x00t", b"J\x04\x00\x00\x00t"),
            "not contiguous|outside",
        ),
        (lambda d: d.replace(b"J\x03\x00\x00\x00", b"J\xff\xff\xff\xff"), "not contiguous|outside"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(change, message, tmp_path):
    write_legacy(tmp_path / "a.pth", SMALL)
    data = (tmp_path / "a.pth").read_bytes()
    assert change(data) != data
    (tmp_path / "a.pth").write_bytes(change(data))
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "a.pth")


@pytest.fixture(scope="module")
def tensors():
    return random_checkpoint(checkpoint_tensors())


@pytest.fixture(scope="module")
def public(tensors, tmp_path_factory):
    """A file of the public one's size, nearly, names, shapes and layout."""
    path = tmp_path_factory.mktemp("weights") / lib.FILE
    write_legacy(path, tensors)
    return path


@pytest.fixture
def as_public(public, monkeypatch):
    """As if it were the public one."""
    data = public.read_bytes()
    monkeypatch.setattr(lib, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(lib, "NUM_BYTES", len(data))
    return public


def test_the_network_has_the_tensors_of_the_public_file():
    if not SHARED.is_dir():
        pytest.skip("no manifest of the public file here")
    manifest = json.loads((SHARED / "fid_inception_manifest.json").read_text())["entries"]
    assert [(n, d, tuple(s)) for n, d, s in manifest] == [
        (name, dtype, shape) for name, (dtype, shape) in checkpoint_tensors().items()
    ]


def test_real_tensors_survive_the_layout(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("no tensors of the public file here")
    with np.load(SHARED / "fid_inception_fragment.npz") as stored:
        fragment = dict(stored)
    expected = checkpoint_tensors()
    write_legacy(tmp_path / "a.pth", fragment)
    for name, array in read_tensors(tmp_path / "a.pth").items():
        np.testing.assert_array_equal(array, fragment[name])
        assert (str(array.dtype), array.shape) == expected[name]


def test_weights_are_converted_once_and_checked(as_public, tensors, tmp_path, monkeypatch, capsys):
    weights = lib.load_weights(str(as_public), cache=tmp_path)
    for name, parts in params_from_checkpoint(tensors).items():
        for part, array in parts.items():
            np.testing.assert_array_equal(weights.params[name][part], array)
    (kept,) = tmp_path.iterdir()
    assert kept.suffix == ".npz"
    capsys.readouterr()
    # Without a path, and by the path of the kept file.
    for path in (None, str(kept)):
        again = lib.load_weights(path, cache=tmp_path)
        assert again.sha256 == weights.sha256
        np.testing.assert_array_equal(again.params["fc"]["bias"], weights.params["fc"]["bias"])

    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    with pytest.raises(UserError, match="give pt_inception-2015-12-05-6726825d.pth itself"):
        (tmp_path / "other.npz").write_bytes(data)
        lib.load_weights(str(tmp_path / "other.npz"), cache=tmp_path)

    # What was kept is made anew, from the file or the net, and that is said.
    monkeypatch.setattr(lib, "download", lambda path: shutil.copy(as_public, path))
    for path in (str(as_public), None):
        kept.write_bytes(data)
        again = lib.load_weights(path, cache=tmp_path)
        np.testing.assert_array_equal(again.params["fc"]["bias"], weights.params["fc"]["bias"])
        assert "the weights are converted anew" in capsys.readouterr().err
        assert kept.read_bytes() != data
        assert lib.load_weights(None, cache=tmp_path).sha256 == weights.sha256
        assert capsys.readouterr().err == ""


def _renamed(arrays):
    arrays["fc/bias/more"] = arrays.pop("fc/bias")


@pytest.mark.parametrize(
    "change",
    [
        _renamed,
        lambda a: a.pop("fc/bias"),
        lambda a: a.update({"fc/bias": np.zeros(3, np.float32)}),
        lambda a: a.update({"fc/bias": np.zeros(1008, ">f8")}),
        lambda a: a.update({"fc/bias": np.full(1008, np.nan, np.float32)}),
    ],
    ids=["name", "missing", "shape", "dtype", "NaN"],
)
def test_an_npz_of_other_arrays_is_refused_though_its_digest_is_right(change, tensors, tmp_path):
    weights = lib.InceptionWeights(params_from_checkpoint(tensors), lib.SHA256)
    arrays = lib.flatten_params(weights.params)
    change(arrays)
    path = tmp_path / "w.npz"
    np.savez(path, **arrays, sha256=lib.SHA256, digest=lib._weights_digest(arrays, lib.SHA256))
    with pytest.raises(UserError, match="not the converted weights of FID's Inception"):
        lib.load_weights(str(path), cache=tmp_path)


def test_a_cache_that_is_no_local_folder_is_refused(monkeypatch):
    monkeypatch.setenv("CASCADED_DIFFUSION_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="CASCADED_DIFFUSION_CACHE=gs://bucket/cache: expected"):
        lib.load_weights(None)


def test_a_folded_unit_is_convolution_and_normalization(tensors):
    params = params_from_checkpoint(tensors)
    name, x = "Mixed_5b.branch1x1", np.random.default_rng(0).normal(size=192)
    y = np.float64(tensors[f"{name}.conv.weight"][:, :, 0, 0]) @ x
    bn = {k: np.float64(tensors[f"{name}.bn.{k}"]) for k in ("weight", "bias")}
    mean = np.float64(tensors[f"{name}.bn.running_mean"])
    variance = np.float64(tensors[f"{name}.bn.running_var"])
    expected = (y - mean) / np.sqrt(variance + 1e-3) * bn["weight"] + bn["bias"]
    ours = x @ params[name]["kernel"][0, 0] + params[name]["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def _one_line(error, path):
    assert str(error.value).startswith(f"--inception_weights={path}: ")
    assert "\n" not in str(error.value)


def test_bad_weight_files_are_named(as_public, tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(UserError, match="no such file; expected pt_inception") as error:
        lib.load_weights(str(path), cache=tmp_path)
    _one_line(error, path)
    data = as_public.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(UserError, match=f"bytes, expected {len(data)}: the file is cut") as error:
        lib.load_weights(str(path), cache=tmp_path)
    _one_line(error, path)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match=f"expected {lib.SHA256}, that of pt_inc") as error:
        lib.load_weights(str(path), cache=tmp_path)
    _one_line(error, path)
    # Asked for, other weights are taken, and known by their own hash; never kept.
    other = lib.load_weights(str(path), cache=tmp_path, allow_other=True)
    assert other.sha256 == hashlib.sha256(changed).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("Mixed_7c.branch_pool.bn.bias"),
            "Mixed_7c.branch_pool.bn.bias is missing",
        ),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "extra does not belong there"),
        (
            lambda t: t.update({"fc.bias": np.zeros(1000, np.float32)}),
            r"fc.bias is float32 \(1000,\), expected float32 \(1008,\)",
        ),
        (lambda t: t["fc.bias"].__setitem__(3, np.nan), "fc.bias has values that are not finite"),
        (
            lambda t: t["Conv2d_1a_3x3.bn.running_var"].__setitem__(0, -1),
            "Conv2d_1a_3x3.bn.running_var has negative values",
        ),
    ],
)
def test_tensors_are_compared_with_the_network(change, message, tensors):
    changed = {name: array.copy() for name, array in tensors.items()}
    lib.check_tensors(changed)
    change(changed)
    with pytest.raises(ValueError, match=message):
        lib.check_tensors(changed)


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/www on loopback."""
    root = tmp_path / "www"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_a_download_is_kept_only_if_it_is_the_file(server, tmp_path):
    root, url = server
    good = np.random.default_rng(0).bytes(3_000_000)
    about = dict(sha256=hashlib.sha256(good).hexdigest(), num_bytes=len(good))
    opener = urllib.request.build_opener()
    target = tmp_path / "cache" / "w.pth"
    bad = {
        "changed": good[:-1] + bytes([good[-1] ^ 1]),
        "cut": good[:-10],
        "long": good + b"x" * 2_000_000,
    }
    for name, data in bad.items():
        (root / name).write_bytes(data)
        with pytest.raises(UserError, match="on another machine and give --inception_weights=PATH"):
            lib.download(target, url=f"{url}/{name}", opener=opener, **about)
    with pytest.raises(UserError, match="cannot be downloaded .*404"):
        lib.download(target, url=f"{url}/none", opener=opener, **about)
    assert not target.parent.exists()
    (root / "good").write_bytes(good)
    assert lib.download(target, url=f"{url}/good", opener=opener, **about).read_bytes() == good
    assert [p.name for p in target.parent.iterdir()] == ["w.pth"]
    with pytest.raises(UserError, match="expected https"):
        lib.download(target, url=f"{url}/good", **about)


def test_without_a_net_the_message_says_what_to_get(monkeypatch, tmp_path):
    monkeypatch.setattr(lib, "URL", "https://127.0.0.1:9/w.pth")

    def download(path, **kwargs):
        return _download(path, url="https://127.0.0.1:9/w.pth", **kwargs)

    _download = lib.download
    monkeypatch.setattr(lib, "download", download)
    with pytest.raises(UserError) as error:
        lib.load_weights(None, cache=tmp_path / "cache")
    message = str(error.value)
    assert lib.FILE in message
    assert lib.SHA256 in message
    assert "--inception_weights=PATH" in message
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
