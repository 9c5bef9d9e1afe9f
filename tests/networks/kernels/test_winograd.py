"""Winograd's convolution against the direct sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cascaded_diffusion.networks.flops import count_flops
from cascaded_diffusion.networks.kernels import winograd
from cascaded_diffusion.networks.kernels.platforms import traced_for
from cascaded_diffusion.networks.layers import Conv3x3

# Batch, height, width, channels in and out.
SHAPES = [(2, 8, 8, 64, 64), (1, 8, 12, 64, 96), (3, 16, 8, 80, 64)]


def _inputs(shape, seed=0):
    b, h, w, c, k = shape
    draw = np.random.default_rng(seed).standard_normal
    kernel = draw((3, 3, c, k)) / np.sqrt(9 * c)
    return tuple(map(jnp.float32, (0.5 + draw((b, h, w, c)), kernel, draw((b, h, w, k)))))


def test_the_matrices_filter_tiles():
    # Eq. (1) in double precision, against the definition of a filter.
    rng = np.random.default_rng(0)
    tile, taps = rng.standard_normal((6, 6)), rng.standard_normal((3, 3))
    matrices = (m.astype(np.float64) for m in (winograd.A_T, winograd.G, winograd.B_T))
    a_t, g, b_t = matrices
    filtered = a_t @ ((g @ taps @ g.T) * (b_t @ tile @ b_t.T)) @ a_t.T
    exact = [[(taps * tile[i : i + 3, j : j + 3]).sum() for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(filtered, exact, rtol=1e-5, atol=1e-6)


def test_what_is_lost_to_rounding():
    x, kernel, _ = _inputs((2, 16, 16, 128, 64))
    with jax.enable_x64(True):
        exact = np.asarray(winograd.direct(*(v.astype(jnp.float64) for v in (x, kernel))))
    error = np.abs(jax.jit(winograd.convolve)(x, kernel) - exact).max() / exact.std()
    assert error < 2e-5  # 9e-6; with points 0, +-1, +-2 it is 3e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_direct_sum(shape):
    x, kernel, dy = _inputs(shape)
    assert winograd.pays(x, kernel)
    found, exact = (
        jax.jit(lambda x, kernel, f=f: (f(x, kernel), *jax.vjp(f, x, kernel)[1](dy)))(x, kernel)
        for f in (winograd.convolve, winograd.direct)
    )
    for ours, theirs in zip(found, exact, strict=True):
        # Of the deviation: rounding, some five times that of the direct sum, and the sums'
        # own in the gradient of the kernel.
        np.testing.assert_allclose(ours, theirs, atol=5e-5 * float(theirs.std()), rtol=0)
        assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 8, 10, 64, 64), jnp.float32),
        ((2, 10, 8, 64, 64), jnp.float32),
        ((2, 4, 8, 64, 64), jnp.float32),
        ((2, 8, 4, 64, 64), jnp.float32),
        ((2, 8, 8, 32, 64), jnp.float32),
        ((2, 8, 8, 64, 3), jnp.float32),
        ((2, 8, 8, 64, 64), jnp.bfloat16),
    ],
)
def test_what_it_is_not_for_is_summed_directly(shape, dtype):
    x, kernel, _ = (value.astype(dtype) for value in _inputs(shape))
    assert not winograd.pays(x, kernel)
    layer = Conv3x3(shape[-1], dtype)
    out = layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(shape[-1])}}, x)
    np.testing.assert_array_equal(out, winograd.direct(x, kernel))


def test_a_strided_convolution_is_summed_directly():
    x, kernel, _ = _inputs(SHAPES[0])
    out = Conv3x3(64, jnp.float32, stride=2).apply(
        {"params": {"kernel": kernel, "bias": jnp.zeros(64)}}, x
    )
    np.testing.assert_array_equal(out, winograd.direct(x, kernel, 2))


def test_a_layer_of_many_channels_uses_it():
    x, kernel, _ = _inputs(SHAPES[0])
    layer = Conv3x3(64, jnp.float32)
    out = layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(64)}}, x)
    np.testing.assert_array_equal(out, winograd.convolve(x, kernel))


@pytest.mark.parametrize(
    ("platform", "lowered_for", "count"),
    [("cpu", "cpu", 0), ("tpu", "tpu", 3), ("gpu", "cuda", 3)],
)
def test_all_but_a_cpu_sum_directly(platform, lowered_for, count):
    x, kernel, dy = _inputs(SHAPES[0])
    both = jax.jit(lambda x, kernel: jax.vjp(winograd.convolve, x, kernel)[1](dy))
    forward = jax.jit(winograd.convolve)
    with traced_for(platform):
        text = "".join(
            f.trace(x, kernel).lower(lowering_platforms=(lowered_for,)).as_text()
            for f in (forward, both)
        )
    assert text.count("stablehlo.convolution") == count


def test_its_flops_are_those_of_the_convolution():
    x, kernel, dy = _inputs(SHAPES[0])
    b, h, w, c, k = SHAPES[0]
    flops = 2 * b * h * w * 9 * c * k
    assert count_flops(winograd.convolve, x, kernel) == flops

    def gradients(x, kernel):
        return jax.vjp(winograd.convolve, x, kernel)[1](dy)

    assert count_flops(gradients, x, kernel) == 3 * flops


def test_a_batch_over_devices_gives_the_same():
    x, kernel, dy = _inputs((8, 8, 8, 64, 64))

    @jax.jit
    def run(x, kernel, dy):
        y, back = jax.vjp(winograd.convolve, x, kernel)
        return y, *back(dy)

    one = run(x, kernel, dy)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    many = run(*jax.device_put((x, kernel, dy), (split, whole, split)))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(a.std()), rtol=0)
