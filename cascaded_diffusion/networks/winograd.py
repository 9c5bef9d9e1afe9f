r"""3x3 convolutions with half the multiplications, for CPUs: Winograd's minimal filtering.

Four neighbouring outputs of a filter with three taps need six products instead of twelve,
F(4, 3) of Lavin & Gray 2016 (arXiv 1509.09308), here along a row of pixels. With d six
neighbouring numbers of a row, g three taps, y four outputs:

(1)  y = A^T [(G g) * (B^T d)]

A convolution [B, H, W, C] -> [B, H, W, K] cuts each row into W/4 tiles d that overlap by
two. Summed over C and the three rows of the kernel, the product * becomes six convolutions
3x1, one for each of the six numbers. From them the gradients, for dy = dL/dy:

(2)  dx: the same of dy, with the kernel turned by 180 degrees and C and K exchanged
(3)  dg = G^T [sum over tiles and rows of (B^T d) (A dy)^T]

Up to 1e-5 of the result's deviation is lost to rounding in float32, some three times what the
direct sum loses. XLA's CPU back end computes convolutions directly, at the speed of its
matrix products, so that only fewer of them are faster; other back ends have their own ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
B_T = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
A_T = np.array(
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ],
    np.float32,
)
OUTPUTS, NUMBERS = A_T.shape

# With fewer channels or pixels what is saved in products is lost in sums.
_MIN_CHANNELS = 64
_MIN_WIDTH = 8


def direct(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """[B, H, W, C] and [3, 3 or 1, C, K] -> [B, H, W, K], padding 1 along axes of 3, by XLA."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `convolve` is for these: float32, rows of whole tiles, many channels."""
    return (
        x.dtype == jnp.float32
        and x.shape[2] % OUTPUTS == 0
        and x.shape[2] >= _MIN_WIDTH
        and min(kernel.shape[2:]) >= _MIN_CHANNELS
    )


def _combined(rows: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """The matrix `rows` times `parts`, zeros left out."""
    products = (zip(row, parts, strict=True) for row in rows)
    return [
        sum(part if number == 1 else number * part for number, part in row if number)
        for row in products
    ]


def _tiles(x: jax.Array) -> list[jax.Array]:
    """B^T d: six of [B, H, W/4, C]."""
    stop = x.shape[2] - OUTPUTS + 1
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    return _combined(B_T, [x[:, :, j : j + stop : OUTPUTS] for j in range(NUMBERS)])


def _filtered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Eq. (1)."""
    b, h, w, _ = x.shape
    kernels = _combined(G, [kernel[:, j] for j in range(3)])
    products = [direct(d, g[:, None]) for d, g in zip(_tiles(x), kernels, strict=True)]
    return jnp.stack(_combined(A_T, products), axis=3).reshape(b, h, w, kernel.shape[-1])


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Eq. (3): matrix products of x [pixels, C] with three rows of dy side by side."""
    h, c, k = x.shape[1], x.shape[-1], dy.shape[-1]
    gradients = []
    dy = jnp.pad(dy, ((0, 0), (1, 1), (0, 0), (0, 0)))
    dy = jnp.concatenate([dy[:, 2 - i : 2 - i + h] for i in range(3)], axis=-1)
    spread = _combined(A_T.T, [dy[:, :, i::OUTPUTS] for i in range(OUTPUTS)])
    for d, e in zip(_tiles(x), spread, strict=True):
        product = jnp.einsum("nc,nk->ck", d.reshape(-1, c), e.reshape(-1, 3 * k))
        gradients.append(product.reshape(c, 3, k).swapaxes(0, 1))
    return jnp.stack(_combined(G.T, gradients), axis=1)


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1, padding 1: on a CPU by (1) to (3), else `direct`.

    Args:
      x: [B, H, W, C] float32, W a multiple of 4.
      kernel: [3, 3, C, K] float32.

    Returns:
      [B, H, W, K] float32.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_filtered, default=direct)


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
    return jax.lax.platform_dependent(*saved, dy, cpu=_gradients, default=_direct_gradients)


convolve.defvjp(_forward, _backward)
