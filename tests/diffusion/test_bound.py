import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from cascaded_diffusion.diffusion import bound, gaussian, samplers
from cascaded_diffusion.diffusion.grids import time_grid
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule, make_schedule
from cascaded_diffusion.types import Prediction
from tests.diffusion.gaussian_data import independent, levels
from tests.xla import QUICK, compiled_with

SCHEDULE = make_cosine_schedule(offset=0.008)
SMALL, LARGE, LEARNED = (samplers.make_log_variance(k) for k in ("small", "large", "learned"))
# Nearly all of it inside [-1, 1].
DATA = independent(side=3, stds=(0.1, 0.2))


def draw(batch, seed=0):
    keys = jax.random.split(jax.random.key(seed), batch)
    noise = samplers.normal_per_image(keys, DATA.shape)
    stds = np.sqrt(np.diag(DATA.covariance)).reshape(DATA.shape)
    x0 = jnp.asarray(DATA.mean.reshape(DATA.shape) + stds * noise, jnp.float32)
    return x0, jax.random.split(jax.random.key(seed + 100), batch)


def bits(denoise, x0, keys, num_steps, log_variance, grid="uniform"):
    times = time_grid(grid, num_steps, schedule=SCHEDULE, discrete_timesteps=None)
    return jax.jit(
        lambda x0, keys: bound.bits_per_dim(
            denoise, x0, keys, schedule=SCHEDULE, times=times, log_variance=log_variance
        )
    )(x0, keys)


def exact_log_likelihood(x0, mean, logvar):
    """Ho et al. 2020, eq. 13, in float64 by scipy."""
    x0, mean, logvar = (np.asarray(x, np.float64) for x in (x0, mean, logvar))
    std = np.exp(logvar / 2)
    low, high = (x0 - mean - 1 / 255) / std, (x0 - mean + 1 / 255) / std
    low, high = np.where(x0 < -0.999, -np.inf, low), np.where(x0 > 0.999, np.inf, high)
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
    log_low, log_high = special.log_ndtr(low), special.log_ndtr(high)
    return log_high + np.log1p(-np.exp(log_low - log_high))


PIXELS = (np.arange(256) / 127.5 - 1).astype(np.float32)
LOGVARS = np.float32([-20.0, -12.0, -7.0, -3.0, 0.0])


def test_normal_kl_is_the_textbooks():
    mean_q, mean_p = np.float32([0.3, -1.0, 0.0, 0.5]), np.float32([0.2, 1.0, 0.0, 0.5])
    logvar_q, logvar_p = np.float32([-3.0, 0.5, -9.0, -9.0]), np.float32([-2.0, 1.0, -9.0, -9.001])
    var_q, var_p = np.exp(logvar_q.astype(np.float64)), np.exp(logvar_p.astype(np.float64))
    expected = (
        np.log(np.sqrt(var_p / var_q))
        + (var_q + np.square(mean_q.astype(np.float64) - mean_p)) / (2 * var_p)
        - 0.5
    )
    got = bound.normal_kl(mean_q, logvar_q, mean_p, logvar_p)
    # The last pair is nearly equal: its 2.5e-7 would be rounding if it were summed naively.
    np.testing.assert_allclose(got[:3], expected[:3], rtol=1e-5, atol=1e-9)
    d = float(logvar_q[3]) - float(logvar_p[3])
    np.testing.assert_allclose(got[3], (math.expm1(d) - d) / 2, rtol=1e-3)


