import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import gaussian, losses
from tests.diffusion.gaussian_data import levels

LOGSNRS = np.float32([-9.0, -3.0, 0.0, 1.5, 1.7, 4.0, 9.0])
SNR = np.exp(LOGSNRS.astype(np.float64))
SLOPES = np.float32([900.0, 40.0, 6.3, 7.0, 7.1, 20.0, 300.0])  # -dlogsnr/dt
# On the error of x0, from the papers, in numpy.
WEIGHTS = {
    "snr": SNR,
    "truncated_snr": np.maximum(SNR, 1),
    "min_snr": np.minimum(SNR, 5),
    "sigmoid": SNR / (1 + np.exp(LOGSNRS - 2.0)) * SLOPES,
}


def _example(seed=1):
    """x0, eps and the x0 that a network might predict from them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return (jax.random.normal(key, (len(LOGSNRS), 4, 4, 1)) for key in keys)


def _output_for(x0_hat, x0, eps, parameterization):
    """What a network predicts, in another parameterization, whose x0 is `x0_hat`; float64."""
    alpha, sigma = (np.sqrt(x)[:, None, None, None] for x in levels(LOGSNRS))
    x0_hat, x0, eps = (np.asarray(x, np.float64) for x in (x0_hat, x0, eps))
    xt = alpha * x0 + sigma * eps
    eps_hat = (xt - alpha * x0_hat) / sigma
    return {"x0": x0_hat, "eps": eps_hat, "v": alpha * eps_hat - sigma * x0_hat}[parameterization]


def test_discrete_times_are_the_grid_without_zero():
    t = np.asarray(losses.uniform_t(jax.random.key(0), (4000,), num_timesteps=8))
    values, counts = np.unique(t, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(1, 9) / 8)
    np.testing.assert_allclose(counts, 500, atol=5 * np.sqrt(500))


def test_continuous_times_fill_the_interval():
    t = np.asarray(losses.uniform_t(jax.random.key(0), (4000,), num_timesteps=None))
    assert t.min() > 0
    assert t.max() <= 1
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


@pytest.mark.parametrize(("num_timesteps", "last"), [(10, 0.3), (1000, 0.3), (None, 0.3)])
def test_times_reach_the_largest_and_no_further(num_timesteps, last):
    t = losses.uniform_t(jax.random.key(0), (20_000,), num_timesteps=num_timesteps, max_t=last)
    assert t.min() > 0
    np.testing.assert_allclose(t.max(), last, rtol=1e-3)
    assert t.max() <= np.float32(last)


@pytest.mark.parametrize("parameterization", gaussian.PARAMETERIZATIONS)
def test_simple_loss_is_the_mean_squared_error_of_the_target(parameterization):
    x0, eps, output = _example()
    target = _output_for(x0, x0, eps, parameterization)
    got = losses.simple_loss(output, x0, LOGSNRS, eps, parameterization=parameterization)
    expected = np.square(np.asarray(output) - target).mean((1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("parameterization", gaussian.PARAMETERIZATIONS)
@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
def test_weighted_loss_is_of_the_x0_error_whatever_is_predicted(parameterization, weighting):
    x0, eps, x0_hat = _example()
    output = jnp.float32(_output_for(x0_hat, x0, eps, parameterization))
    got = losses.simple_loss(
        output,
        x0,
        LOGSNRS,
        eps,
        parameterization=parameterization,
        weighting=weighting,
        slope=SLOPES,
    )
    error = np.square(np.asarray(x0_hat, np.float64) - np.asarray(x0, np.float64)).mean((1, 2, 3))
    # Of eps near noise and of v near the image, the error is a small part of the output.
    np.testing.assert_allclose(got, WEIGHTS[weighting] * error, rtol=3e-4)


def test_snr_weighting_is_the_plain_loss_of_eps():
    x0, eps, output = _example()
    plain, weighted = (
        losses.simple_loss(output, x0, LOGSNRS, eps, parameterization="eps", weighting=weighting)
        for weighting in ("none", "snr")
    )
    np.testing.assert_array_equal(weighted, plain)


@pytest.mark.parametrize("parameterization", gaussian.PARAMETERIZATIONS)
@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
def test_weighted_losses_are_finite_at_the_ends_of_the_schedules(parameterization, weighting):
    ends = jnp.asarray([-23.0, -20.0, 20.0])
    image = jnp.ones((3, 2, 2, 1))
    got = losses.simple_loss(
        0 * image,
        image,
        ends,
        image,
        parameterization=parameterization,
        weighting=weighting,
        slope=jnp.asarray([0.0, 5e4, 5e4]),
    )
    assert np.isfinite(got).all()


def test_wrong_output_shape_is_refused():
    x = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match=r"network output has shape \(2, 4, 4, 3\)"):
        losses.simple_loss(jnp.zeros((2, 4, 4, 3)), x, jnp.zeros(2), x, parameterization="eps")
