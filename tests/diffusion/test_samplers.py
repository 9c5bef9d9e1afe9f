"""Samplers against data whose optimal denoiser is known: x0 ~ N(mean, std^2 I)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import gaussian, samplers
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule

MEAN, STD = 0.3, 0.5
SCHEDULE = make_cosine_schedule()
BATCH, SHAPE = 4, (32, 32, 1)


def optimal_denoiser(xt, logsnr):
    alpha, sigma = gaussian.alpha_sigma_from_logsnr(gaussian.broadcast_right(logsnr, xt))
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x0 = MEAN + gain * (xt - alpha * MEAN)
    return gaussian.prediction_from_output(x0, xt, logsnr, parameterization="x0")


def run(name, num_steps, stop_t=0.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), BATCH)
    xt = samplers.normal_per_image(keys, SHAPE)
    return jax.jit(
        lambda xt, keys, stop_t: samplers.sample(
            optimal_denoiser,
            xt,
            keys,
            schedule=SCHEDULE,
            transition=samplers.SAMPLERS[name],
            num_steps=num_steps,
            stop_t=stop_t,
        )
    )(xt, keys, stop_t)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_fine_grid_reaches_the_true_moments(name):
    samples = np.asarray(run(name, 400))
    error = STD / np.sqrt(samples.size)
    assert abs(samples.mean() - MEAN) < 4 * error
    assert abs(samples.std() - STD) < 4 * error


def test_ddim_is_first_order():
    # The deterministic flow maps each noise to mean + std * noise.
    keys = jax.random.split(jax.random.key(0), BATCH)
    exact = MEAN + STD * np.asarray(samplers.normal_per_image(keys, SHAPE))
    errors = [np.abs(np.asarray(run("ddim", n)) - exact).max() for n in (20, 40, 80, 160)]
    ratios = np.asarray(errors[:-1]) / np.asarray(errors[1:])
    assert (ratios > 1.6).all(), (errors, ratios)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("stop_t", [0.25, 0.31])  # on the grid of 20 steps, and off it
def test_truncated_chain_has_the_moments_of_the_forward_process(name, stop_t):
    samples = np.asarray(run(name, 400, stop_t))
    alpha, sigma = gaussian.alpha_sigma_from_logsnr(SCHEDULE(jnp.asarray(stop_t)))
    std = np.sqrt(alpha**2 * STD**2 + sigma**2)
    error = std / np.sqrt(samples.size)
    assert abs(samples.mean() - alpha * MEAN) < 4 * error
    assert abs(samples.std() - std) < 4 * error


@pytest.mark.parametrize("num_steps", [7, 10, 20])
def test_truncation_visits_the_grid_above_stop_t_and_ends_on_it(num_steps):
    # Reads the visited times off the noise levels that the denoiser is asked for.
    for stop_t in (0.0, 0.1, 0.3, 0.5, 0.7, 0.85):
        visited = []

        def spy(xt, logsnr, visited=visited):
            jax.debug.callback(lambda x: visited.append(float(x)), logsnr[0], ordered=True)
            return optimal_denoiser(xt, logsnr)

        keys = jax.random.split(jax.random.key(0), 1)
        out = samplers.sample(
            spy,
            jnp.zeros((1, 2, 2, 1)),
            keys,
            schedule=SCHEDULE,
            transition=samplers.ddim_step,
            num_steps=num_steps,
            stop_t=stop_t,
        )
        jax.effects_barrier()
        assert out.shape == (1, 2, 2, 1)
        grid = 1 - np.arange(num_steps) / num_steps
        expected = np.asarray(SCHEDULE(jnp.asarray(grid[grid > stop_t + 1e-6])))
        np.testing.assert_allclose(visited, expected, atol=1e-3)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(3), 6)
    whole = samplers.normal_per_image(keys, (8, 8, 1))
    np.testing.assert_array_equal(whole[2:4], samplers.normal_per_image(keys[2:4], (8, 8, 1)))
    assert np.unique(np.asarray(whole)).size == whole.size
