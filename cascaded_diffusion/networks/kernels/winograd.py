r"""3x3 convolutions with a quarter of the multiplications, for CPUs: Winograd's minimal filtering.

Four neighbouring outputs of a filter with three taps need six products instead of twelve,
F(4, 3) of Lavin & Gray 2016 (arXiv 1509.09308); 4x4 outputs of a 3x3 filter need 36 instead of
144. With 6x6 neighbouring numbers d, 3x3 taps g and 4x4 outputs Y:

(1)  Y = A^T [(G g G^T) * (B^T d B)] A

A convolution [B, H, W, C] -> [B, H, W, K] cuts each image into tiles d that overlap by two.
Summed over C, the product * becomes 36 matrix products, one for each of the 36 numbers:
[tiles, C] times [C, K]. The gradients, for dy = dL/dY:

(2)  dx: the same of dy, with the kernel turned by 180 degrees and C and K exchanged
(3)  dg = G^T [sum over tiles of (B^T d B) * (A dy A^T)] G,   * of every C with every K

The matrices come from six points (Cook & Toom), one of them at infinity: A^T has their powers,
a row of B^T the coefficients of a polynomial that vanishes at all but one of them, and G the
powers again, divided by the polynomial's value there. The points 0, +-3/4, +-3/2, whose powers
are exact in binary, lose a quarter of the digits that the usual 0, +-1, +-2 lose: up to 2e-5 of
the result's deviation in float32, three to six times what the direct sum loses.

XLA's CPU back end computes convolutions directly, at the speed of its matrix products, so only
fewer products are faster. It also computes elementwise expressions again wherever they are used,
here both sides of B^T d B for each of 36 numbers, but keeps the result of a matrix product. Hence
one side is a `_product`, the other `_weighted`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.networks.kernels.convolution import direct
from cascaded_diffusion.networks.kernels.platforms import for_platform

_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity
# Outputs and taps of a filter, and numbers of a tile, along one axis.
_OUTPUTS, _TAPS = 4, 3
_NUMBERS = _OUTPUTS + _TAPS - 1


def _others(point: float) -> list[float]:
    return [other for other in _POINTS if other != point]


def _powers(count: int) -> np.ndarray:
    """[points, count]: powers from 0 on; the point at infinity has only the highest."""
    return np.vstack([np.vander(_POINTS, count, increasing=True), np.eye(count)[-1]])


A_T = _powers(_OUTPUTS).T.astype(np.float32)
G = _powers(_TAPS)
G[:-1] /= [[np.prod([p - other for other in _others(p)])] for p in _POINTS]
G = G.astype(np.float32)
# Lowest power first; the polynomials of finite points have one degree less.
B_T = np.array(
    [[*np.poly(_others(p))[::-1], 0.0] for p in _POINTS] + [np.poly(_POINTS)[::-1]], np.float32
)
# For both axes at once: G g G^T, flattened.
_G_BOTH = np.kron(G, G)

# With fewer channels or pixels, the sums cost more than the products save.
_MIN_CHANNELS = 64
_MIN_SIZE = 8


def pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `convolve` pays: float32, whole tiles, many channels."""
    sizes = x.shape[1:3]
    return (
        x.dtype == jnp.float32
        and all(size % _OUTPUTS == 0 and size >= _MIN_SIZE for size in sizes)
        and min(kernel.shape[2:]) >= _MIN_CHANNELS
    )


def _product(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """`matrix` [m, n] times x [n, ...] -> [m, ...]."""
    return (matrix @ x.reshape(len(x), -1)).reshape(len(matrix), *x.shape[1:])


def _weighted(matrix: np.ndarray, parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """`matrix` [m, n] times n `parts` -> [..., m, ...], m being the new `axis`."""
    shape = [-1 if i == axis else 1 for i in range(parts[0].ndim + 1)]
    columns = (column.reshape(shape) for column in matrix.T)
    return sum(c * jnp.expand_dims(p, axis) for c, p in zip(columns, parts, strict=True))


def _tiles(x: jax.Array) -> jax.Array:
    """B^T d B: [B, H, W, C] -> [36, tiles, C]."""
    _, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = [x[:, i : i + h - _TAPS : _OUTPUTS] for i in range(_NUMBERS)]
    rows = _product(B_T, jnp.stack(rows))
    columns = [rows[:, :, :, i : i + w - _TAPS : _OUTPUTS] for i in range(_NUMBERS)]
    return _weighted(B_T, columns, 1).reshape(_NUMBERS**2, -1, c)


def _spread(dy: jax.Array) -> jax.Array:
    """A dy A^T: [B, H, W, K] -> [36, tiles, K]."""
    b, h, w, k = dy.shape
    dy = dy.reshape(b, h // _OUTPUTS, _OUTPUTS, w // _OUTPUTS, _OUTPUTS, k)
    outputs = range(_OUTPUTS)
    columns = [_weighted(A_T.T, [dy[:, :, i, :, j] for j in outputs], 0) for i in outputs]
    return _weighted(A_T.T, columns, 0).reshape(_NUMBERS**2, -1, k)


def _filtered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Eq. (1)."""
    b, h, w, _ = x.shape
    kernels = _product(_G_BOTH, kernel.reshape(_TAPS**2, *kernel.shape[2:]))
    products = jnp.einsum("inc,ick->ink", _tiles(x), kernels)
    k = products.shape[-1]
    products = products.reshape(_NUMBERS, _NUMBERS, b, h // _OUTPUTS, w // _OUTPUTS, k)
    # [4, 6, B, H/4, W/4, K] -> six of [B, H/4, 4, W/4, K] -> [B, H/4, 4, W/4, 4, K]
    rows = jnp.moveaxis(_product(A_T, products), 0, 3)
    return _weighted(A_T, list(rows), 4).reshape(b, h, w, k)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Eq. (3)."""
    sums = jnp.einsum("inc,ink->ick", _tiles(x), _spread(dy))
    return _product(_G_BOTH.T, sums).reshape(_TAPS, _TAPS, *sums.shape[1:])


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1 and padding 1: on a CPU by (1) to (3), else `direct`.

    [B, H, W, C] and [3, 3, C, K] -> [B, H, W, K], all float32; H and W are multiples of 4.
    """
    return for_platform(cpu=_filtered, default=direct)(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel), (x, kernel)


def _gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _filtered(dy, turned), _kernel_gradient(x, dy)


def _direct_gradients(
    x: jax.Array, kernel: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (dx,) = jax.linear_transpose(lambda x: direct(x, kernel), x)(dy)
    (dkernel,) = jax.linear_transpose(lambda kernel: direct(x, kernel), kernel)(dy)
    return dx, dkernel


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return for_platform(cpu=_gradients, default=_direct_gradients)(*saved, dy)


convolve.defvjp(_forward, _backward)
