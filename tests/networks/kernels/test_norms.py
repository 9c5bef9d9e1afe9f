"""Group normalization in one piece, against flax's and its own definition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cascaded_diffusion.networks.kernels.norms import GroupNorm, normalize


def _variables(channels, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    scale, bias = 1 + 0.3 * draw(channels), 0.3 * draw(channels)
    return {"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}


def _inputs(channels, dtype=jnp.float32, batch=3):
    draw = np.random.default_rng(1).standard_normal
    x = jnp.float32(1.5 + 2.0 * draw((batch, 6, 4, channels)))
    modulation = tuple(jnp.float32(0.4 * draw((batch, channels))) for _ in range(2))
    return x.astype(dtype), modulation


def _flax(variables, x, modulation, swish):
    """The same by flax's norm, in the steps that `GroupNorm` does at once."""
    groups = np.gcd(32, x.shape[-1])
    h = nn.GroupNorm(num_groups=int(groups), epsilon=1e-5).apply(variables, x)
    if modulation is not None:
        by, plus = (v[:, None, None, :] for v in modulation)
        h = h * (1 + by) + plus
    return nn.swish(h) if swish else h


@pytest.mark.parametrize("swish", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("channels", [8, 48, 64])
def test_values_and_gradients_are_those_of_flax(channels, modulated, swish):
    variables, (x, modulation) = _variables(channels), _inputs(channels)
    modulation = modulation if modulated else None
    weights = jnp.float32(np.random.default_rng(2).standard_normal(x.shape))

    def ours(variables, x, modulation):
        return GroupNorm(swish=swish).apply(variables, x, modulation=modulation)

    def theirs(variables, x, modulation):
        return _flax(variables, x, modulation, swish)

    def with_gradients(f, dy, *args):
        y, back = jax.vjp(f, *args)
        return y, back(dy)

    args = weights, variables, x, modulation
    (found, *gradients), (expected, *exact) = (
        jax.tree.leaves(jax.jit(with_gradients, static_argnums=0)(f, *args)) for f in (ours, theirs)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for a, b in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_the_gradient_is_that_of_finite_differences():
    (x, modulation), variables = _inputs(4, batch=1), _variables(4)

    def f(x, scale, shift):
        return GroupNorm(swish=True).apply(variables, x, modulation=(scale, shift))

    check_grads(f, (x, *modulation), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


def test_epsilon_counts_where_an_image_is_flat():
    x = 1e-3 * jax.random.normal(jax.random.key(0), (2, 4, 4, 32))
    x = x - x.mean((1, 2), keepdims=True)
    ones, zeros = jnp.ones((2, 32)), jnp.zeros((2, 32))
    variance = np.square(x).mean((1, 2), keepdims=True)
    for epsilon in (1e-5, 1e-6):
        found = normalize((x,), ones, zeros, 32, False, epsilon)
        np.testing.assert_allclose(found, x / np.sqrt(variance + epsilon), atol=1e-5)


def test_bfloat16_is_normalized_in_float32():
    variables, (x, _) = _variables(32), _inputs(32, jnp.bfloat16)
    out = GroupNorm(dtype=jnp.bfloat16, swish=True).apply(variables, x)
    assert out.dtype == jnp.bfloat16
    exact = _flax(variables, x.astype(jnp.float32), None, True)
    # Rounded once, at the end: half a unit in the last of 8 bits.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


def test_a_constant_image_has_a_finite_gradient():
    variables, x = _variables(8), jnp.full((2, 4, 4, 8), 7.0)
    out, back = jax.vjp(lambda x: GroupNorm(swish=True).apply(variables, x), x)
    assert np.isfinite(out).all()
    assert np.isfinite(back(jnp.ones_like(out))[0]).all()


def test_images_do_not_mix():
    variables, (x, _) = _variables(8), _inputs(8)
    apply = GroupNorm(swish=True).apply
    np.testing.assert_array_equal(apply(variables, x)[1], apply(variables, x.at[0].add(9.0))[1])


def test_an_image_is_normalized_within_its_groups():
    x = jnp.float32(5 + 3 * np.random.default_rng(0).standard_normal((2, 8, 8, 48)))
    norm = GroupNorm()
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(np.asarray(out).mean((1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(out).std((1, 2, 3)), 1, atol=1e-3)


def test_the_jaxpr_keeps_nothing_but_the_input():
    # What stays between forward and backward: x, and [B, C] arrays.
    variables, (x, _) = _variables(64), _inputs(64)
    _, back = jax.vjp(lambda x: GroupNorm(swish=True).apply(variables, x), x)
    large = [leaf for leaf in jax.tree.leaves(back) if np.size(leaf) >= x.size]
    assert len(large) == 1
