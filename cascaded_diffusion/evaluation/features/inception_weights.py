"""Finding, checking and converting the weights of FID's Inception.

The public file is that of pytorch-fid, ported from the original graph of 2015-12-05. It is read
without executing any of it and compared with its known hash, and its tensors are compared with
those of the network. The converted weights are kept in a private folder, as an `.npz` that holds
arrays and their digest.
"""

import dataclasses
import hashlib
import pathlib
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.request import Request

import numpy as np

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import path_of
from cascaded_diffusion.files.local_copies import cache_folder, local_copy
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.torch_file import read_tensors
from cascaded_diffusion.files.whole import sha256_of, write_npz_whole, write_whole
from cascaded_diffusion.networks import inception
from cascaded_diffusion.networks.classifier import flatten_params, unflatten_params

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NUM_BYTES = 95_628_359
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
_FLAG = "--inception_weights"
_TIMEOUT_SECS = 60
_MAX_CONVERTED_BYTES = 1 << 28  # two and a half times their size


@dataclasses.dataclass(frozen=True)
class InceptionWeights:
    """Parameters for `networks.inception`, and the SHA-256 of the file they are from."""

    params: Mapping[str, Mapping[str, np.ndarray]]
    sha256: str


def load_weights(
    path: str | None, *, allow_other: bool = False, cache: pathlib.Path | None = None
) -> InceptionWeights:
    """Inception's weights from a file, the cache, or the net.

    `path` is the public .pth file, one with the same tensors (if `allow_other`), or an .npz that
    this function has kept; by default the cached conversion of the public file is read, else a
    download. The cache is a folder in CASCADED_DIFFUSION_CACHE, else in the home folder.

    Raises UserError if the file is missing, damaged, something else, or not the public one.
    """
    if cache is None:
        cache = cache_folder() / "inception"
    kept = cache / f"{pathlib.Path(FILE).stem}.npz"
    if path is not None:
        if not path_of(path).is_file():
            raise UserError(f"{_FLAG}={path}: no such file; expected {FILE}, from {URL}")
        file = local_copy(path_of(path))
        if file.suffix == ".npz":
            try:
                weights = _read_converted(file)
            except ValueError as e:
                raise UserError(f"{_FLAG}={path}: {e}; give {FILE} itself, from {URL}") from e
            _check_public(file, weights.sha256, allow_other)
            return weights
        digest = sha256_of(file)
        _check_public(file, digest, allow_other)
        if digest != SHA256:
            return _converted(file, digest)
    if (weights := _kept(kept)) is None:
        file = download(cache / FILE) if path is None else file
        weights = _converted(file, SHA256)
        _keep(kept, weights)
        if path is None:
            file.unlink()
    return weights


def _check_public(path: pathlib.Path, digest: str, allow_other: bool) -> None:
    if digest == SHA256 or allow_other:
        return
    size = path.stat().st_size
    if path.suffix != ".npz" and size < NUM_BYTES:
        raise UserError(
            f"{_FLAG}={path}: {size} bytes, expected {NUM_BYTES}: the file is cut off, or is not"
            f" {FILE} (SHA-256 {SHA256})"
        )
    raise UserError(
        f"{_FLAG}={path}: SHA-256 is {digest}, expected {SHA256}, that of {FILE}: the file is"
        " damaged, or of another network; to use weights that nobody else's FID is of, add"
        " --allow_other_inception_weights"
    )


def _converted(path: pathlib.Path, digest: str) -> InceptionWeights:
    try:
        tensors = read_tensors(path)
        check_tensors(tensors)
    except ValueError as e:
        raise UserError(f"{_FLAG}={path}: not the weights of FID's Inception: {e}") from e
    return InceptionWeights(inception.params_from_checkpoint(tensors), digest)


def check_tensors(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError, which names the first tensor that is not as the network's should be."""
    expected = inception.checkpoint_tensors()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} does not belong there")
        dtype, shape = expected[name]
        array = tensors[name]
        if (str(array.dtype), array.shape) != (dtype, shape):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has values that are not finite")
        if name.endswith("running_var") and array.min() < 0:
            raise ValueError(f"{name} has negative values")


def _weights_digest(arrays: Mapping[str, np.ndarray], sha256: str) -> str:
    digest = hashlib.sha256(sha256.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _keep(path: pathlib.Path, weights: InceptionWeights) -> None:
    arrays = flatten_params(weights.params)
    about = {"sha256": weights.sha256, "digest": _weights_digest(arrays, weights.sha256)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_npz_whole(path, {**arrays, **about})
    except OSError as e:  # it saves time, no more
        print(
            f"{path}: cannot be kept ({e.strerror}); weights are read again each time",
            file=sys.stderr,
        )


def _kept(path: pathlib.Path) -> InceptionWeights | None:
    """The converted weights of the cache; None if they must be made."""
    if not path.exists():
        return None
    try:
        weights = _read_converted(path)
        if weights.sha256 != SHA256:
            raise ValueError("converted from another file")
    except ValueError as e:
        print(f"{path}: {e}; the weights are converted anew", file=sys.stderr, flush=True)
        return None
    return weights


def _read_converted(path: pathlib.Path) -> InceptionWeights:
    """Reads a file of `_keep`. Raises ValueError if it is damaged or something else."""
    arrays = read_arrays(path, max_bytes=_MAX_CONVERTED_BYTES)
    sha256, digest = (str(arrays.pop(name, "")) for name in ("sha256", "digest"))
    if digest != _weights_digest(arrays, sha256):
        raise ValueError("its arrays have changed since it was written, or it is another file")
    shapes = {name: array.shape for name, array in arrays.items() if array.dtype == np.float32}
    expected = {}
    for layer, shape in inception.kernel_shapes().items():
        expected |= {f"{layer}/kernel": shape, f"{layer}/bias": shape[-1:]}
    if shapes != expected or not all(np.isfinite(a).all() for a in arrays.values()):
        raise ValueError("not the converted weights of FID's Inception")
    return InceptionWeights(unflatten_params(arrays), sha256)


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not away from https."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    path: pathlib.Path,
    *,
    url: str = URL,
    sha256: str = SHA256,
    num_bytes: int = NUM_BYTES,
    opener: urllib.request.OpenerDirector | None = None,
) -> pathlib.Path:
    """Downloads a file to `path` and keeps it if it has the expected size and hash.

    The default `opener` follows redirects to https alone. No more than `num_bytes` are read.
    Raises UserError if the download fails, or gets another file.
    """
    remedy = f"; get {path.name} ({url}, SHA-256 {sha256}) on another machine and give {_FLAG}=PATH"
    if opener is None:
        if not url.startswith("https://"):
            raise UserError(f"{url}: expected https")
        opener = urllib.request.build_opener(_HttpsOnly)
    print(f"downloading {url} ({num_bytes / 1e6:.0f} MB)", file=sys.stderr, flush=True)
    try:
        with opener.open(url, timeout=_TIMEOUT_SECS) as response:
            data = response.read(num_bytes + 1)
    except (OSError, HTTPException) as e:  # URLError and timeouts too
        raise UserError(f"{url}: cannot be downloaded ({e}){remedy}") from e
    if len(data) > num_bytes:
        raise UserError(f"{url}: more than the {num_bytes} bytes expected{remedy}")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(
            f"{url}: got {len(data)} bytes of SHA-256 {found}, expected {num_bytes} of {sha256};"
            f" nothing was kept{remedy}"
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(path, data)
    return path
