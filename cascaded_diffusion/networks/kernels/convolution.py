"""3x3 convolutions as sums, with gradients that a CPU computes fast wherever they stand.

For y = x * g with padding 1 and a stride of 1 or 2, and dy = dL/dy, where the second factor of a
`*` is the kernel:

(1)  dx = dy * g', the stride's zeros put between the pixels of dy; g' is g turned by 180 degrees,
     with C and K exchanged
(2)  dg = x' * dy', the stride's zeros put between the pixels of dy'; the examples of x' are the
     channels of x and its channels are examples, and dy' is a kernel of dy's height and width

XLA's CPU back end has a fast routine for convolutions of [B, H, W, C] with [h, w, C, K]. Gradients
as JAX derives them name their axes in other orders. XLA rewrites those, but not inside of loops,
such as the one over the parts of a batch, where the slow way takes up to a hundred times as long.
"""

from functools import partial

import jax

from cascaded_diffusion.networks.kernels.platforms import for_platform

_TAPS = 3
_convolution = partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def direct(
    x: jax.Array, kernel: jax.Array, stride: int = 1, *, padding: tuple[int, int] = (1, 1)
) -> jax.Array:
    """[B, H, W, C] and [3, 3, C, K] -> [B, H / stride, W / stride, K], by XLA.

    `padding` are the zeros before and behind each axis.
    """
    return _convolution(x, kernel, window_strides=(stride, stride), padding=(padding, padding))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return direct(x, kernel, stride)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return direct(x, kernel, stride), (x, kernel)


def _backward(
    stride: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # On each axis, how many pixels of x there are from the centre of the last output on.
    rests = [n - stride * (m - 1) for n, m in zip(x.shape[1:3], dy.shape[1:3], strict=True)]
    dx = _convolution(
        dy,
        kernel[::-1, ::-1].swapaxes(2, 3),
        padding=[(1, rest) for rest in rests],
        lhs_dilation=(stride, stride),
    )
    dkernel = _convolution(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        padding=[(1, _TAPS - 1 - rest) for rest in rests],
        rhs_dilation=(stride, stride),
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_on_cpu.defvjp(_forward, _backward)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`direct`, with gradients by (1) and (2) on a CPU. `stride` is 1 or 2."""
    return for_platform(cpu=_on_cpu, default=direct)(x, kernel, stride)
