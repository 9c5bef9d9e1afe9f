import math

import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import bound, gaussian, schedules

LINEAR = (1e-4, 0.02)


def make(name, num_timesteps=None, between_steps=False, resolution=64, reference=32):
    return schedules.make_schedule(
        name,
        resolution=resolution,
        num_timesteps=num_timesteps,
        between_steps=between_steps,
        cosine_offset=0.008 if name == "cosine" else None,
        linear_beta_range=LINEAR if name == "linear" else None,
        reference_resolution=reference if name == "shifted_cosine" else None,
    )


def iddpm(name, num_timesteps):
    """Betas, alpha-bars and posterior variances of steps 1 to T, in plain Python floats.

    Straight from the papers' text; cos^2 is written as (1 + cos 2a) / 2.
    """
    betas = []
    for i in range(1, num_timesteps + 1):
        if name == "linear":
            share = (i - 1) / (num_timesteps - 1)
            betas.append((LINEAR[0] * (1 - share) + LINEAR[1] * share) * 1000 / num_timesteps)
        else:
            now, before = (
                1 + math.cos(math.pi * (j / num_timesteps + 0.008) / 1.008) for j in (i, i - 1)
            )
            betas.append(min((before - now) / before, 0.999))
    abars, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        abars.append(product)
    posterior = [
        beta * (1 - before) / (1 - now)
        for beta, before, now in zip(betas, [1.0, *abars[:-1]], abars, strict=True)
    ]
    return np.asarray(betas), np.asarray(abars), np.asarray(posterior)


def read(schedule, num_timesteps):
    """Log-SNR at the steps 0 to T, as a model sees it: float32."""
    return np.asarray(schedule(jnp.arange(num_timesteps + 1) / num_timesteps))


# (name, T): {step: (beta, alpha-bar)}, computed with 50 digits.
GOLDEN = {
    ("cosine", 4000): {
        1: (9.865818813592e-6, 9.999901341812e-1),
        2: (1.016941488432e-5, 9.999799648666e-1),
        1000: (3.310751796363e-4, 8.470121613269e-1),
        3000: (1.894929048609e-3, 1.442721023857e-1),
        3999: (7.499999620564e-1, 1.517980468850e-7),
        4000: (0.999, 1.517980468850e-10),
    },
    ("linear", 1000): {
        1: (1e-4, 0.9999),
        2: (1.199199199199e-4, 9.997800920721e-1),
        500: (1.004004004004e-2, 7.858724288178e-2),
        1000: (2e-2, 4.035829765376e-5),
    },
    ("linear", 2000): {
        1: (5e-5, 0.99995),
        1000: (5.022511255628e-3, 7.882579893156e-2),
        2000: (1e-2, 4.175557062850e-5),
    },
}


