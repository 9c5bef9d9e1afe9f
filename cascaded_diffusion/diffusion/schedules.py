r"""Noise schedules: `t -> logsnr`.

The forward process of a variance-preserving diffusion is

    (1)  q(xt | x0) = N(alpha_t x0, sigma_t^2 I),   alpha_t^2 + sigma_t^2 = 1
    (2)  logsnr_t   = log(alpha_t^2 / sigma_t^2)

with `t` in [0, 1]. Step `i` of a process of `T` discrete steps is the time t = i / T; in DDPM's
notation

    (3)  alpha_{i/T}^2 = abar_i = prod_{j <= i} (1 - beta_j)

**Cosine** (Nichol & Dhariwal 2021, "Improved DDPM", eq. 17), offset o = 0.008:

    (4)  alpha_t^2 = f(t) / f(0),   f(t) = cos^2(pi/2 * (t + o) / (1 + o))
    (5)  beta_i = min(1 - abar_i / abar_{i-1}, 0.999)          (T steps)

With a = pi/2 * (t + o) / (1 + o) and a0 its value at t = 0,
sigma_t^2 = (f(0) - f(t)) / f(0), and sin^2 a - sin^2 a0 factors, so

    (6)  logsnr_t = log cos^2(a) - log(sin(a + a0) sin(a - a0))

which keeps all its digits near t = 0, where 1 - alpha_t^2 loses them.

**Linear** (Ho et al. 2020: beta from 1e-4 to 0.02 in 1000 steps); T steps have betas scaled by
1000 / T, and continuous time is the limit of many steps:

    (7)  beta_i = (1000 / T) (b0 + (b1 - b0) (i - 1) / (T - 1))
    (8)  log alpha_t^2 = -1000 (b0 t + (b1 - b0) t^2 / 2)

**Shifted cosine** (Hoogeboom et al. 2023, "simple diffusion"): an image of d x d pixels keeps the
look of one of d0 x d0 pixels if its noise grows with its size,

    (9)  logsnr_t = -2 log tan(pi t / 2) + 2 log(d0 / d)

**Levels between the steps** (Saharia et al. 2021, SR3, eq. 11; Chen et al. 2020, WaveGrad, did so
with its root): abar is drawn uniformly between the levels of two neighbouring steps. This equals
a continuous uniform t with alpha_t^2 linear in t between its values at i / T.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.types import Schedule

LOGSNR_MIN, LOGSNR_MAX = -20.0, 20.0
MAX_BETA = 0.999


def make_cosine_schedule(
    *, offset: float, logsnr_min: float = LOGSNR_MIN, logsnr_max: float = LOGSNR_MAX
) -> Schedule:
    """The cosine schedule in continuous time, eq. (6), cut to [logsnr_min, logsnr_max].

    The `offset` o of eq. (4) keeps the first steps from being vanishingly small. Uncut, the curve
    goes from +infinity at t = 0 to -infinity at t = 1.
    """
    a0 = math.pi / 2 * offset / (1 + offset)

    def logsnr_from_t(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        # a - a0 is computed first: it is exactly 0 at t = 0, where the logarithm is -inf, which
        # the clip turns into logsnr_max.
        a_minus_a0 = math.pi / 2 * t / (1 + offset)
        log_alpha2 = 2 * jnp.log(jnp.abs(jnp.cos(a_minus_a0 + a0)))
        log_sigma2 = jnp.log(jnp.sin(a_minus_a0 + 2 * a0)) + jnp.log(jnp.sin(a_minus_a0))
        # No nan can arise, since at t = 0 only the second term is infinite and at t = 1 only
        # the first.
        return jnp.clip(log_alpha2 - log_sigma2, logsnr_min, logsnr_max)

    return logsnr_from_t


def make_linear_schedule(first_beta: float, last_beta: float) -> Schedule:
    """The linear schedule in continuous time, eq. (8), cut at `LOGSNR_MAX`."""

    def logsnr_from_t(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        log_alpha2 = -1000.0 * (first_beta * t + 0.5 * (last_beta - first_beta) * t**2)
        return jnp.minimum(log_alpha2 - jnp.log(-jnp.expm1(log_alpha2)), LOGSNR_MAX)

    return logsnr_from_t


def make_shifted_cosine_schedule(*, resolution: int, reference_resolution: int) -> Schedule:
    """The cosine schedule shifted for images of `resolution` = d, eq. (9); d0 is the reference."""
    shift = 2 * math.log(reference_resolution / resolution)
    plain = make_cosine_schedule(
        offset=0.0, logsnr_min=LOGSNR_MIN - shift, logsnr_max=LOGSNR_MAX - shift
    )
    return lambda t: plain(t) + shift


def cosine_betas(num_timesteps: int, offset: float) -> np.ndarray:
    """Eq. (5): [T] float64."""
    t = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos(math.pi / 2 * (t + offset) / (1 + offset)) ** 2
    return np.minimum(1 - f[1:] / f[:-1], MAX_BETA)


def linear_betas(num_timesteps: int, first_beta: float, last_beta: float) -> np.ndarray:
    """Eq. (7): [T] float64. Raises ValueError for so few steps that a beta would reach 1."""
    betas = np.linspace(first_beta, last_beta, num_timesteps) * 1000 / num_timesteps
    if betas.max() >= 1:
        raise ValueError(f"a beta of {betas.max():.3g} with {num_timesteps} steps")
    return betas


def betas_of(schedule: Schedule, num_timesteps: int) -> np.ndarray:
    """The betas of any schedule read at t = i / T: [T] float64."""
    with jax.ensure_compile_time_eval():
        logsnr = np.asarray(schedule(jnp.arange(num_timesteps + 1) / num_timesteps), np.float64)
    log_abar = -np.logaddexp(0.0, -logsnr)
    return np.minimum(-np.expm1(np.diff(log_abar)), MAX_BETA)


def make_table_schedule(betas: np.ndarray, *, between_steps: bool) -> Schedule:
    """The schedule of T given betas, float64 [T], eq. (3).

    A time between two steps has the level of the nearest step, or with `between_steps` one
    between theirs: alpha^2 is interpolated. Raises ValueError if neighbouring steps have the same
    level.
    """
    num_timesteps = len(betas)
    abar = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    # 1 - abar in float32 would lose its digits at small t, so both ends have a table.
    alpha2, sigma2 = jnp.float32(abar), jnp.float32(1.0 - abar)
    with np.errstate(divide="ignore"):
        levels = np.float32(np.minimum(np.log(abar) - np.log(1.0 - abar), LOGSNR_MAX))
    if not (np.diff(levels) < 0).all():
        same = int(np.argmax(np.diff(levels) >= 0))
        raise ValueError(
            f"steps {same} and {same + 1} of {num_timesteps} have the same noise level; take fewer"
            " steps or a noisier schedule"
        )
    logsnr = jnp.asarray(levels)

    def logsnr_from_t(t: jax.Array) -> jax.Array:
        position = jnp.asarray(t, jnp.float32) * num_timesteps
        if not between_steps:
            return logsnr[jnp.clip(jnp.round(position).astype(jnp.int32), 0, num_timesteps)]
        below = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, num_timesteps - 1)
        weight = position - below
        log_alpha2, log_sigma2 = (
            jnp.log((1 - weight) * table[below] + weight * table[below + 1])
            for table in (alpha2, sigma2)
        )
        return jnp.minimum(log_alpha2 - log_sigma2, LOGSNR_MAX)

    return logsnr_from_t


def slope_of(schedule: Schedule, t: jax.Array, *, num_timesteps: int | None) -> jax.Array:
    """-dlogsnr/dt at times t > 0, of any shape; with T discrete steps, that of the step to t.

    It is 0 where the schedule is cut to its bounds.
    """
    if num_timesteps is not None:
        return num_timesteps * (schedule(t - 1.0 / num_timesteps) - schedule(t))
    return -jax.jvp(schedule, (t,), (jnp.ones_like(t),))[1]


def make_schedule(
    name: str,
    *,
    resolution: int,
    num_timesteps: int | None,
    between_steps: bool,
    cosine_offset: float | None = None,
    linear_beta_range: tuple[float, ...] | None = None,
    reference_resolution: int | None = None,
) -> Schedule:
    """The schedule `name`, one of `SCHEDULES`, of T steps or, without any, in continuous time.

    "cosine" needs its offset, "linear" the first and the last beta of 1000 steps, and
    "shifted_cosine" the images' resolution and that of the reference.
    """
    if name == "linear":
        if num_timesteps is None:
            return make_linear_schedule(*linear_beta_range)
        betas = linear_betas(num_timesteps, *linear_beta_range)
    elif name == "cosine":
        if num_timesteps is None:
            return make_cosine_schedule(offset=cosine_offset)
        betas = cosine_betas(num_timesteps, cosine_offset)
    else:
        shifted = make_shifted_cosine_schedule(
            resolution=resolution, reference_resolution=reference_resolution
        )
        if num_timesteps is None:
            return shifted
        betas = betas_of(shifted, num_timesteps)
    return make_table_schedule(betas, between_steps=between_steps)


SCHEDULES = ("cosine", "linear", "shifted_cosine")