@pytest.mark.parametrize("logvar", LOGVARS)
def test_discretized_likelihood_is_scipys_and_sums_to_one(logvar):
    mean = np.float32([-1.3, -1.0, -0.2, 0.0, 0.003, 0.999, 1.5])[:, None]
    likelihood = jax.jit(bound.discretized_log_likelihood)
    got = np.asarray(likelihood(PIXELS, mean, logvar), np.float64)
    assert np.isfinite(got).all()  # far tails too
    np.testing.assert_allclose(
        got, exact_log_likelihood(PIXELS, mean, logvar), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(np.exp(got).sum(1), 1.0, atol=1e-4)


def test_the_gradient_of_the_likelihood_is_finite_in_far_tails():
    gradient = jax.jit(
        jax.grad(
            lambda mean, logvar: bound.discretized_log_likelihood(PIXELS, mean, logvar).sum(),
            (0, 1),
        )
    )
    for mean in (-1.0, 0.1, 1.0):
        by_mean, by_logvar = gradient(jnp.full(256, mean), jnp.full(256, -12.0))
        assert np.isfinite(by_mean).all()
        assert np.isfinite(by_logvar).all()


@functools.cache
def _compiled_term(log_variance):
    return jax.jit(functools.partial(bound.vlb_term, log_variance=log_variance))


def _term(x0, xt, prediction, logsnr_s, logsnr_t, log_variance, is_first=False, cut=-30.0):
    full = functools.partial(jnp.full, x0.shape[:1])
    return _compiled_term(log_variance)(
        prediction,
        x0,
        xt,
        full(logsnr_s),
        full(logsnr_t),
        is_first=full(is_first),
        min_logvar=cut,
    )


def _noised(logsnr_t, batch=5):
    """Data, its noised version, and a prediction that is off and has variance fractions."""
    x0, _ = draw(batch)
    keys = jax.random.split(jax.random.key(7), 3)
    eps, error = (jax.random.normal(key, x0.shape) for key in keys[:2])
    xt = gaussian.diffuse(x0, jnp.full((batch,), logsnr_t), eps)
    fraction = jax.random.uniform(keys[2], x0.shape)
    return x0, xt, Prediction(x0=x0 + 0.1 * error, eps=eps, variance_fraction=fraction)


@pytest.mark.parametrize(("logsnr_s", "logsnr_t"), [(-1.0, -1.5), (3.0, 2.9), (9.0, 8.0)])
def test_a_learned_variance_term_is_the_kl_of_the_papers(logsnr_s, logsnr_t):
    x0, xt, prediction = _noised(logsnr_t)
    got = _term(x0, xt, prediction, logsnr_s, logsnr_t, LEARNED)

    (alpha2_s, sigma2_s), (alpha2_t, sigma2_t) = (
        levels(np.float32(x)) for x in (logsnr_s, logsnr_t)
    )
    beta = 1 - alpha2_t / alpha2_s
    small = beta * sigma2_s / sigma2_t
    fraction = np.asarray(prediction.variance_fraction, np.float64)
    var_p = beta**fraction * small ** (1 - fraction)
    gap = np.sqrt(alpha2_s) * beta / sigma2_t * (np.asarray(x0 - prediction.x0, np.float64))
    kl = 0.5 * (np.log(var_p / small) + (small + gap**2) / var_p - 1)
    np.testing.assert_allclose(got, kl.mean((1, 2, 3)) / np.log(2), rtol=1e-5)


def test_the_first_term_is_the_likelihood_of_the_pixels():
    x0, xt, prediction = _noised(11.0)
    got = _term(x0, xt, prediction, 20.0, 11.0, LEARNED, is_first=True, cut=-12.0)
    mean, _ = gaussian.posterior(prediction.x0, xt, jnp.full((5,), 20.0), jnp.full((5,), 11.0))
    fraction = np.asarray(prediction.variance_fraction, np.float64)
    large = np.log1p(-levels(11.0)[0] / levels(20.0)[0])
    logvar = np.float32(fraction * large - (1 - fraction) * 12.0)
    expected = -exact_log_likelihood(x0, mean, logvar).mean((1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@compiled_with(QUICK)  # without optimization equal terms round differently
def test_a_perfect_prediction_of_small_variance_costs_nothing_but_at_the_first_step():
    x0, xt, prediction = _noised(2.0)
    perfect = dataclasses.replace(prediction, x0=x0)
    np.testing.assert_array_equal(_term(x0, xt, perfect, 2.5, 2.0, SMALL), 0.0)
    assert (np.asarray(_term(x0, xt, perfect, 2.5, 2.0, LARGE)) > 0).all()
    assert (np.asarray(_term(x0, xt, prediction, 2.5, 2.0, SMALL)) > 0).all()
    assert (np.asarray(_term(x0, xt, perfect, 20.0, 2.0, SMALL, is_first=True, cut=-6.0)) > 0).all()


@pytest.mark.parametrize("is_first", [False, True])
def test_detached_the_bound_trains_the_variance_and_not_the_mean(is_first):
    logsnr_s, logsnr_t = (20.0, 6.0) if is_first else (2.5, 2.0)
    x0, xt, prediction = _noised(logsnr_t)
    output = jnp.concatenate([prediction.eps, prediction.variance_fraction], axis=-1)

    def vlb(output, detach):
        read = gaussian.prediction_from_output(
            output, xt, jnp.full((5,), logsnr_t), parameterization="eps"
        )
        read = bound.mean_detached(read) if detach else read
        return _term(x0, xt, read, logsnr_s, logsnr_t, LEARNED, is_first, cut=-10.0).sum()

    off = output.at[..., 0].add(0.3)
    (value, detached), (same, attached) = (
        jax.jit(jax.value_and_grad(vlb), static_argnums=1)(off, detach) for detach in (True, False)
    )
    assert value == same
    np.testing.assert_array_equal(detached[..., 0], 0.0)
    assert (np.abs(attached[..., 0]) > 0).all()
    assert (np.abs(detached[..., 1]) > 0).all()
    np.testing.assert_array_equal(detached[..., 1], attached[..., 1])


@pytest.mark.parametrize("log_variance", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("num_steps", [8, 64])
def test_bits_of_gaussian_data_are_the_closed_form(num_steps, log_variance):
    # With the optimal denoiser every term's expectation is known: x0 misses x0_hat by
    # Var[x0 | xt], and the first step's likelihood is an integral over that Gaussian.
    x0, keys = draw(4096)
    got = np.asarray(bits(DATA.denoise, x0, keys, num_steps, log_variance), np.float64)

    logsnr = np.asarray(SCHEDULE(1 - np.arange(num_steps + 1) / num_steps), np.float64)
    (alpha2_s, sigma2_s), (_, sigma2_t) = levels(logsnr[1:]), levels(logsnr[:-1])
    shrink = -np.expm1(logsnr[:-1] - logsnr[1:])
    small, large = shrink * sigma2_s, shrink * sigma2_t
    small[-1] = small[-2]
    var_p = small if log_variance is SMALL else large
    missed = np.stack([DATA.posterior_variance(level).mean() for level in logsnr[:-1]])
    kl = 0.5 * (np.log(var_p / small) + (small + shrink**2 * alpha2_s * missed) / var_p - 1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    gaps = np.sqrt(DATA.posterior_variance(logsnr[-2]))[:, None] * nodes
    likelihood = exact_log_likelihood(np.zeros_like(gaps), gaps, np.log(var_p[-1]))
    nll = -(likelihood @ weights).mean() / np.sqrt(2 * np.pi)
    alpha2, sigma2 = levels(logsnr[0])
    square = (DATA.mean**2 + np.diag(DATA.covariance)).mean()
    prior = 0.5 * (sigma2 - 1 - np.log(sigma2) + alpha2 * square)
    expected = (kl[:-1].sum() + nll + prior) / np.log(2)
    error = got.std() / np.sqrt(len(got))
    assert error < 0.02 * expected
    assert abs(got.mean() - expected) < 4 * error


def test_bits_fall_with_more_steps_to_those_of_the_data_itself():
    # -log2 of the true density, of pixels 2/255 apart: nothing needs fewer on average.
    x0, keys = draw(1024)
    variances = np.diag(DATA.covariance)
    squares = (np.asarray(x0).reshape(len(x0), -1) - DATA.mean) ** 2 / variances
    true = np.log2(2 * np.pi * variances) / 2 + squares / 2 / np.log(2) + np.log2(255 / 2)
    excess = [
        np.asarray(bits(DATA.denoise, x0, keys, n, LARGE), np.float64) - true.mean(1)
        for n in (16, 50, 200)
    ]
    means = [x.mean() for x in excess]
    assert means[0] > 2 * means[1] > 4 * means[2]
    assert -4 * excess[2].std() / np.sqrt(len(x0)) < means[2] < 0.1


def test_a_better_denoiser_needs_fewer_bits():
    x0, keys = draw(256)

    @jax.jit
    def needed(x0, keys, amount):
        def denoise(xt, logsnr):
            prediction = DATA.denoise(xt, logsnr)
            return dataclasses.replace(prediction, x0=prediction.x0 + amount)

        return bits(denoise, x0, keys, 32, LARGE).mean()

    got = [float(needed(x0, keys, amount)) for amount in (0.0, 0.02, 0.1)]
    assert got[0] < got[1] < got[2]


def test_terms_of_random_steps_times_their_number_average_to_the_whole_bound():
    num_steps, batch = 16, 32768
    schedule = make_schedule(
        "cosine", resolution=3, num_timesteps=num_steps, between_steps=False, cosine_offset=0.008
    )
    times = np.arange(num_steps, -1, -1) / num_steps
    x0, keys = draw(batch)
    whole = np.asarray(
        jax.jit(
            lambda x0, keys: bound.bits_per_dim(
                DATA.denoise, x0, keys, schedule=schedule, times=times, log_variance=LARGE
            )
        )(x0, keys),
        np.float64,
    )

    @jax.jit
    def estimate(x0):
        step = jax.random.randint(jax.random.key(3), (batch,), 1, num_steps + 1)
        logsnr = schedule(step / num_steps)
        xt = gaussian.diffuse(x0, logsnr, jax.random.normal(jax.random.key(4), x0.shape))
        term = bound.vlb_term(
            DATA.denoise(xt, logsnr),
            x0,
            xt,
            schedule((step - 1) / num_steps),
            logsnr,
            log_variance=LARGE,
            is_first=step == 1,
            min_logvar=bound.second_step_logvar(schedule, times),
        )
        return num_steps * term

    # The prior is no term, and nothing at all where alpha is 0 at t = 1.
    terms = np.asarray(estimate(x0), np.float64)
    error = np.hypot(terms.std(), whole.std()) / np.sqrt(batch)
    assert abs(terms.mean() - whole.mean()) < 4 * error
    assert error < 0.02 * whole.mean()


def test_adms_large_variance_differs_at_the_last_step_alone():
    steps = make_schedule(
        "linear",
        resolution=8,
        num_timesteps=10,
        between_steps=False,
        linear_beta_range=(1e-6, 2e-4),
    )
    betas = np.linspace(1e-6, 2e-4, 10) * 100
    kept = np.cumprod(1 - betas)
    posterior = betas * (1 - np.append(1.0, kept[:-1])) / (1 - kept)
    adms = np.append(posterior[1], betas[1:])  # as their code has it
    times = np.arange(11) / 10
    least = bound.second_step_logvar(steps, times[::-1][-3:])
    t, s = steps(jnp.asarray(times[1:])), steps(jnp.asarray(times[:-1]))
    prediction = Prediction(x0=t, eps=t)
    found = samplers.make_log_variance("adm_large")(prediction, s, t, least)
    np.testing.assert_allclose(np.exp(found), adms, rtol=1e-3)
    large = samplers.make_log_variance("large")(prediction, s, t, least)
    np.testing.assert_allclose(np.exp(large), betas, rtol=1e-3)
    sampled = samplers.make_log_variance("adm_large")(prediction, s, t)
    np.testing.assert_allclose(sampled, large)
