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

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMAGE_SIZE = 299
_BATCH_NORM_EPSILON = 1e-3
_HIGHEST = jax.lax.Precision.HIGHEST
_ONE_PIXEL = ((1, 1), (1, 1))  # of padding on each side


def _unit(
    name: str,
    x: jax.Array,
    channels: int,
    kernel: tuple[int, int] = (1, 1),
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> jax.Array:
    """Eq. (1), folded."""
    conv = nn.Conv(channels, kernel, stride, padding, precision=_HIGHEST, name=name)
    return nn.relu(conv(x))


def _chain(name: str, x: jax.Array, *units: tuple[int, tuple[int, int]]) -> jax.Array:
    """Units name_1, name_2, ... of these channels and kernels."""
    for i, (channels, kernel) in enumerate(units, start=1):
        x = _unit(f"{name}_{i}", x, channels, kernel)
    return x


def _halving(name: str, x: jax.Array, channels: int) -> jax.Array:
    return _unit(name, x, channels, (3, 3), stride=2, padding="VALID")


def _halved(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), padding=_ONE_PIXEL, count_include_pad=False)


def _joined(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def _block_e(name: str, x: jax.Array, pooled: jax.Array) -> jax.Array:
    single = _unit(f"{name}.branch3x3_1", x, 384)
    double = _chain(f"{name}.branch3x3dbl", x, (448, (1, 1)), (384, (3, 3)))
    return _joined(
        _unit(f"{name}.branch1x1", x, 320),
        _unit(f"{name}.branch3x3_2a", single, 384, (1, 3)),
        _unit(f"{name}.branch3x3_2b", single, 384, (3, 1)),
        _unit(f"{name}.branch3x3dbl_3a", double, 384, (1, 3)),
        _unit(f"{name}.branch3x3dbl_3b", double, 384, (3, 1)),
        _unit(f"{name}.branch_pool", pooled, 192),
    )


class Inception(nn.Module):
    """The network, on images [B, 299, 299, 3] float32, (pixel - 128) / 128.

    Returns pooled features [B, 2048] for FID; logits [B, 1008] without the last bias, which the
    published inception scores leave out; and spatial features [B, 2023] for ADM's sFID, the
    first seven channels of a layer at 17 x 17.
    """

    @nn.compact
    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = _halving("Conv2d_1a_3x3", image, 32)
        x = _unit("Conv2d_2a_3x3", x, 32, (3, 3), padding="VALID")
        x = _halved(_unit("Conv2d_2b_3x3", x, 64, (3, 3)))
        x = _unit("Conv2d_3b_1x1", x, 80)
        x = _halved(_unit("Conv2d_4a_3x3", x, 192, (3, 3), padding="VALID"))
        for block, pool in {"Mixed_5b": 32, "Mixed_5c": 64, "Mixed_5d": 64}.items():
            x = _joined(
                _unit(f"{block}.branch1x1", x, 64),
                _chain(f"{block}.branch5x5", x, (48, (1, 1)), (64, (5, 5))),
                _chain(f"{block}.branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
                _unit(f"{block}.branch_pool", _average(x), pool),
            )
        double = _chain("Mixed_6a.branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)))
        x = _joined(
            _halving("Mixed_6a.branch3x3", x, 384),
            _halving("Mixed_6a.branch3x3dbl_3", double, 96),
            _halved(x),
        )
        row, column = (1, 7), (7, 1)
        widths = {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}
        for block, n in widths.items():
            first = _unit(f"{block}.branch1x1", x, 192)
            if block == "Mixed_6d":
                spatial = first[..., :7].reshape(len(x), -1)
            double = ((n, (1, 1)), (n, column), (n, row), (n, column), (192, row))
            x = _joined(
                first,
                _chain(f"{block}.branch7x7", x, (n, (1, 1)), (n, row), (192, column)),
                _chain(f"{block}.branch7x7dbl", x, *double),
                _unit(f"{block}.branch_pool", _average(x), 192),
            )
        single = _chain("Mixed_7a.branch3x3", x, (192, (1, 1)))
        wide = _chain("Mixed_7a.branch7x7x3", x, (192, (1, 1)), (192, row), (192, column))
        x = _joined(
            _halving("Mixed_7a.branch3x3_2", single, 320),
            _halving("Mixed_7a.branch7x7x3_4", wide, 192),
            _halved(x),
        )
        x = _block_e("Mixed_7b", x, _average(x))
        x = _block_e("Mixed_7c", x, nn.max_pool(x, (3, 3), padding=_ONE_PIXEL))
        pooled = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, precision=_HIGHEST, name="fc")(pooled)
        return pooled, logits, spatial


@functools.cache
def kernel_shapes() -> Mapping[str, tuple[int, ...]]:
    """Layer -> [h, w, in, out], of "fc" [in, out]. Every layer has a bias [out] beside it."""
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    params = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    return {name: layer["kernel"].shape for name, layer in params.items()}


def checkpoint_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of the public checkpoint, in its order: name -> (dtype, shape)."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (*size, channels_in, channels_out) in kernel_shapes().items():
        layer = "fc" if name == "fc" else f"{name}.conv"
        tensors[f"{layer}.weight"] = ("float32", (channels_out, channels_in, *size))
        if name == "fc":
            tensors["fc.bias"] = ("float32", (channels_out,))
            continue
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.bn.{part}"] = ("float32", (channels_out,))
        tensors[f"{name}.bn.num_batches_tracked"] = ("int64", ())
    return dict(sorted(tensors.items()))


def params_from_checkpoint(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Folds batch normalization into the convolutions, eq. (1), in float64; float32 out."""
    params = {"fc": {"kernel": tensors["fc.weight"].T, "bias": tensors["fc.bias"]}}
    for name in kernel_shapes().keys() - {"fc"}:
        gamma, beta, mean, variance = (
            tensors[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + _BATCH_NORM_EPSILON)
        kernel = tensors[f"{name}.conv.weight"].astype(np.float64).transpose(2, 3, 1, 0)
        params[name] = {
            "kernel": (kernel * scale).astype(np.float32),
            "bias": (beta - mean * scale).astype(np.float32),
        }
    return params