@pytest.mark.parametrize(("name", "num_timesteps"), GOLDEN)
def test_betas_and_variances_read_off_the_schedule_are_iddpms(name, num_timesteps):
    betas, abars, posterior = iddpm(name, num_timesteps)
    logsnr = read(make(name, num_timesteps), num_timesteps)
    got_abars = 1 / (1 + np.exp(-logsnr.astype(np.float64)))
    got_betas = 1 - got_abars[1:] / got_abars[:-1]
    np.testing.assert_allclose(got_abars[1:], abars, atol=1e-6)
    np.testing.assert_allclose(got_betas, betas, atol=1e-6)
    for step, (beta, abar) in GOLDEN[name, num_timesteps].items():
        np.testing.assert_allclose(got_betas[step - 1], beta, atol=1e-6)
        np.testing.assert_allclose(got_abars[step], abar, atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose([betas[step - 1], abars[step - 1]], [beta, abar], rtol=1e-9)

    small, large = gaussian.step_logvars(jnp.asarray(logsnr[:-1]), jnp.asarray(logsnr[1:]))
    np.testing.assert_allclose(np.exp(small), posterior, atol=1e-6)
    np.testing.assert_allclose(np.exp(large), betas, atol=1e-6)
    # Small variances are right to a part in a thousand too.
    np.testing.assert_allclose(small[1:], np.log(posterior[1:]), atol=2e-3)
    np.testing.assert_allclose(large, np.log(betas), atol=2e-3)


@pytest.mark.parametrize(("name", "num_timesteps"), GOLDEN)
def test_the_clipped_log_variance_of_the_first_step_is_that_of_the_second(name, num_timesteps):
    _, _, posterior = iddpm(name, num_timesteps)
    schedule = make(name, num_timesteps)
    times = np.arange(num_timesteps, -1, -1) / num_timesteps
    logsnr = read(schedule, num_timesteps)
    small, _ = gaussian.step_logvars(
        jnp.asarray(logsnr[:-1]),
        jnp.asarray(logsnr[1:]),
        bound.second_step_logvar(schedule, times),
    )
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    np.testing.assert_allclose(small, clipped, atol=2e-3)
    np.testing.assert_allclose(np.exp(small), np.exp(clipped), atol=1e-6)
    assert small[0] == small[1]


def test_a_chain_of_one_step_has_the_large_variance():
    schedule = make("cosine")
    got = bound.second_step_logvar(schedule, np.asarray([1.0, 0.0]))
    assert got == gaussian.step_logvars(schedule(0.0), schedule(1.0))[1]


def test_continuous_cosine_is_the_table_away_from_its_last_betas():
    t = np.arange(1, 3990) / 4000
    np.testing.assert_allclose(make("cosine")(t), make("cosine", 4000)(t), atol=1e-3)
    np.testing.assert_allclose(make("cosine")(t[:3000]), make("cosine", 4000)(t[:3000]), atol=2e-5)


def test_continuous_linear_is_the_limit_of_many_steps():
    t = np.linspace(0.05, 1, 50)
    errors = [
        np.abs(make("linear")(t) - make("linear", n, between_steps=True)(t)).max()
        for n in (1000, 4000, 16000)
    ]
    assert errors[0] < 0.2
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_cosine_keeps_its_digits_near_zero():
    # 1 - alpha_bar computed in float32 would be off by percents here.
    t = np.float32([1e-6, 1e-4, 1e-3, 1e-2]).astype(np.float64)
    abar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    schedule = schedules.make_cosine_schedule(offset=0.008, logsnr_max=40.0)
    np.testing.assert_allclose(schedule(t), np.log(abar / (1 - abar)), rtol=1e-6)


def test_cosine_without_offset_is_a_tangent():
    t = np.linspace(0.01, 0.99, 99)
    schedule = schedules.make_cosine_schedule(offset=0.0)
    np.testing.assert_allclose(schedule(t), -2 * np.log(np.tan(np.pi * t / 2)), atol=2e-5)


@pytest.mark.parametrize(("resolution", "reference"), [(64, 64), (256, 64), (32, 64)])
def test_shifted_cosine_is_the_cosine_shifted(resolution, reference):
    t = np.linspace(0.01, 0.99, 99)
    shifted = make("shifted_cosine", resolution=resolution, reference=reference)
    plain = schedules.make_cosine_schedule(offset=0.0)
    expected = plain(t) + 2 * math.log(reference / resolution)
    np.testing.assert_allclose(shifted(t), expected, atol=2e-5)
    in_steps = make("shifted_cosine", 1000, resolution=resolution, reference=reference)
    steps = np.arange(5, 995) / 1000
    np.testing.assert_allclose(in_steps(steps), shifted(steps), atol=1e-3)


@pytest.mark.parametrize(("name", "steps"), [("cosine", 50), ("linear", 1000)])
def test_levels_between_steps_are_uniform_between_the_neighbours(name, steps):
    table, between = make(name, steps), make(name, steps, between_steps=True)
    grid = np.arange(steps + 1) / steps
    np.testing.assert_allclose(between(grid), table(grid), atol=2e-3)
    abar = 1 / (1 + np.exp(-np.asarray(table(grid), np.float64)))
    # alpha^2 linear in t is alpha^2 uniform for a uniform t.
    for step in (0, 1, steps // 2, steps - 1):
        u = np.linspace(0.05, 0.95, 10)
        got = 1 / (1 + np.exp(-np.asarray(between((step + u) / steps), np.float64)))
        np.testing.assert_allclose(got, abar[step] + u * (abar[step + 1] - abar[step]), atol=1e-6)


def test_without_levels_between_a_time_has_the_nearest_steps():
    table = make("cosine", 10)
    np.testing.assert_array_equal(table(jnp.asarray([0.26, 0.34])), table(jnp.asarray([0.3, 0.3])))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [None, 100, 1000])
@pytest.mark.parametrize("between_steps", [False, True])
def test_schedules_are_finite_and_decreasing(name, num_timesteps, between_steps):
    t = np.linspace(0.0, 1.0, 1001)
    logsnr = np.asarray(make(name, num_timesteps, between_steps)(t))
    assert np.isfinite(logsnr).all()
    assert (np.diff(logsnr) <= 0).all()
    assert logsnr[0] == 20.0
    assert logsnr[-1] < -9.0
    if num_timesteps != 100 or between_steps:
        assert (np.diff(logsnr[20:-20]) < 0).all()


def test_so_few_linear_steps_that_a_beta_reaches_one_are_refused():
    with pytest.raises(ValueError, match="a beta of 1 with 20 steps"):
        make("linear", 20)


@pytest.mark.parametrize("between_steps", [False, True])
@pytest.mark.parametrize("num_timesteps", [None, 50])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_slope_is_the_change_of_the_log_snr_with_time(name, num_timesteps, between_steps):
    schedule = make(name, num_timesteps, between_steps)
    discrete = num_timesteps is not None and not between_steps
    t = (jnp.arange(2, 48) + (0.0 if discrete else 0.5)) / 50
    got = schedules.slope_of(schedule, t, num_timesteps=num_timesteps if discrete else None)
    ahead, behind = (0.0, 1 / 50) if discrete else (1e-3, 1e-3)
    expected = (schedule(t - behind) - schedule(t + ahead)) / (ahead + behind)
    np.testing.assert_allclose(got, expected, rtol=1e-5 if discrete else 0.02)


def test_weighted_by_the_slope_a_mean_over_time_is_an_integral_over_the_log_snr():
    t = (jnp.arange(20_000) + 0.5) / 20_000
    means = []
    for name in ("cosine", "shifted_cosine", "linear"):
        schedule = make(name)
        slope = schedules.slope_of(schedule, t, num_timesteps=None)
        means.append(float((jnp.exp(-((schedule(t) / 2) ** 2)) * slope).mean()))
    np.testing.assert_allclose(means, 2 * math.sqrt(math.pi), rtol=1e-3)


def test_the_slope_is_zero_where_a_schedule_is_cut():
    t = jnp.asarray([1e-7, 1.0])
    np.testing.assert_array_equal(
        schedules.slope_of(make("shifted_cosine"), t, num_timesteps=None), 0.0
    )
