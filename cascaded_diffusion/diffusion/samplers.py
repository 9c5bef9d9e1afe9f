r"""Samplers: from noise at t = 1 to an image at t = 0, or to any time between.

Every sampler repeats one step, from t to s < t, along a grid of times. With x0_hat and eps_hat,
the network's prediction at (xt, t):

    (1)  ancestral   xs ~ N(mu(xt, x0_hat), exp(logvar))         (gaussian eq. (5))
                     logvar small, large, between, or learned    (gaussian eq. (5)-(7))
    (2)  DDIM        xs = alpha_s x0_hat + sqrt(sigma_s^2 - w^2) eps_hat + w n
                     w^2 = eta^2 beta-tilde; eta = 0 draws no noise
                     (Song et al. 2021, eq. 12 and 16; eta = 1 is (1), small)

Without noise, the chain solves an ordinary differential equation. With
a = alpha / sigma = exp(logsnr / 2) it reads

    (3)  d(x / sigma) = x0_hat(x, t) da

DDIM is Euler's method for (3). Two methods of second order:

    (4)  Heun            two evaluations: x0_hat at t, and at s where an Euler step leads;
                         xs = (sigma_s / sigma_t) xt + (alpha_s - sigma_s a_t) mean of both
    (5)  DPM-Solver++(2M) one evaluation: extrapolates x0_hat from the last two,
                         in lambda = logsnr / 2 with h = lambda_s - lambda_t, h' the step before:
                         D  = x0_hat + h / (2 h') (x0_hat - x0_hat')
                         xs = (sigma_s / sigma_t) xt - alpha_s expm1(-h) D
                         (Lu et al. 2022, algorithm 2)

Karras et al. 2022 (EDM, algorithm 2) take the same correction in z = x / alpha over the noise level
s = sigma / alpha = exp(-logsnr / 2), with u the step's noise, optional:

    (6)  EDM             s^ = (1 + g) s_t,  z^ = z + sqrt(s^ ^2 - s_t^2) S_noise u
                         g = min(S_churn / N, sqrt(2) - 1) where S_min <= s_t <= S_max, else 0
                         d(z, s) = (z - x0_hat) / s;  Heun's method for dz / ds = d from s^ to s_s

A last step to t = 0 returns x0_hat itself.

Truncation (Ho et al. 2021, section 3.2) stops the chain at t = stop_t > 0 and returns the still
noisy image: grid points below `stop_t` are never visited, and the last step ends on it exactly.
`stop_t` may be traced, so a sweep over truncation levels compiles once.

An image's noise in step i comes from `fold_in(key of that image, i)`, so an image depends neither
on its batch nor on how the batch is sharded.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.types import DenoiseFn, Prediction, Schedule


@dataclasses.dataclass(frozen=True)
class Transition:
    """What a step from t to s < t starts from, besides the network."""

    xt: jax.Array  # [B, H, W, C]
    logsnr_s: jax.Array  # [B]
    logsnr_t: jax.Array  # [B]
    noise: jax.Array  # [B, H, W, C] standard normal
    is_last: jax.Array  # scalar, whether s = 0
    x0_before: jax.Array  # [B, H, W, C] x0_hat of the step before
    logsnr_before: jax.Array  # [B] where that step began; at the first step logsnr_t


# -> (xs, the prediction at xt).
Step = Callable[[DenoiseFn, Transition], tuple[jax.Array, Prediction]]

# (prediction, logsnr_s, logsnr_t, min_logvar) -> log-variance. The levels have the
# image's rank; see `gaussian.step_logvars` for `min_logvar`.
LogVariance = Callable[..., jax.Array]


def make_log_variance(kind: str, interpolation: float | None = None) -> LogVariance:
    """The variance of an ancestral step, one of `VARIANCES`; "learned" is gaussian eq. (7).

    An `interpolation` of 0 is small, 1 is large (log-linear; Imagen's gamma). "adm_large" is
    large, but at the step to t = 0 the small one of the step before, as guided-diffusion has it;
    it differs in the bound alone, since no noise is drawn there.
    """
    if kind == "adm_large":
        return _adm_large
    fixed = {"small": 0.0, "large": 1.0, "interpolated": interpolation, "learned": None}[kind]

    def log_variance(
        prediction: Prediction,
        logsnr_s: jax.Array,
        logsnr_t: jax.Array,
        min_logvar: jax.Array | float = -jnp.inf,
    ) -> jax.Array:
        small, large = gaussian.step_logvars(logsnr_s, logsnr_t, min_logvar)
        if fixed in (0.0, 1.0):  # 0 times an infinite logarithm is not 0
            return large if fixed else small
        weight = prediction.variance_fraction if fixed is None else fixed
        return weight * large + (1 - weight) * small

    return log_variance


def _adm_large(
    prediction: Prediction,
    logsnr_s: jax.Array,
    logsnr_t: jax.Array,
    min_logvar: jax.Array | float = -jnp.inf,
) -> jax.Array:
    small, large = gaussian.step_logvars(logsnr_s, logsnr_t)
    # Small variances grow with t, so only that of the last step is below the one before it.
    return jnp.where(small < min_logvar, min_logvar, large)


VARIANCES = ("small", "large", "interpolated", "learned", "adm_large")


def make_ancestral(log_variance: LogVariance) -> Step:
    """Eq. (1)."""

    def step(denoise: DenoiseFn, at: Transition) -> tuple[jax.Array, Prediction]:
        prediction = denoise(at.xt, at.logsnr_t)
        mean, _ = gaussian.posterior(prediction.x0, at.xt, at.logsnr_s, at.logsnr_t)
        levels = (gaussian.broadcast_right(x, at.xt) for x in (at.logsnr_s, at.logsnr_t))
        return mean + jnp.exp(0.5 * log_variance(prediction, *levels)) * at.noise, prediction

    return step


def make_ddim(eta: float = 0.0) -> Step:
    """Eq. (2). With eta 0 the noise is not used, and XLA never draws it."""

    def step(denoise: DenoiseFn, at: Transition) -> tuple[jax.Array, Prediction]:
        prediction = denoise(at.xt, at.logsnr_t)
        if eta == 0.0:
            return gaussian.diffuse(prediction.x0, at.logsnr_s, prediction.eps), prediction
        _, var = gaussian.posterior(prediction.x0, at.xt, at.logsnr_s, at.logsnr_t)
        alpha_s, sigma_s = gaussian.alpha_sigma_like(at.logsnr_s, at.xt)
        direction = jnp.sqrt(jnp.maximum(sigma_s**2 - eta**2 * var, 0.0)) * prediction.eps
        xs = alpha_s * prediction.x0 + direction + eta * jnp.sqrt(var) * at.noise
        return xs, prediction

    return step


def heun_step(denoise: DenoiseFn, at: Transition) -> tuple[jax.Array, Prediction]:
    """Eq. (4). The step to t = 0 needs no second evaluation and makes none."""
    prediction = denoise(at.xt, at.logsnr_t)
    alpha_s, sigma_s = gaussian.alpha_sigma_like(at.logsnr_s, at.xt)
    alpha_t, sigma_t = gaussian.alpha_sigma_like(at.logsnr_t, at.xt)

    def xs_from(x0: jax.Array) -> jax.Array:
        ratio = sigma_s / sigma_t
        return ratio * at.xt + (alpha_s - ratio * alpha_t) * x0

    def corrected() -> jax.Array:
        second = denoise(xs_from(prediction.x0), at.logsnr_s)
        return xs_from(0.5 * (prediction.x0 + second.x0))

    return jax.lax.cond(at.is_last, lambda: prediction.x0, corrected), prediction


def dpmpp_2m_step(denoise: DenoiseFn, at: Transition) -> tuple[jax.Array, Prediction]:
    """Eq. (5). The first step has no step before it and is Euler's."""
    prediction = denoise(at.xt, at.logsnr_t)
    h = gaussian.broadcast_right(at.logsnr_s - at.logsnr_t, at.xt) / 2
    h_before = gaussian.broadcast_right(at.logsnr_t - at.logsnr_before, at.xt) / 2
    weight = jnp.where(h_before > 0, h / (2 * jnp.where(h_before > 0, h_before, 1.0)), 0.0)
    extrapolated = prediction.x0 + weight * (prediction.x0 - at.x0_before)
    alpha_s, sigma_s = gaussian.alpha_sigma_like(at.logsnr_s, at.xt)
    _, sigma_t = gaussian.alpha_sigma_like(at.logsnr_t, at.xt)
    return (sigma_s / sigma_t) * at.xt - alpha_s * jnp.expm1(-h) * extrapolated, prediction


def make_edm(churn: tuple[float, ...] | None = None, num_steps: int = 1) -> Step:
    """Eq. (6). `churn` is (S_churn, S_min, S_max, S_noise); None adds no noise."""
    amount, low, high, inflation = churn or (0.0, 0.0, 0.0, 1.0)
    largest = min(amount / num_steps, 2**0.5 - 1)

    def step(denoise: DenoiseFn, at: Transition) -> tuple[jax.Array, Prediction]:
        def evaluate(z: jax.Array, s: jax.Array) -> tuple[jax.Array, Prediction]:
            logsnr = -2 * jnp.log(s)
            alpha, _ = gaussian.alpha_sigma_like(logsnr, z)
            prediction = denoise(alpha * z, logsnr)
            return (z - prediction.x0) / gaussian.broadcast_right(s, z), prediction

        s_t, s_s = (jnp.exp(-0.5 * logsnr) for logsnr in (at.logsnr_t, at.logsnr_s))
        g = jnp.where((s_t >= low) & (s_t <= high), largest, 0.0)
        raised = (1 + g) * s_t
        added = jnp.sqrt(jnp.maximum(raised**2 - s_t**2, 0.0)) * inflation
        alpha_t, _ = gaussian.alpha_sigma_like(at.logsnr_t, at.xt)
        alpha_s, _ = gaussian.alpha_sigma_like(at.logsnr_s, at.xt)
        z = at.xt / alpha_t
        if largest > 0:
            z = z + gaussian.broadcast_right(added, z) * at.noise
        slope, prediction = evaluate(z, raised)
        length = gaussian.broadcast_right(s_s - raised, z)

        def corrected() -> jax.Array:
            second, _ = evaluate(z + length * slope, s_s)
            return alpha_s * (z + length * 0.5 * (slope + second))

        return jax.lax.cond(at.is_last, lambda: prediction.x0, corrected), prediction

    return step


SAMPLERS = ("ancestral", "ddim", "dpmpp_2m", "heun", "edm")


def make_step(
    name: str,
    *,
    variance: str | None = None,
    variance_interpolation: float | None = None,
    eta: float | None = None,
    churn: tuple[float, ...] | None = None,
    num_steps: int = 1,
) -> Step:
    """The step of the sampler `name`, one of `SAMPLERS`.

    "ancestral" has a `variance`, one of `VARIANCES`, "interpolated" its
    `variance_interpolation`, "ddim" its `eta`, and "edm" perhaps a `churn`, which depends on the
    number of steps.
    """
    if name == "edm":
        return make_edm(churn, num_steps)
    if name == "ancestral":
        return make_ancestral(make_log_variance(variance, variance_interpolation))
    if name == "ddim":
        return make_ddim(eta)
    return {"heun": heun_step, "dpmpp_2m": dpmpp_2m_step}[name]


def evaluation_times(name: str, times: np.ndarray, stop_t: float) -> np.ndarray:
    """The times at which a chain along `times`, stopped at `stop_t`, evaluates the network."""
    visited = times[:-1][times[:-1] > stop_t * (1 + 1e-6)]  # as `sample` has it
    if name not in ("heun", "edm"):
        return visited
    ends = np.append(visited[1:], stop_t)
    return np.concatenate([visited, ends[ends > 0]])


def fold_in_each(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """One branch of every key: [B] keys -> [B] keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def normal_per_image(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise, [B] keys -> [B, *shape], image by image."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample(
    denoise: DenoiseFn,
    xt: jax.Array,
    keys: jax.Array,
    *,
    schedule: Schedule,
    step: Step,
    times: np.ndarray,
    stop_t: jax.Array | float = 0.0,
) -> jax.Array:
    """Runs the reverse chain from t = 1 to t = stop_t as one compiled loop.

    It begins with noise `xt` [B, H, W, C], takes a typed PRNG key of `keys` [B] per image, and
    visits `times` [num_steps + 1], which descend from 1 to 0. `stop_t`, in [0, 1), is a scalar,
    traced or not.

    Returns [B, H, W, C] at noise level `stop_t`; at 0 the clean image rather than the slightly
    noisy x at the schedule's highest logsnr.
    """
    stop_t = jnp.asarray(stop_t, jnp.float32)
    times = jnp.asarray(times, jnp.float32)
    batch = xt.shape[0]
    # A stop_t that lies on the grid up to rounding must not add a step of no length. The margin
    # is relative, since grids have points far below 1e-6, and stop_t = 0 must cut none of them.
    steps_run = jnp.sum(times[:-1] > stop_t * (1 + 1e-6))

    def logsnr_at(t: jax.Array) -> jax.Array:
        return jnp.full((batch,), schedule(t), jnp.float32)

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        xt, x0_before, logsnr_before = carry
        s = jnp.where(i + 1 == steps_run, stop_t, times[i + 1])
        logsnr_t, logsnr_s = logsnr_at(times[i]), logsnr_at(s)
        noise = normal_per_image(fold_in_each(keys, i), xt.shape[1:])
        is_last = s == 0.0
        xs, prediction = step(
            denoise, Transition(xt, logsnr_s, logsnr_t, noise, is_last, x0_before, logsnr_before)
        )
        return jnp.where(is_last, prediction.x0, xs), prediction.x0, logsnr_t

    first = (xt, jnp.zeros_like(xt), logsnr_at(times[0]))
    return jax.lax.fori_loop(0, steps_run, body, first)[0]
