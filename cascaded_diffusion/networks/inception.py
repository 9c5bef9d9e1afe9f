r"""Inception v3 of 2015-12-05, whose features define FID.

It is not the Inception v3 of today's model collections. A unit is

(1)  relu(conv(x) * scale + shift),   scale = gamma / sqrt(variance + 0.001),
                                      shift = beta - mean * scale

a convolution without bias and a batch normalization at inference; when weights are loaded, the
scale is folded into the convolution's kernel in float64. It differs from other versions in that
average pooling does not count the padding, the last block, Mixed_7c, pools its branch by the
maximum, and there are 1008 logits.

Everything is computed in float32 at the highest precision: by default, accelerators round the
inputs of convolutions to fewer bits, which changes an FID.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

IMAGE_SIZE = 299
NUM_LOGITS = 1008
NUM_FEATURES = 2048
BATCH_NORM_EPSILON = 1e-3

# name -> {"kernel": [h, w, in, out], "bias": [out]}; the kernel of "fc" is [in, out].
InceptionParams = Mapping[str, Mapping[str, jax.Array]]

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Unit:
    """One convolution, eq. (1). `padding` are the rows and columns of zeros on each side."""

    channels_in: int
    channels_out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)


def _block_a(name: str, channels: int, pool: int) -> dict[str, Unit]:
    return {
        f"{name}.branch1x1": Unit(channels, 64),
        f"{name}.branch5x5_1": Unit(channels, 48),
        f"{name}.branch5x5_2": Unit(48, 64, (5, 5), padding=(2, 2)),
        f"{name}.branch3x3dbl_1": Unit(channels, 64),
        f"{name}.branch3x3dbl_2": Unit(64, 96, (3, 3), padding=(1, 1)),
        f"{name}.branch3x3dbl_3": Unit(96, 96, (3, 3), padding=(1, 1)),
        f"{name}.branch_pool": Unit(channels, pool),
    }


def _block_c(name: str, inner: int) -> dict[str, Unit]:
    row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
    return {
        f"{name}.branch1x1": Unit(768, 192),
        f"{name}.branch7x7_1": Unit(768, inner),
        f"{name}.branch7x7_2": Unit(inner, inner, **row),
        f"{name}.branch7x7_3": Unit(inner, 192, **column),
        f"{name}.branch7x7dbl_1": Unit(768, inner),
        f"{name}.branch7x7dbl_2": Unit(inner, inner, **column),
        f"{name}.branch7x7dbl_3": Unit(inner, inner, **row),
        f"{name}.branch7x7dbl_4": Unit(inner, inner, **column),
        f"{name}.branch7x7dbl_5": Unit(inner, 192, **row),
        f"{name}.branch_pool": Unit(768, 192),
    }


def _block_e(name: str, channels: int) -> dict[str, Unit]:
    row, column = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
    return {
        f"{name}.branch1x1": Unit(channels, 320),
        f"{name}.branch3x3_1": Unit(channels, 384),
        f"{name}.branch3x3_2a": Unit(384, 384, **row),
        f"{name}.branch3x3_2b": Unit(384, 384, **column),
        f"{name}.branch3x3dbl_1": Unit(channels, 448),
        f"{name}.branch3x3dbl_2": Unit(448, 384, (3, 3), padding=(1, 1)),
        f"{name}.branch3x3dbl_3a": Unit(384, 384, **row),
        f"{name}.branch3x3dbl_3b": Unit(384, 384, **column),
        f"{name}.branch_pool": Unit(channels, 192),
    }


UNITS: dict[str, Unit] = {
    "Conv2d_1a_3x3": Unit(3, 32, (3, 3), stride=2),
    "Conv2d_2a_3x3": Unit(32, 32, (3, 3)),
    "Conv2d_2b_3x3": Unit(32, 64, (3, 3), padding=(1, 1)),
    "Conv2d_3b_1x1": Unit(64, 80),
    "Conv2d_4a_3x3": Unit(80, 192, (3, 3)),
    **_block_a("Mixed_5b", 192, 32),
    **_block_a("Mixed_5c", 256, 64),
    **_block_a("Mixed_5d", 288, 64),
    "Mixed_6a.branch3x3": Unit(288, 384, (3, 3), stride=2),
    "Mixed_6a.branch3x3dbl_1": Unit(288, 64),
    "Mixed_6a.branch3x3dbl_2": Unit(64, 96, (3, 3), padding=(1, 1)),
    "Mixed_6a.branch3x3dbl_3": Unit(96, 96, (3, 3), stride=2),
    **_block_c("Mixed_6b", 128),
    **_block_c("Mixed_6c", 160),
    **_block_c("Mixed_6d", 160),
    **_block_c("Mixed_6e", 192),
    "Mixed_7a.branch3x3_1": Unit(768, 192),
    "Mixed_7a.branch3x3_2": Unit(192, 320, (3, 3), stride=2),
    "Mixed_7a.branch7x7x3_1": Unit(768, 192),
    "Mixed_7a.branch7x7x3_2": Unit(192, 192, (1, 7), padding=(0, 3)),
    "Mixed_7a.branch7x7x3_3": Unit(192, 192, (7, 1), padding=(3, 0)),
    "Mixed_7a.branch7x7x3_4": Unit(192, 192, (3, 3), stride=2),
    **_block_e("Mixed_7b", 1280),
    **_block_e("Mixed_7c", 2048),
}


def checkpoint_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of the public checkpoint, in its order: name -> (dtype, shape)."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, unit in UNITS.items():
        kernel = (unit.channels_out, unit.channels_in, *unit.kernel)
        tensors[f"{name}.conv.weight"] = ("float32", kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.bn.{part}"] = ("float32", (unit.channels_out,))
        tensors[f"{name}.bn.num_batches_tracked"] = ("int64", ())
    tensors["fc.weight"] = ("float32", (NUM_LOGITS, NUM_FEATURES))
    tensors["fc.bias"] = ("float32", (NUM_LOGITS,))
    return dict(sorted(tensors.items()))


def params_from_checkpoint(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Folds batch normalization into the convolutions, eq. (1), in float64; float32 out."""
    params = {}
    for name in UNITS:
        gamma, beta, mean, variance = (
            np.asarray(tensors[f"{name}.bn.{part}"], np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
        kernel = np.asarray(tensors[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0)
        params[name] = {
            "kernel": (kernel * scale).astype(np.float32),
            "bias": (beta - mean * scale).astype(np.float32),
        }
    kernel = np.asarray(tensors["fc.weight"], np.float32).T
    params["fc"] = {"kernel": kernel, "bias": np.asarray(tensors["fc.bias"], np.float32)}
    return params


def _pool(x: jax.Array, *, kind: str, stride: int, padding: int) -> jax.Array:
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    if kind == "max":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, pads)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, pads)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    # The padding does not count.
    return total / jax.lax.reduce_window(ones, 0.0, jax.lax.add, window, strides, pads)


def apply_inception(
    params: InceptionParams, image: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the network.

    Args:
      params: from `params_from_checkpoint`.
      image: [B, 299, 299, 3] float32, (pixel - 128) / 128.

    Returns:
      Pooled features [B, 2048] for FID; logits [B, 1008] without the last bias, which the
      published inception scores leave out; and spatial features [B, 2023] for ADM's sFID, the
      first seven channels of a layer at 17 x 17.
    """

    def unit(name: str, x: jax.Array) -> jax.Array:
        spec = UNITS[name]
        y = jax.lax.conv_general_dilated(
            x,
            params[name]["kernel"],
            window_strides=(spec.stride, spec.stride),
            padding=[(p, p) for p in spec.padding],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_HIGHEST,
        )
        return jax.nn.relu(y + params[name]["bias"])

    def chain(block: str, x: jax.Array, *names: str) -> jax.Array:
        for name in names:
            x = unit(f"{block}.{name}", x)
        return x

    def joined(*branches: jax.Array) -> jax.Array:
        return jnp.concatenate(branches, axis=-1)

    def average(x: jax.Array) -> jax.Array:
        return _pool(x, kind="average", stride=1, padding=1)

    def halved(x: jax.Array) -> jax.Array:
        return _pool(x, kind="max", stride=2, padding=0)

    def numbered(stem: str, count: int) -> list[str]:
        return [f"{stem}_{i}" for i in range(1, count + 1)]

    def block_e(block: str, x: jax.Array, pooled: jax.Array) -> jax.Array:
        single = chain(block, x, "branch3x3_1")
        double = chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
        return joined(
            chain(block, x, "branch1x1"),
            chain(block, single, "branch3x3_2a"),
            chain(block, single, "branch3x3_2b"),
            chain(block, double, "branch3x3dbl_3a"),
            chain(block, double, "branch3x3dbl_3b"),
            chain(block, pooled, "branch_pool"),
        )

    x = image
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        x = unit(name, x)
    x = halved(x)
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = unit(name, x)
    x = halved(x)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = joined(
            chain(block, x, "branch1x1"),
            chain(block, x, *numbered("branch5x5", 2)),
            chain(block, x, *numbered("branch3x3dbl", 3)),
            chain(block, average(x), "branch_pool"),
        )
    x = joined(
        chain("Mixed_6a", x, "branch3x3"),
        chain("Mixed_6a", x, *numbered("branch3x3dbl", 3)),
        halved(x),
    )
    spatial = None
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        first = chain(block, x, "branch1x1")
        if block == "Mixed_6d":
            spatial = first[..., :7].reshape(len(x), -1)
        x = joined(
            first,
            chain(block, x, *numbered("branch7x7", 3)),
            chain(block, x, *numbered("branch7x7dbl", 5)),
            chain(block, average(x), "branch_pool"),
        )
    x = joined(
        chain("Mixed_7a", x, *numbered("branch3x3", 2)),
        chain("Mixed_7a", x, *numbered("branch7x7x3", 4)),
        halved(x),
    )
    x = block_e("Mixed_7b", x, average(x))
    x = block_e("Mixed_7c", x, _pool(x, kind="max", stride=1, padding=1))
    pooled = x.mean((1, 2))
    logits = jnp.dot(pooled, params["fc"]["kernel"], precision=_HIGHEST)
    return pooled, logits, spatial
