r"""Grids of sampling times: from t = 1 down to t = 0 in any number of steps.

With u_i = i / N, i = 0 .. N:

    (1)  uniform     t_i = 1 - u_i
    (2)  quadratic   t_i = (1 - u_i)^2: shorter steps near the image
    (3)  logsnr      t_i with logsnr(t_i) linear in u_i; with discrete steps, t_{N-1} is
                     the first of them, and the last step leads from there to 0

Networks of the guided-diffusion family are sampled at these of T discrete steps (Dhariwal & Nichol
2021), and then at 0:

    (4)  respaced        i = 1 + round(k (T - 1) / (N - 1)),  k = N - 1 .. 0
    (5)  ddim_respaced   every n-th step, i = 1 + n k, where n leaves N of them

so that (4) has the first step and the last one, and (5) begins at pure noise though the level of
its first step is less.

Karras et al. 2022 (EDM, eq. 5) space s = exp(-logsnr / 2) evenly under a root, with rho = 7:

    (6)  karras      s_i = (s_0^(1/rho) + i / (N - 1) (s_{N-1}^(1/rho) - s_0^(1/rho)))^rho, i < N

from the largest level of the schedule or 80 to the least one or 0.002; then 0.

A model of T discrete steps knows only the times i / T. A grid is rounded to them, and its points
are kept apart, so that N <= T steps have N different times.
"""

import jax
import numpy as np

from cascaded_diffusion.types import Schedule

GRIDS = ("uniform", "quadratic", "logsnr", "karras", "respaced", "ddim_respaced")
_RHO, _LEAST_S, _LARGEST_S = 7, 0.002, 80.0


def _inverted(schedule: Schedule, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The levels at the knots, ascending and each once, and the times that have them."""
    with jax.ensure_compile_time_eval():
        logsnr = np.asarray(schedule(knots), np.float64)
    # np.interp needs an ascending abscissa. Equal values, where a schedule is cut, would map a
    # level to the wrong end of the cut.
    ascending, first = np.unique(logsnr[::-1], return_index=True)
    return ascending, knots[::-1][first]


def _karras(num_steps: int, schedule: Schedule, knots: np.ndarray) -> np.ndarray:
    """Eq. (6) as times; the largest s may be reached before t = 1."""
    ascending, times_of = _inverted(schedule, knots)
    largest = min(_LARGEST_S, float(np.exp(-ascending[0] / 2)))
    least = max(_LEAST_S, float(np.exp(-ascending[-1] / 2)))
    place = np.arange(num_steps) / max(num_steps - 1, 1)
    roots = largest ** (1 / _RHO) * (1 - place) + least ** (1 / _RHO) * place
    times = np.interp(-2 * np.log(roots**_RHO), ascending, times_of)
    return np.append(times, 0.0)


def _respaced(num_steps: int, num_timesteps: int) -> np.ndarray:
    """Eq. (4)."""
    stride = (num_timesteps - 1) / max(num_steps - 1, 1)
    # Summed up one by one, as there: halves are then rounded to the same side.
    places = np.cumsum([0.0] + [stride] * (num_steps - 1))
    return 1 + np.round(places[::-1]).astype(int)


def _every_nth(num_steps: int, num_timesteps: int) -> np.ndarray:
    """Eq. (5)."""
    n = -(-num_timesteps // num_steps)
    return np.arange(1, num_timesteps + 1, n)[::-1]


def _even_in_logsnr(u: np.ndarray, schedule: Schedule, knots: np.ndarray) -> np.ndarray:
    ascending, times_of = _inverted(schedule, knots)
    if knots[0] > 0:  # the last step leads from the first knot to 0, which has no level
        u = np.minimum(u * (len(u) - 1) / max(len(u) - 2, 1), 1)
    levels = ascending[0] + u * (ascending[-1] - ascending[0])
    times = np.interp(levels, ascending, times_of)
    times[0], times[-1] = 1.0, 0.0
    return times


def _knots(discrete_timesteps: int | None) -> np.ndarray:
    """The times, ascending to 1, between which a level is interpolated.

    With discrete steps, the level at t = 0 is a cut-off infinity, far from the first step's with
    nothing between; a grid that aimed there would waste a third of its points.
    """
    if discrete_timesteps is not None:
        return np.arange(1, discrete_timesteps + 1) / discrete_timesteps
    # Towards both ends the level changes with the logarithm of the distance to them.
    near = np.geomspace(1e-9, 0.5, 10_000)
    return np.concatenate([[0.0], near, 1 - near[-2::-1], [1.0]])


def time_grid(
    grid: str, num_steps: int, *, schedule: Schedule, discrete_timesteps: int | None
) -> np.ndarray:
    """The times of a chain, float32 [num_steps + 1], strictly descending from 1 to 0.

    `grid` is one of `GRIDS`; `discrete_timesteps` is T if only the times i / T exist, else None.
    Eqs. (4) and (5) are of discrete steps; (5) and (6) may begin below 1. Raises ValueError if
    there are more steps than times, or no n of eq. (5).
    """
    if discrete_timesteps is not None and num_steps > discrete_timesteps:
        raise ValueError(f"{num_steps} steps of {discrete_timesteps} discrete times")
    if grid in ("respaced", "ddim_respaced"):
        respace = _respaced if grid == "respaced" else _every_nth
        steps = respace(num_steps, discrete_timesteps)
        if len(steps) != num_steps:
            raise ValueError(f"{num_steps} steps of {discrete_timesteps} by {grid!r}")
        return (np.append(steps, 0) / discrete_timesteps).astype(np.float32)
    u = np.arange(num_steps + 1) / num_steps
    if grid == "karras":
        times = _karras(num_steps, schedule, _knots(discrete_timesteps))
    elif grid == "logsnr":
        times = _even_in_logsnr(u, schedule, _knots(discrete_timesteps))
    else:
        times = 1 - u if grid == "uniform" else (1 - u) ** 2
    if discrete_timesteps is None:
        return times.astype(np.float32)
    steps = np.round(times * discrete_timesteps).astype(int)
    # Keep them apart from below, then from above. The second pass cannot undo the first, since
    # there are enough times for all.
    room_below = np.arange(num_steps, -1, -1)
    steps = np.maximum.accumulate((steps - room_below)[::-1])[::-1] + room_below
    room_above = discrete_timesteps - np.arange(num_steps + 1)
    steps = np.minimum(steps, room_above)
    return (steps / discrete_timesteps).astype(np.float32)
