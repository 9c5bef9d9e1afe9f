"""Sums over pixels, and sums and products with numbers that all pixels share.

XLA's CPU back end reduces over the outer axes of an array number by number, so a sum over the
pixels of a feature map costs as much as a small convolution; a product with ones takes a tenth
of that. For a product summed over several axes it transposes the whole feature map, which takes
longer than the product. Other back ends reduce well what they reduce alone.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from cascaded_diffusion.networks.kernels.layouts import in_memory
from cascaded_diffusion.networks.kernels.platforms import for_platform

# A product adds up this many numbers at a time; more would lose more digits.
_PIXELS = 128


def _by_product(x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    rows = math.gcd(h, max(1, _PIXELS // w))
    x = x.reshape(b, h // rows, rows * w, c)
    return jnp.einsum("brn,brnc->brc", jnp.ones(x.shape[:3], x.dtype), x).sum(1)


def sum_pixels(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, C]."""
    return for_platform(cpu=_by_product, default=lambda x: x.sum((1, 2)))(x)


def _as_complex(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Inside of what uses them, one thread would add up all pixels.
    total = in_memory(jax.lax.complex(x, y).sum((1, 2)))
    return total.real, total.imag


def sum_pixel_pairs(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Twice [B, H, W, C] float32 -> [B, C].

    On a GPU both are one sum of complex numbers: where x and y share an expensive expression,
    XLA would write it to memory for two sums to read, even where it computes both at once.
    """
    return for_platform(gpu=_as_complex, default=lambda x, y: (sum_pixels(x), sum_pixels(y)))(x, y)


@jax.custom_vjp
def add_to_pixels(x: jax.Array, shift: jax.Array) -> jax.Array:
    """[B, H, W, C] plus [B, C], or [C] for all examples, in the former's dtype.

    The gradient is summed in float32.
    """
    return x + jnp.broadcast_to(shift.astype(x.dtype), (len(x), x.shape[-1]))[:, None, None, :]


def _add_forward(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The backward pass needs only the shape and dtype of `shift`, which is small.
    return add_to_pixels(x, shift), shift


def _add_backward(shift: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = sum_pixels(dy.astype(jnp.float32))
    if shift.ndim == 1:
        return dy, total.sum(0).astype(shift.dtype)
    # What the shifts have in common, such as a bias, needs the sum over examples as well. Besides
    # this one a GPU would compute it from the pixels again, of a copy of dy in float32.
    return dy, in_memory(total).astype(shift.dtype)


add_to_pixels.defvjp(_add_forward, _add_backward)


@jax.custom_vjp
def multiply_pixels(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] times [C, K] of the same dtype -> [B, H, W, K]."""
    return x @ kernel


def _multiply_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Example by example; flattened over examples, rows of several devices would be gathered."""
    x, dy = (value.reshape(len(value), -1, value.shape[-1]) for value in (x, dy))
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    # The first factor is read column by column, so it is the smaller one.
    if x.shape[-1] <= dy.shape[-1]:
        gradient = product("bnc,bnk->bck", x, dy).sum(0)
    else:
        gradient = product("bnk,bnc->bkc", dy, x).sum(0).T
    return gradient.astype(x.dtype)


def _multiply_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    gradient = for_platform(cpu=_kernel_gradient, default=partial(jnp.einsum, "bhwc,bhwk->ck"))
    return dy @ kernel.T, gradient(x, dy)


multiply_pixels.defvjp(_multiply_forward, _multiply_backward)
