"""Gradients of the convolution that are written out for CPUs, against those that JAX derives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.networks.kernels.convolution import convolve, direct

# Batch, height, width, channels in and out; sizes that a stride of 2 does not divide.
SHAPES = [(2, 8, 6, 3, 5), (1, 4, 4, 4, 2), (3, 7, 5, 2, 3)]


def _inputs(shape, stride):
    b, h, w, c, k = shape
    draw = np.random.default_rng(0).standard_normal
    x, kernel = jnp.float32(draw((b, h, w, c))), jnp.float32(draw((3, 3, c, k)))
    dy = draw((b, -(-h // stride), -(-w // stride), k))
    return x, kernel, jnp.float32(dy)


def _gradients(f, stride, x, kernel, dy):
    y, pull = jax.vjp(lambda x, kernel: f(x, kernel, stride), x, kernel)
    return (y, *pull(dy))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_that_jax_derives(shape, stride):
    inputs = _inputs(shape, stride)
    found, expected = (jax.jit(partial(_gradients, f, stride))(*inputs) for f in (convolve, direct))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_in_a_loop_a_cpu_computes_them_by_its_fast_routine():
    # Its order is the one that XLA takes without rewriting, which it does outside of loops only.
    inputs = _inputs((4, 8, 8, 4, 6), 1)

    def looped(x, kernel, dy):
        def add(total, part):
            found = _gradients(convolve, 1, part, kernel, dy)[1:]
            return jax.tree.map(jnp.add, total, found), None

        return jax.lax.scan(add, (jnp.zeros_like(x), jnp.zeros_like(kernel)), jnp.stack([x, x]))[0]

    text = jax.jit(looped).lower(*inputs).as_text()
    assert text.count("dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]") == 2
    assert text.count("stablehlo.convolution") == 2
