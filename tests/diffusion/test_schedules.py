import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion.schedules import SCHEDULES, make_cosine_schedule


def _iddpm_alpha_bar(t: np.ndarray) -> np.ndarray:
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    return f(t) / f(np.zeros(()))


@pytest.mark.parametrize("num_timesteps", [100, 1000, 4000])
def test_cosine_at_discrete_steps_is_iddpm(num_timesteps):
    t = np.arange(1, num_timesteps) / num_timesteps
    expected = _iddpm_alpha_bar(t.astype(np.float64))
    logsnr = np.asarray(make_cosine_schedule()(jnp.asarray(t)), np.float64)
    np.testing.assert_allclose(1 / (1 + np.exp(-logsnr)), expected, atol=1e-6)


def test_cosine_keeps_its_digits_near_zero():
    # 1 - alpha_bar computed in float32 would be off by percents here.
    t = np.asarray([1e-4, 1e-3, 1e-2])
    expected = np.log(_iddpm_alpha_bar(t) / (1 - _iddpm_alpha_bar(t)))
    logsnr = make_cosine_schedule(logsnr_max=40.0)(jnp.asarray(t))
    np.testing.assert_allclose(logsnr, expected, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_finite_and_decreasing(name):
    logsnr = np.asarray(SCHEDULES[name]()(jnp.linspace(0.0, 1.0, 1001)))
    assert np.isfinite(logsnr).all()
    assert (np.diff(logsnr) <= 0).all()
    assert logsnr[0] == 20.0
    assert logsnr[-1] == -20.0
    assert (np.diff(logsnr[20:-20]) < 0).all()
