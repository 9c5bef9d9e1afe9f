import numpy as np
import pytest

from cascaded_diffusion.diffusion import grids
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule, make_schedule

COSINE = make_cosine_schedule(offset=0.008)


def cosine_steps(num_timesteps):
    return make_schedule(
        "cosine",
        resolution=8,
        num_timesteps=num_timesteps,
        between_steps=False,
        cosine_offset=0.008,
    )


def assert_strictly_down_from_one_to_zero(times, num_steps):
    assert times.shape == (num_steps + 1,)
    assert times.dtype == np.float32
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert (np.diff(times) < 0).all()


# In any number of steps, from 1 on.
FREE = ("uniform", "quadratic", "logsnr")


@pytest.mark.parametrize("grid", FREE)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 128, 1000])
def test_continuous_grids_go_strictly_down_from_one_to_zero(grid, num_steps):
    times = grids.time_grid(grid, num_steps, schedule=COSINE, discrete_timesteps=None)
    assert_strictly_down_from_one_to_zero(times, num_steps)


@pytest.mark.parametrize("grid", FREE)
@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 100, 1000])
def test_discrete_grids_visit_different_steps_of_the_model(grid, num_timesteps):
    schedule = cosine_steps(num_timesteps)
    rng = np.random.default_rng(num_timesteps)
    some = {1, 2, 3, num_timesteps - 1, num_timesteps, *rng.integers(1, num_timesteps + 1, 8)}
    for num_steps in sorted(n for n in some if 1 <= n <= num_timesteps):
        times = grids.time_grid(
            grid, num_steps, schedule=schedule, discrete_timesteps=num_timesteps
        )
        assert_strictly_down_from_one_to_zero(times, num_steps)
        steps = np.round(times.astype(np.float64) * num_timesteps)
        np.testing.assert_array_equal(times, np.float32(steps / num_timesteps))
        if num_steps == num_timesteps:
            np.testing.assert_array_equal(steps, np.arange(num_timesteps, -1, -1))


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_more_steps_than_the_model_has_are_refused(grid):
    with pytest.raises(ValueError, match="11 steps of 10 discrete times"):
        grids.time_grid(grid, 11, schedule=cosine_steps(10), discrete_timesteps=10)


@pytest.mark.parametrize(
    ("grid", "num_steps", "first", "last"),
    [
        ("respaced", 250, [0, 4, 8, 12, 16], [983, 987, 991, 995, 999]),
        ("respaced", 100, [0, 10, 20, 30, 40, 50, 61], [979, 989, 999]),
        ("respaced", 1000, [0, 1, 2], [997, 998, 999]),
        ("ddim_respaced", 25, [0, 40, 80], [880, 920, 960]),
        ("ddim_respaced", 1000, [0, 1, 2], [997, 998, 999]),
    ],
)
def test_respaced_steps_are_those_of_guided_diffusion(grid, num_steps, first, last):
    times = grids.time_grid(grid, num_steps, schedule=COSINE, discrete_timesteps=1000)
    assert times.dtype == np.float32
    assert len(times) == num_steps + 1
    assert times[-1] == 0
    indices = np.round(times[:-1].astype(np.float64) * 1000).astype(int)[::-1] - 1
    assert list(indices[: len(first)]) == first
    assert list(indices[-len(last) :]) == last


def test_every_nth_step_must_leave_as_many_as_asked_for():
    with pytest.raises(ValueError, match="300 steps of 1000 by 'ddim_respaced'"):
        grids.time_grid("ddim_respaced", 300, schedule=COSINE, discrete_timesteps=1000)


def test_uniform_and_quadratic_grids_are_their_formulas():
    uniform, quadratic = (
        grids.time_grid(grid, 4, schedule=COSINE, discrete_timesteps=None)
        for grid in ("uniform", "quadratic")
    )
    np.testing.assert_allclose(uniform, [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(quadratic, [1, 0.5625, 0.25, 0.0625, 0])


@pytest.mark.parametrize("num_steps", [5, 40, 200])
def test_the_logsnr_grid_is_uniform_in_logsnr_up_to_both_ends(num_steps):
    times = grids.time_grid("logsnr", num_steps, schedule=COSINE, discrete_timesteps=None)
    expected = np.linspace(-20, 20, num_steps + 1)
    np.testing.assert_allclose(COSINE(times), expected, atol=5e-3)


def test_the_discrete_logsnr_grid_is_uniform_up_to_the_first_step():
    # t = 0 has no level of its own: 20 is infinity cut off.
    schedule = cosine_steps(4000)
    times = grids.time_grid("logsnr", 20, schedule=schedule, discrete_timesteps=4000)
    assert times[-2] == np.float32(1 / 4000)
    # At the noise end the model's own steps are further apart than the grid's.
    middle = np.asarray(schedule(times))[6:-1]
    np.testing.assert_allclose(np.diff(middle), np.diff(middle).mean(), rtol=0.05)


@pytest.mark.parametrize("num_timesteps", [None, 1000])
def test_the_karras_grid_is_even_under_the_seventh_root(num_timesteps):
    schedule = COSINE if num_timesteps is None else cosine_steps(num_timesteps)
    times = grids.time_grid("karras", 18, schedule=schedule, discrete_timesteps=num_timesteps)
    assert times[-1] == 0
    assert (np.diff(times) < 0).all()
    sigmas = np.exp(-0.5 * np.asarray(schedule(times[:-1]), np.float64))
    assert sigmas[0] == pytest.approx(80, rel=1e-3 if num_timesteps is None else 0.3)
    steps = np.diff(sigmas ** (1 / 7))
    if num_timesteps is None:  # else the levels are those of the nearest steps
        np.testing.assert_allclose(steps, steps.mean(), rtol=2e-2)
