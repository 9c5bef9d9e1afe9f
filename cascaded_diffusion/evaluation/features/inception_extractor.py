r"""FID's feature extractor: resizing to 299 px and the Inception network, on all devices.

Three ways of resizing are in use, whose FIDs differ by whole points. They are named modes, belong
to the extractor's identity and are never mixed. For output pixel i, with r = n_in / n_out:

(1)  "legacy", the original graph and ADM's evaluator: linear between the two pixels around i r,
     the last one repeated, without half-pixel centres and without antialiasing.
(2)  "clean", clean-fid (Parmar et al. 2022), Pillow's bicubic filter on floats: the pixels j
     within two widths have the weights w((j + 1/2 - (i + 1/2) r) / max(r, 1)), normalised, where
     w(x) is cubic with a = -1/2; the result is clipped to [0, 255] and not rounded.
(3)  "pytorch_fid", that package's: linear between the two pixels around (i + 1/2) r - 1/2, border
     pixels repeated, without antialiasing.

All are products with one matrix per axis. The network's input is (x - 128) / 128, but with (3)
x / 127.5 - 1.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.evaluation.features.extractor import Features, extract_in_batches
from cascaded_diffusion.evaluation.features.inception_weights import InceptionWeights, load_weights
from cascaded_diffusion.networks.inception import IMAGE_SIZE, Inception
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.types import Params


def legacy_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Eq. (1): [size_out, size_in] float32, rows sum to 1."""
    source = np.minimum(np.arange(size_out) * (size_in / size_out), size_in - 1)
    distance = np.abs(source[:, None] - np.arange(size_in))
    return np.clip(1 - distance, 0, None).astype(np.float32)


def clean_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Eq. (2), before clipping: [size_out, size_in] float32, rows sum to 1."""
    ratio = size_in / size_out
    width = max(ratio, 1.0)
    centre = (np.arange(size_out) + 0.5)[:, None] * ratio
    pixel = np.arange(size_in)
    x = np.abs((pixel + 0.5 - centre) / width)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    first, last = (np.trunc(centre + side * 2 * width + 0.5) for side in (-1, 1))
    weights = np.where((x < 2) & (pixel >= first) & (pixel < last), weights, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def pytorch_fid_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Eq. (3): [size_out, size_in] float32, rows sum to 1."""
    source = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    source = np.clip(source, 0, size_in - 1)
    distance = np.abs(source[:, None] - np.arange(size_in))
    return np.clip(1 - distance, 0, None).astype(np.float32)


RESIZES = {
    "legacy": legacy_matrix,
    "clean": clean_matrix,
    "pytorch_fid": pytorch_fid_matrix,
}


def at_inception_size(images: jax.Array, mode: str) -> jax.Array:
    """uint8 [B, H, W, C], C of 1 or 3 -> float32 [B, 299, 299, 3] in [0, 255]."""
    rows, columns = (RESIZES[mode](size, IMAGE_SIZE) for size in images.shape[1:3])
    pixels = images.astype(jnp.float32)
    x = jnp.einsum("ih,bhwc,jw->bijc", rows, pixels, columns, precision=jax.lax.Precision.HIGHEST)
    # Cubic weights overshoot at edges; linear ones do not.
    x = jnp.clip(x, 0.0, 255.0)
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def check_precision(program: str) -> None:
    """Raises RuntimeError unless all products of a StableHLO text are at the highest precision."""
    operations = re.findall(r"stablehlo\.(?:convolution|dot_general).*", program)
    low = [line for line in operations if line.count("HIGHEST") < 2]
    if low or not operations:
        found = f"{len(low)} of {len(operations)} products of the Inception program"
        raise RuntimeError(f"{found} are not at the highest precision")


@dataclasses.dataclass(frozen=True)
class InceptionExtractor:
    """uint8 images [n, H, W, 1 or 3] of any n -> `Features`, batch by batch.

    The logits lack the last layer's bias, as in published scores. `resize` is of `RESIZES`.
    """

    weights: InceptionWeights
    resize: str
    mesh: Mesh
    batch_size: int = 64
    name: str = "inception"
    _resizes: dict[tuple[int, ...], jax.stages.Compiled] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Network, resizing and weights."""
        return f"inception-2015-12-05:{self.resize}:{self.weights.sha256[:12]}"

    def __call__(self, images: np.ndarray) -> Features:
        shape = (self._size, *images.shape[1:])
        if shape not in self._resizes:
            self._resizes[shape] = self._compiled(self._resized, shape, jnp.uint8)
        resize, network = self._resizes[shape], partial(self._network, self._variables)
        return extract_in_batches(images, self._size, self.mesh, lambda x: network(resize(x)))

    @property
    def _size(self) -> int:
        return -(-self.batch_size // self.mesh.size) * self.mesh.size

    @functools.cached_property
    def _variables(self) -> Params:
        variables = {"params": dict(self.weights.params)}
        return jax.device_put(variables, mesh_lib.replicated(self.mesh))

    def _resized(self, images: jax.Array) -> jax.Array:
        x = at_inception_size(images, self.resize)
        return x / 127.5 - 1.0 if self.resize == "pytorch_fid" else (x - 128.0) / 128.0

    @functools.cached_property
    def _network(self) -> jax.stages.Compiled:
        # A program of its own, so that the cache of programs has it for images of every size.
        shape = (self._size, IMAGE_SIZE, IMAGE_SIZE, 3)
        return self._compiled(Inception().apply, shape, jnp.float32, self._variables)

    def _compiled(
        self, f: Callable, shape: tuple[int, ...], dtype: jnp.dtype, *variables: Params
    ) -> jax.stages.Compiled:
        split = mesh_lib.batch_sharding(self.mesh)
        batch = jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        lowered = jax.jit(f, out_shardings=split).lower(*variables, batch)
        check_precision(lowered.as_text())
        return lowered.compile()


def load_inception(
    weights: str | None = None,
    *,
    resize: str,
    mesh: Mesh | None = None,
    allow_other_weights: bool = False,
) -> InceptionExtractor:
    """The extractor of FID, by default on all devices of this process.

    `weights` is the path of a file, by default the cached ones, else a download; it may be another
    than the public one if `allow_other_weights`. Raises UserError as `load_weights`.
    """
    mesh = mesh or mesh_lib.build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    loaded = load_weights(weights, allow_other=allow_other_weights)
    return InceptionExtractor(loaded, resize, mesh)
