import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import gaussian
from tests.diffusion.gaussian_data import levels

LOGSNRS = [-8.0, -2.0, 0.0, 3.0, 8.0]
# Pairs (s, t) from the noise end to the image end, short steps and long ones.
STEPS = [(-9.0, -20.0), (-2.0, -2.1), (1.3, -0.7), (3.0, 2.9), (20.0, -20.0), (12.0, 9.0)]


def _draw(seed, size=5):
    keys = jax.random.split(jax.random.key(seed))
    shape = (size, 4, 4, 3)
    return jax.random.uniform(keys[0], shape, minval=-1), jax.random.normal(keys[1], shape)


@pytest.mark.parametrize("parameterization", gaussian.PARAMETERIZATIONS)
def test_prediction_inverts_target(parameterization):
    x0, eps = _draw(0)
    logsnr = jnp.asarray(LOGSNRS)
    xt = gaussian.diffuse(x0, logsnr, eps)
    target = gaussian.target_from(x0, logsnr, eps, parameterization=parameterization)
    got = gaussian.prediction_from_output(target, xt, logsnr, parameterization=parameterization)
    # eps at high and x0 at low logsnr are amplified by up to e^4.
    np.testing.assert_allclose(got.x0, x0, atol=5e-5)
    np.testing.assert_allclose(got.eps, eps, atol=5e-5)
    assert got.variance_fraction is None


def test_v_is_well_conditioned_at_both_ends():
    x0, eps = _draw(1, size=2)
    logsnr = jnp.asarray([-20.0, 20.0])
    xt = gaussian.diffuse(x0, logsnr, eps)
    v = gaussian.v_from_x0_and_eps(x0, logsnr, eps)
    np.testing.assert_allclose(gaussian.predict_x0_from_v(xt, logsnr, v), x0, atol=1e-6)
    np.testing.assert_allclose(gaussian.predict_eps_from_v(xt, logsnr, v), eps, atol=1e-6)


@pytest.mark.parametrize("parameterization", gaussian.PARAMETERIZATIONS)
def test_the_second_half_of_the_channels_is_a_variance_fraction(parameterization):
    x0, xt = _draw(2)
    logsnr = jnp.asarray(LOGSNRS)
    plain = gaussian.prediction_from_output(x0, xt, logsnr, parameterization=parameterization)
    raw = jnp.linspace(-1, 1, x0.size).reshape(x0.shape)
    both = jnp.concatenate([x0, raw], axis=-1)
    got = gaussian.prediction_from_output(both, xt, logsnr, parameterization=parameterization)
    np.testing.assert_array_equal(got.x0, plain.x0)
    np.testing.assert_array_equal(got.eps, plain.eps)
    np.testing.assert_allclose(got.variance_fraction.min(), 0.0)  # -1: the small variance
    np.testing.assert_allclose(got.variance_fraction.max(), 1.0)  # +1: the large one


def test_variance_is_preserved():
    alpha, sigma = gaussian.alpha_sigma_from_logsnr(jnp.asarray(LOGSNRS))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
    np.testing.assert_allclose(jnp.log(alpha**2 / sigma**2), LOGSNRS, atol=1e-5)


@pytest.mark.parametrize(("logsnr_s", "logsnr_t"), STEPS)
def test_posterior_is_bayes_rule(logsnr_s, logsnr_t):
    # q(xs | xt, x0) is proportional to q(xt | xs) q(xs | x0): multiply the two
    # Gaussians in float64 and compare.
    logsnr_s, logsnr_t = np.float32(logsnr_s), np.float32(logsnr_t)
    (alpha2_s, var_s), (alpha2_t, _) = levels(logsnr_s), levels(logsnr_t)
    alpha_ts = np.sqrt(alpha2_t / alpha2_s)
    beta = -np.expm1(np.log(alpha2_t) - np.log(alpha2_s))
    x0, xt = 0.4, -1.1
    precision = 1 / var_s + alpha_ts**2 / beta
    expected_mean = (np.sqrt(alpha2_s) * x0 / var_s + alpha_ts * xt / beta) / precision

    image = jnp.ones((1, 1, 1, 1))
    mean, var = gaussian.posterior(
        x0 * image, xt * image, jnp.asarray([logsnr_s]), jnp.asarray([logsnr_t])
    )
    small, large = gaussian.step_logvars(jnp.asarray(logsnr_s), jnp.asarray(logsnr_t))
    np.testing.assert_allclose(mean.item(), expected_mean, rtol=1e-5)
    np.testing.assert_allclose(var.item(), 1 / precision, rtol=1e-5)
    np.testing.assert_allclose(small, -np.log(precision), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(large, np.log(beta), rtol=1e-5, atol=1e-6)


def test_posterior_over_no_time_is_the_identity():
    x0, xt = _draw(3)
    logsnr = jnp.asarray(LOGSNRS)
    mean, var = gaussian.posterior(x0, xt, logsnr, logsnr)
    np.testing.assert_array_equal(mean, xt)
    np.testing.assert_array_equal(var, 0.0)
    small, large = gaussian.step_logvars(logsnr, logsnr)
    np.testing.assert_array_equal(jnp.exp(small), 0.0)
    np.testing.assert_array_equal(jnp.exp(large), 0.0)


def test_the_small_variance_is_cut_off_below_and_the_large_is_not():
    small, large = gaussian.step_logvars(jnp.asarray(20.0), jnp.asarray(9.0), -15.0)
    assert small == -15.0
    assert large == gaussian.step_logvars(jnp.asarray(20.0), jnp.asarray(9.0))[1]


def test_another_x0_brings_the_eps_that_agrees_with_it():
    x0, eps = _draw(4)
    logsnr = jnp.asarray(LOGSNRS)
    xt = gaussian.diffuse(x0, logsnr, eps)
    output = jnp.concatenate([3 * x0, x0], axis=-1)
    wild = gaussian.prediction_from_output(output, xt, logsnr, parameterization="x0")
    tamed = gaussian.with_x0(wild, jnp.clip(wild.x0, -1, 1), xt, logsnr)
    assert np.abs(tamed.x0).max() <= 1.0
    np.testing.assert_allclose(gaussian.diffuse(tamed.x0, logsnr, tamed.eps), xt, atol=1e-5)
    np.testing.assert_array_equal(tamed.variance_fraction, wild.variance_fraction)
