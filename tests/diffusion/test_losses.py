import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import gaussian, guidance, losses


def test_discrete_times_are_the_grid_without_zero():
    t = np.asarray(losses.uniform_t(jax.random.key(0), (4000,), num_timesteps=8))
    np.testing.assert_array_equal(np.unique(t), np.arange(1, 9) / 8)


def test_continuous_times_fill_the_interval():
    t = np.asarray(losses.uniform_t(jax.random.key(0), (4000,), num_timesteps=None))
    assert t.min() > 0
    assert t.max() <= 1
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


@pytest.mark.parametrize("parameterization", gaussian.PARAMETERIZATIONS)
def test_simple_loss_is_the_mean_squared_error_of_the_target(parameterization):
    keys = jax.random.split(jax.random.key(1), 3)
    x0, eps, output = (jax.random.normal(key, (2, 4, 4, 1)) for key in keys)
    logsnr = jnp.asarray([-1.0, 2.0])
    a = np.sqrt(1 / (1 + np.exp([1.0, -2.0])))[:, None, None, None]
    s = np.sqrt(1 - a**2)
    target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[parameterization]
    got = losses.simple_loss(output, x0, logsnr, eps, parameterization=parameterization)
    expected = np.square(np.asarray(output) - np.asarray(target)).mean((1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_wrong_output_shape_is_refused():
    x = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match=r"network output has shape \(2, 4, 4, 3\)"):
        losses.simple_loss(jnp.zeros((2, 4, 4, 3)), x, jnp.zeros(2), x, parameterization="eps")


def test_guidance_extrapolates_both_forms_and_costs_nothing_at_one():
    def denoiser(x0):
        return lambda xt, logsnr: gaussian.prediction_from_output(
            jnp.full_like(xt, x0), xt, logsnr, parameterization="x0"
        )

    def must_not_run(xt, logsnr):
        raise AssertionError

    xt, logsnr = jnp.full((1, 2, 2, 1), 0.5), jnp.asarray([0.7])
    assert guidance.classifier_free(denoiser(0.2), must_not_run, 1.0)(xt, logsnr).x0[0, 0, 0] == 0.2
    guided = guidance.classifier_free(denoiser(0.2), denoiser(0.1), 3.0)(xt, logsnr)
    np.testing.assert_allclose(guided.x0, 0.4, atol=1e-6)
    # x0 and eps still describe the same xt.
    np.testing.assert_allclose(gaussian.diffuse(guided.x0, logsnr, guided.eps), xt, atol=1e-6)
