"""Dropout's masks are as good as random, and functions of key, row and place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.networks.kernels.dropout import kept

SHAPE = (16, 16, 32)
_kept = jax.jit(kept, static_argnums=(2, 3))


def _standardized(key, rows, rate=0.25):
    mask = np.asarray(_kept(jax.random.key(key), jnp.asarray(rows), SHAPE, rate))
    return ((mask - (1 - rate)) / np.sqrt(rate * (1 - rate))).reshape(len(rows), -1)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_each_number_is_dropped_at_the_rate(rate):
    x = _standardized(0, np.arange(64), rate)
    # Sums of independent numbers of deviation 1: over everything, an example, a place.
    assert abs(x.sum()) < 4 * np.sqrt(x.size)
    for axis in (0, 1):
        sums = x.sum(axis) / np.sqrt(x.shape[axis])
        assert abs(sums.std() - 1) < 4 * np.sqrt(0.5 / sums.size)


def test_masks_of_neighbours_examples_and_steps_are_independent():
    x, y = (_standardized(key, np.arange(64)) for key in (0, 1))
    assert abs((x * y).sum()) < 4 * np.sqrt(x.size)
    for lag in (1, 2, SHAPE[2], SHAPE[1] * SHAPE[2]):
        products = x[:, lag:] * x[:, :-lag]
        assert abs(products.sum()) < 4 * np.sqrt(products.size)
    between = (x @ x.T)[np.triu_indices(64, 1)] / np.sqrt(x.shape[1])
    assert abs(between.std() - 1) < 4 * np.sqrt(0.5 / between.size)


def test_a_mask_is_a_function_of_the_row():
    whole = _standardized(3, np.arange(8))
    np.testing.assert_array_equal(_standardized(3, [5, 2]), whole[[5, 2]])
    assert (whole[0] != whole[1]).any()
