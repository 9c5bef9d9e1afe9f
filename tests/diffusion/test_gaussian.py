import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import gaussian

LOGSNRS = [-8.0, -2.0, 0.0, 3.0, 8.0]


def _draw(seed: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    shape = (len(LOGSNRS), 4, 4, 3)
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


def test_variance_is_preserved():
    alpha, sigma = gaussian.alpha_sigma_from_logsnr(jnp.asarray(LOGSNRS))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
    np.testing.assert_allclose(jnp.log(alpha**2 / sigma**2), LOGSNRS, atol=1e-5)


def test_posterior_is_bayes_rule():
    # q(xs | xt, x0) is proportional to q(xt | xs) q(xs | x0): multiply the two
    # Gaussians in float64 and compare.
    logsnr_s, logsnr_t = 1.3, -0.7
    alpha2 = lambda logsnr: 1 / (1 + np.exp(-logsnr))  # noqa: E731
    a_s, a_t = np.sqrt(alpha2(logsnr_s)), np.sqrt(alpha2(logsnr_t))
    var_s, var_t = 1 - a_s**2, 1 - a_t**2
    a_ts = a_t / a_s
    var_ts = var_t - a_ts**2 * var_s
    x0, xt = 0.4, -1.1
    precision = 1 / var_s + a_ts**2 / var_ts
    expected_var = 1 / precision
    expected_mean = expected_var * (a_s * x0 / var_s + a_ts * xt / var_ts)

    mean, var = gaussian.posterior(
        jnp.full((1, 1, 1, 1), x0),
        jnp.full((1, 1, 1, 1), xt),
        jnp.asarray([logsnr_s]),
        jnp.asarray([logsnr_t]),
    )
    np.testing.assert_allclose(mean.item(), expected_mean, rtol=1e-5)
    np.testing.assert_allclose(var.item(), expected_var, rtol=1e-5)


def test_posterior_over_no_time_is_the_identity():
    x0, xt = _draw(1)
    logsnr = jnp.asarray(LOGSNRS)
    mean, var = gaussian.posterior(x0, xt, logsnr, logsnr)
    np.testing.assert_array_equal(mean, xt)
    np.testing.assert_array_equal(var, 0.0)


def test_clipping_keeps_x0_and_eps_consistent():
    x0, eps = _draw(2)
    logsnr = jnp.asarray(LOGSNRS)
    xt = gaussian.diffuse(x0, logsnr, eps)
    wild = gaussian.prediction_from_output(3 * x0, xt, logsnr, parameterization="x0")
    clipped = gaussian.clip_x0(wild, xt, logsnr)
    assert np.abs(clipped.x0).max() <= 1.0
    np.testing.assert_allclose(gaussian.diffuse(clipped.x0, logsnr, clipped.eps), xt, atol=1e-5)
