"""Samplers against data whose optimal denoiser and flow are known: a Gaussian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import gaussian, samplers
from cascaded_diffusion.diffusion.grids import time_grid
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule, make_schedule
from cascaded_diffusion.types import Prediction
from tests.diffusion.gaussian_data import correlated, independent, levels

SCHEDULE = make_cosine_schedule(offset=0.008)
DATA = correlated()
STEPS = {
    "ancestral small": samplers.make_step("ancestral", variance="small"),
    "ancestral large": samplers.make_step("ancestral", variance="large"),
    "ancestral between": samplers.make_step(
        "ancestral", variance="interpolated", variance_interpolation=0.5
    ),
    "ancestral learned": samplers.make_step("ancestral", variance="learned"),
    "ddim eta 0": samplers.make_step("ddim", eta=0.0),
    "ddim eta 0.5": samplers.make_step("ddim", eta=0.5),
    "ddim eta 1": samplers.make_step("ddim", eta=1.0),
    "dpmpp_2m": samplers.make_step("dpmpp_2m"),
    "heun": samplers.make_step("heun"),
    "edm": samplers.make_step("edm"),
}
ORDERS = {"ddim eta 0": 1, "heun": 2, "dpmpp_2m": 2, "edm": 2}


def uniform_times(num_steps):
    return time_grid("uniform", num_steps, schedule=SCHEDULE, discrete_timesteps=None)


def denoise(xt, logsnr):
    """The optimal denoiser; any variance between the two will do where steps are short."""
    prediction = DATA.denoise(xt, logsnr)
    return Prediction(
        x0=prediction.x0, eps=prediction.eps, variance_fraction=jnp.full_like(xt, 0.3)
    )


# As many chains at a time, and as many steps in the longest grid, in most of the tests below.
BATCH, LONGEST = 2048, 512


def padded(times, num_steps):
    """The grid with zeros behind it, as if it had `num_steps`: no chain gets to them.

    Grids of one length have one program, and compiling takes longer than running it.
    """
    return np.pad(times, (0, num_steps + 1 - len(times)))


@functools.cache
def compiled(name):
    return jax.jit(
        lambda xt, keys, times, stop_t: samplers.sample(
            denoise, xt, keys, schedule=SCHEDULE, step=STEPS[name], times=times, stop_t=stop_t
        )
    )


@functools.cache
def drawn():
    """Noise at t = 1, and the keys of its chains."""
    noise_keys, keys = (jax.random.split(jax.random.key(seed), BATCH) for seed in (2, 3))
    return samplers.normal_per_image(noise_keys, DATA.shape), keys


def run(name, grid, num_steps, stop_t=0.0):
    """Noise at t = 1, and where it leads."""
    xt, keys = drawn()
    times = time_grid(grid, num_steps, schedule=SCHEDULE, discrete_timesteps=None)
    return xt, compiled(name)(xt, keys, padded(times, LONGEST), float(stop_t))


def assert_has_moments(samples, mean, covariance):
    """Mean and covariance are those given, within the error of so many samples."""
    n, dims = len(samples), len(mean)
    values, vectors = np.linalg.eigh(covariance)
    white = (np.asarray(samples, np.float64).reshape(n, dims) - mean) @ vectors / np.sqrt(values)
    assert np.abs(white.mean(0)).max() < 4.5 / np.sqrt(n)
    error = np.cov(white.T) - np.eye(dims)
    variances = np.diag(error)
    assert np.abs(variances).max() < 4.5 * np.sqrt(2 / n)
    assert np.abs(variances.mean()) < 4 * np.sqrt(2 / n / dims)
    assert np.abs(error - np.diag(variances)).max() < 5 / np.sqrt(n)


@pytest.mark.parametrize("name", STEPS)
def test_fine_grid_reaches_the_true_mean_and_covariance(name):
    _, samples = run(name, "uniform", LONGEST)
    assert_has_moments(samples, DATA.mean, DATA.covariance)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("stop_t", [0.25, 0.31])  # on the grid, and off it
def test_truncated_chain_has_the_marginal_of_the_forward_process(name, stop_t):
    _, samples = run(name, "uniform", 256, stop_t)
    assert_has_moments(samples, *DATA.marginal(SCHEDULE(stop_t)))


@pytest.mark.parametrize("name", ORDERS)
def test_error_against_the_exact_flow_falls_with_the_order_of_the_solver(name):
    errors = []
    for num_steps in (64, 128, 256):
        times = time_grid("logsnr", num_steps, schedule=SCHEDULE, discrete_timesteps=None)
        stop_t = times[num_steps // 2]
        xt, samples = run(name, "logsnr", num_steps, stop_t)
        exact = DATA.flow(xt, SCHEDULE(1.0), SCHEDULE(stop_t))
        errors.append(np.sqrt(np.mean((np.asarray(samples) - exact) ** 2)))
    observed = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(observed, ORDERS[name], atol=0.1, err_msg=f"{errors}")


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_second_order_is_far_ahead_of_first_order_in_few_steps(name):
    def error(name):
        xt, samples = run(name, "uniform", 20, 0.1)
        exact = DATA.flow(xt, SCHEDULE(1.0), SCHEDULE(0.1))
        return np.sqrt(np.mean((np.asarray(samples) - exact) ** 2))

    assert error(name) < error("ddim eta 0") / 5


@jax.jit
def _sampled_with_fractions(logsnr, fraction, stop_t):
    """Samples of independent pixels in four steps, from levels [4] with variances [4, D]."""
    data = independent()

    def informed(xt, logsnr_t):
        prediction = data.denoise(xt, logsnr_t)
        step = jnp.argmin(jnp.abs(logsnr - logsnr_t[0]))
        return Prediction(
            x0=prediction.x0,
            eps=prediction.eps,
            variance_fraction=jnp.broadcast_to(fraction[step].reshape(xt.shape[1:]), xt.shape),
        )

    keys = jax.random.split(jax.random.key(2), 16384)
    return samplers.sample(
        informed,
        samplers.normal_per_image(keys, data.shape),
        samplers.fold_in_each(keys, 99),
        schedule=SCHEDULE,
        step=STEPS["ancestral learned"],
        times=uniform_times(4),
        stop_t=stop_t,
    )


@pytest.mark.parametrize("stop_t", [0.3, 0.5])  # off the grid, and on it
def test_ancestral_steps_with_the_right_learned_variance_are_exact_in_four(stop_t):
    # Given xt, xs is Gaussian with the posterior's variance plus that of x0 seen through
    # its mean; with independent pixels a fraction per pixel can say so.
    data, times = independent(), uniform_times(4)
    visited = np.append(times[times > stop_t], stop_t)
    logsnr = np.asarray(SCHEDULE(visited), np.float64)
    (alpha2_s, sigma2_s), (_, sigma2_t) = levels(logsnr[1:]), levels(logsnr[:-1])
    shrink = -np.expm1(logsnr[:-1] - logsnr[1:])
    small, large = shrink * sigma2_s, shrink * sigma2_t
    uncertainty = np.stack([data.posterior_variance(level) for level in logsnr[:-1]])
    exact = small[:, None] + (shrink**2 * alpha2_s)[:, None] * uncertainty
    fraction = np.log(exact / small[:, None]) / np.log(large / small)[:, None]
    assert ((fraction > 0) & (fraction < 1)).all()

    missing = 4 - len(fraction)  # of the grid's steps
    samples = _sampled_with_fractions(
        np.float32(np.pad(logsnr[:-1], (0, missing), constant_values=np.inf)),
        np.float32(np.pad(fraction, ((0, missing), (0, 0)))),
        stop_t,
    )
    assert_has_moments(samples, *data.marginal(SCHEDULE(stop_t)))


@pytest.mark.parametrize("stop_t", [0.0, 0.25, 0.31])
def test_ddim_with_eta_one_is_ancestral_with_the_small_variance(stop_t):
    _, ddim = run("ddim eta 1", "uniform", 20, stop_t)
    _, ancestral = run("ancestral small", "uniform", 20, stop_t)
    np.testing.assert_allclose(ddim, ancestral, atol=1e-5)


def test_interpolated_variance_ends_at_small_and_large():
    s, t = jnp.asarray([2.0]), jnp.asarray([-1.0])
    small, large = gaussian.step_logvars(s, t)
    for weight, expected in ((0.0, small), (0.25, 0.75 * small + 0.25 * large), (1.0, large)):
        between = samplers.make_log_variance("interpolated", weight)
        np.testing.assert_allclose(between(None, s, t), expected, rtol=1e-6)
    learned = samplers.make_log_variance("learned")
    prediction = Prediction(x0=s, eps=s, variance_fraction=jnp.asarray([0.25]))
    np.testing.assert_allclose(learned(prediction, s, t), 0.75 * small + 0.25 * large, rtol=1e-6)


@functools.cache
def _steps_of_no_length():
    """The image before a step of no length, and after that of each sampler: one program."""
    xt = samplers.normal_per_image(jax.random.split(jax.random.key(0), 3), DATA.shape)
    logsnr = jnp.full((3,), -20.0)
    at = samplers.Transition(
        xt=xt,
        logsnr_s=logsnr,
        logsnr_t=logsnr,
        noise=jnp.ones_like(xt),
        is_last=jnp.asarray(False),
        x0_before=jnp.zeros_like(xt),
        logsnr_before=logsnr,
    )

    @jax.jit
    def after(**at):
        transition = samplers.Transition(**at)
        return {name: step(denoise, transition)[0] for name, step in STEPS.items()}

    return xt, after(**vars(at))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_no_length_changes_nothing(name):
    # The cut ends of a schedule have such steps.
    xt, after = _steps_of_no_length()
    np.testing.assert_allclose(after[name], xt, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_the_last_step_returns_the_denoised_image(name):
    # One step from pure noise: that knows nothing but the mean.
    _, samples = run(name, "uniform", 1)
    expected = np.broadcast_to(DATA.mean.reshape(DATA.shape), samples.shape)
    np.testing.assert_allclose(samples, expected, atol=3e-4)


@functools.cache
def spying(name, schedule):
    """A list, and a chain of one image that adds to it the levels it asks its denoiser for."""
    visited = []

    def spy(xt, logsnr):
        jax.debug.callback(lambda x: visited.append(float(x)), logsnr[0], ordered=True)
        return denoise(xt, logsnr)

    @jax.jit
    def chain(times, stop_t):
        return samplers.sample(
            spy,
            jnp.zeros((1, *DATA.shape)),
            jax.random.split(jax.random.key(0), 1),
            schedule=schedule,
            step=STEPS[name],
            times=times,
            stop_t=stop_t,
        )

    return visited, chain


def spied(times, name="ddim eta 0", schedule=SCHEDULE):
    """stop_t -> the noise levels that a chain asks its denoiser for."""
    visited, chain = spying(name, schedule)

    def levels_until(stop_t):
        visited.clear()
        chain(padded(times, 50), stop_t)
        jax.effects_barrier()
        return list(visited)

    return levels_until


@pytest.mark.parametrize("num_steps", [7, 20])
def test_truncation_visits_the_grid_above_stop_t(num_steps):
    grid = 1 - np.arange(num_steps) / num_steps
    levels_of_grid = np.asarray(SCHEDULE(grid))
    visited = spied(uniform_times(num_steps))
    for stop_t in (0.0, 0.1, 0.3, 0.5, 0.7, 0.85):
        expected = levels_of_grid[grid > stop_t + 1e-6]
        np.testing.assert_allclose(visited(stop_t), expected, atol=1e-3)


def test_every_time_of_a_grid_is_visited_however_near_to_zero():
    times = time_grid("logsnr", 30, schedule=SCHEDULE, discrete_timesteps=None)
    assert times[-2] < 1e-6
    np.testing.assert_allclose(spied(times)(0.0), SCHEDULE(times[:-1]), atol=1e-2)


def test_every_step_of_a_discrete_model_is_visited_once():
    table = make_schedule(
        "cosine", resolution=4, num_timesteps=50, between_steps=False, cosine_offset=0.008
    )
    times = time_grid("uniform", 50, schedule=table, discrete_timesteps=50)
    visited, expected = spied(times, schedule=table), np.asarray(table(np.arange(50, 0, -1) / 50))
    for stop in (0, 1, 20):
        np.testing.assert_array_equal(visited(stop / 50), expected[: 50 - stop])


@pytest.mark.parametrize("name", ["ddim eta 0", "ancestral small", "dpmpp_2m", "heun"])
def test_the_denoiser_is_called_as_often_as_announced(name):
    calls = spied(uniform_times(5), name)(0.0)
    assert len(calls) == len(samplers.evaluation_times(name.split()[0], np.linspace(1, 0, 6), 0.0))


def test_one_program_serves_every_stop_t_and_zero_is_the_whole_chain():
    traces = []

    def counting(xt, logsnr):
        traces.append(1)
        return denoise(xt, logsnr)

    def chain(xt, keys, **stop):
        return samplers.sample(
            counting,
            xt,
            keys,
            schedule=SCHEDULE,
            step=STEPS["ancestral small"],
            times=uniform_times(8),
            **stop,
        )

    xt = samplers.normal_per_image(jax.random.split(jax.random.key(0), 2), DATA.shape)
    keys = jax.random.split(jax.random.key(1), 2)
    stopped = jax.jit(lambda xt, keys, stop_t: chain(xt, keys, stop_t=stop_t))
    first = stopped(xt, keys, 0.0)
    num_traces = len(traces)
    for stop_t in (0.2, 0.5, 0.51):
        assert not np.allclose(stopped(xt, keys, stop_t), first)
    assert len(traces) == num_traces
    np.testing.assert_allclose(first, jax.jit(chain)(xt, keys), atol=1e-6)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(3), 6)
    whole = samplers.normal_per_image(keys, (8, 8, 1))
    np.testing.assert_array_equal(whole[2:4], samplers.normal_per_image(keys[2:4], (8, 8, 1)))
    assert np.unique(np.asarray(whole)).size == whole.size


def edm_by_the_paper(x, sigmas, draws, churn):
    """Algorithm 2 of Karras et al. 2022 in float64, of images in their coordinates."""
    amount, low, high, inflation = churn

    def slope(x, sigma):
        logsnr = np.full(len(x), -2 * np.log(sigma))
        alpha = 1 / np.sqrt(1 + sigma**2)
        x0 = np.asarray(DATA.denoise(jnp.asarray(alpha * x), jnp.asarray(logsnr)).x0, np.float64)
        return (x - x0) / sigma

    for sigma, following, draw in zip(sigmas[:-1], sigmas[1:], draws, strict=True):
        gamma = min(amount / (len(sigmas) - 1), 2**0.5 - 1) if low <= sigma <= high else 0.0
        raised = sigma * (1 + gamma)
        x = x + np.sqrt(raised**2 - sigma**2) * inflation * draw
        d = slope(x, raised)
        moved = x + (following - raised) * d
        if following > 0:
            moved = x + (following - raised) * (d + slope(moved, following)) / 2
        x = moved
    return x


@pytest.mark.parametrize("churn", [None, (6.0, 0.05, 20.0, 1.003)])
def test_edm_is_its_papers_algorithm(churn):
    num_steps = 9
    times = time_grid("karras", num_steps, schedule=SCHEDULE, discrete_timesteps=None)
    sigmas = np.append(np.exp(-0.5 * np.asarray(SCHEDULE(times[:-1]), np.float64)), 0.0)
    xt, keys = (x[:8] for x in drawn())
    step = samplers.make_step("edm", churn=churn, num_steps=num_steps)
    found = jax.jit(
        lambda xt, keys: samplers.sample(
            DATA.denoise, xt, keys, schedule=SCHEDULE, step=step, times=times
        )
    )(xt, keys)
    draws = [
        samplers.normal_per_image(samplers.fold_in_each(keys, i), DATA.shape)
        for i in range(num_steps)
    ]
    # Their images are not scaled: x / alpha.
    start = np.asarray(xt, np.float64) * np.sqrt(1 + sigmas[0] ** 2)
    expected = edm_by_the_paper(
        start, sigmas, [np.asarray(z) for z in draws], churn or (0.0, 0.0, 0.0, 1.0)
    )
    np.testing.assert_allclose(found, expected, atol=2e-4)
