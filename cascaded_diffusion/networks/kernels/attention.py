r"""Multi-head softmax attention, computed as suits the platform.

Per head, with the pixels' queries, keys and values q, k, v [N, C]:

(1)  y = p v,  p = w / t,  w = exp(s - max s),  t = sum w,  s = q k^T / sqrt(C)

with the maximum and the sum over a row. The gradient, with g = dL/dy / t:

(2)  dv = w^T g,   ds = w * (g v^T - sum g y),   dq = ds k / sqrt(C),   dk = ds^T q / sqrt(C)

With 1,024 pixels, w of all heads is larger than everything else that a TPU would keep for the
backward pass. Splash attention (in Pallas) holds one block of it at a time and computes it again.

XLA's CPU back end is fast at matrix products, but it reduces a row one number at a time and
reads a transposed factor with strides. Hence on a CPU heads are a batch of matrices, reductions
combine slices, and the small factors are transposed rather than the scores.
"""

import logging
import math
from collections.abc import Callable
from functools import cache, partial, reduce

import jax
import jax.numpy as jnp

from cascaded_diffusion.networks.kernels.platforms import for_platform
from cascaded_diffusion.types import PerDevice

# cuDNN's fused attention takes heads of at most this many channels, a multiple of 8; on GPUs before
# Hopper half of it.
_MAX_CUDNN_CHANNELS, _HOPPER = 256, (9, 0)
# Numbers side by side in a reduction.
_SLICE = 32
# A TPU attends block by block from this many pixels on, in blocks of this size. Not measured.
_MIN_SPLASH_PIXELS, _SPLASH_BLOCK = 1024, 512

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, per_device: PerDevice | None = None
) -> jax.Array:
    """Eq. (1), all [B, N, heads, channels of a head].

    XLA cannot divide splash attention among devices: it is used only with `per_device`, see
    `Execution`, on many pixels in bfloat16.
    """
    n = q.shape[1]
    large = n >= _MIN_SPLASH_PIXELS and n % _SPLASH_BLOCK == 0
    by_blocks = per_device is not None and q.dtype == jnp.bfloat16 and large
    by_xla = partial(jax.nn.dot_product_attention, implementation="xla")
    kernel = for_platform(
        cpu=_by_heads,
        gpu=_on_gpu,
        tpu=per_device(splash) if by_blocks else by_xla,
        default=by_xla,
    )
    return kernel(q, k, v)


def _on_gpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    kernel = "cudnn" if _cudnn_takes(q.shape[-1], q.dtype) else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=kernel)


@cache
def _cudnn_takes(channels: int, dtype: jnp.dtype) -> bool:
    """Whether the GPU's fused attention takes such heads; if not, says so, once."""
    most = _max_cudnn_channels()
    if dtype in (jnp.bfloat16, jnp.float16) and channels <= most and channels % 8 == 0:
        return True
    wanted = f"16 bits and a multiple of 8, at most {most}" if most else "an NVIDIA GPU"
    if jax.default_backend() == "gpu":
        logging.getLogger(__name__).warning(
            "attention of heads of %d channels in %s is computed by XLA: cuDNN's takes %s",
            *(channels, dtype, wanted),
        )
    return False


def _max_cudnn_channels() -> int:
    """The most channels of a head on all of this process's GPUs; 0 if they are not NVIDIA's."""
    gpus = [d for d in jax.local_devices() if d.platform == "gpu"]
    if any("cuda" not in d.client.platform_version for d in gpus):
        return 0
    capabilities = [tuple(map(int, d.compute_capability.split("."))) for d in gpus]
    old = not gpus or min(capabilities) < _HOPPER
    return _MAX_CUDNN_CHANNELS // 2 if old else _MAX_CUDNN_CHANNELS


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Eq. (1) by JAX's Pallas kernel for TPUs; `interpret` runs it anywhere, slowly."""
    # Pallas takes a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, n, heads, channels = q.shape
    block = min(n, _SPLASH_BLOCK)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.FullMask((n, n))] * heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(names, block)),
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) * channels**-0.5).astype(q.dtype)
    rows = (x.swapaxes(1, 2) for x in (scaled, k, v))
    return jax.vmap(kernel)(*rows).swapaxes(1, 2)


def _rows(x: jax.Array) -> jax.Array:
    """[B, N, heads, C] -> [B * heads, N, C]."""
    b, n, heads, c = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * heads, n, c)


def _columns(x: jax.Array) -> jax.Array:
    """[B, N, heads, C] -> [B * heads, C, N]."""
    b, n, heads, c = x.shape
    return x.transpose(0, 2, 3, 1).reshape(b * heads, c, n)


def _from_rows(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_rows`."""
    b, n, c = x.shape
    return x.reshape(b // heads, heads, n, c).transpose(0, 2, 1, 3)


def _from_columns(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_columns`."""
    b, c, n = x.shape
    return x.reshape(b // heads, heads, c, n).transpose(0, 3, 1, 2)


def _by_slices(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[..., N] -> [..., at most _SLICE], all slices combined."""
    width = math.gcd(x.shape[-1], _SLICE)
    return reduce(combine, [x[..., i : i + width] for i in range(0, x.shape[-1], width)])


@jax.custom_vjp
def _by_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Eq. (1) for a CPU."""
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y, weights, total = _attended(q, k, v)
    return y, (q, k, v, weights, total, y)


@partial(jax.jit, inline=True)
def _attended(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads, c = q.shape[2:]
    # 1/sqrt(C) is applied to float32 numbers: in bfloat16, q would be rounded once more.
    scores = _product("btc,bcs->bts", _rows(q), _columns(k))
    largest = _by_slices(jnp.maximum, scores).max(-1, keepdims=True)
    weights = jnp.exp((scores - largest) * c**-0.5).astype(v.dtype)
    total = _by_slices(jnp.add, weights.astype(jnp.float32)).sum(-1, keepdims=True)
    y = _product("bts,bsc->btc", weights, _rows(v)) / total
    y, total = _from_rows(y, heads).astype(v.dtype), _from_rows(total, heads)
    return y, weights, total


@partial(jax.jit, inline=True)
def _backward(
    saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, weights, total, y = saved
    heads, c = q.shape[2:]
    g = dy.astype(jnp.float32) / total
    shift = _rows((g * y).sum(-1, keepdims=True))
    g = g.astype(v.dtype)
    dv = _product("bct,bts->bcs", _columns(g), weights)
    dscores = weights * (_product("btc,bcs->bts", _rows(g), _columns(v)) - shift)
    dscores = dscores.astype(q.dtype)
    dq = _product("bts,bsc->btc", dscores, _rows(k)) * c**-0.5
    dk = _product("bct,bts->bcs", _columns(q), dscores) * c**-0.5
    dq, dk, dv = _from_rows(dq, heads), _from_columns(dk, heads), _from_columns(dv, heads)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_by_heads.defvjp(_forward, _backward)
