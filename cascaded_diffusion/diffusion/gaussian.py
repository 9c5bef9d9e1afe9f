r"""Gaussian diffusion: the forward process, its conversions and its posterior.

    (1)  q(xt | x0) = N(alpha_t x0, sigma_t^2 I)
    (2)  alpha_t^2 = sigmoid(logsnr_t),  sigma_t^2 = sigmoid(-logsnr_t)
    (3)  xt  = alpha_t x0 + sigma_t eps
    (4)  v   = alpha_t eps - sigma_t x0
         (Salimans & Ho 2022; then x0 = alpha_t xt - sigma_t v,
          eps = sigma_t xt + alpha_t v)

For s < t, with r = exp(logsnr_t - logsnr_s) <= 1,

    (5)  q(xs | xt, x0) = N(mu, var)
         mu  = r (alpha_s / alpha_t) xt + (1 - r) alpha_s x0
         var = (1 - r) sigma_s^2                     ("small", beta-tilde)

Eq. (5) is Ho et al. 2020, eq. (7), written in logsnr. `1 - r` is `-expm1(...)`.
In the same terms the step's own beta, and the variance that a network learns as a
fraction f of the way between the two (Nichol & Dhariwal 2021, eq. 15), are

    (6)  beta   = (1 - r) sigma_t^2                  ("large")
    (7)  logvar = f log beta + (1 - f) log beta-tilde
"""

import dataclasses

import jax
import jax.numpy as jnp

from cascaded_diffusion.types import Prediction


def broadcast_right(x: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes `x` [B] to [B, 1, ..., 1] so that it multiplies `like` [B, ...]."""
    return jnp.reshape(x, x.shape + (1,) * (like.ndim - x.ndim))


def alpha_sigma_from_logsnr(logsnr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eq. (2): alpha and sigma, each with the shape of `logsnr`."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def alpha_sigma_like(logsnr: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eq. (2) for `logsnr` [B], shaped [B, 1, ..., 1] to multiply `image` [B, ...]."""
    return alpha_sigma_from_logsnr(broadcast_right(logsnr, image))


def diffuse(x0: jax.Array, logsnr: jax.Array, eps: jax.Array) -> jax.Array:
    """Eq. (3): noises `x0` [B, ...] to level `logsnr` [B] with `eps` [B, ...]."""
    alpha, sigma = alpha_sigma_like(logsnr, x0)
    return alpha * x0 + sigma * eps


def predict_x0_from_eps(xt: jax.Array, logsnr: jax.Array, eps: jax.Array) -> jax.Array:
    """Eq. (3) solved for x0. At logsnr -20 it amplifies errors by e^10: clip it."""
    alpha, sigma = alpha_sigma_like(logsnr, xt)
    return (xt - sigma * eps) / alpha


def predict_eps_from_x0(xt: jax.Array, logsnr: jax.Array, x0: jax.Array) -> jax.Array:
    """Eq. (3) solved for eps. Amplifies errors by e^10 at logsnr +20."""
    alpha, sigma = alpha_sigma_like(logsnr, xt)
    return (xt - alpha * x0) / sigma


def v_from_x0_and_eps(x0: jax.Array, logsnr: jax.Array, eps: jax.Array) -> jax.Array:
    """Eq. (4)."""
    alpha, sigma = alpha_sigma_like(logsnr, x0)
    return alpha * eps - sigma * x0


def predict_x0_from_v(xt: jax.Array, logsnr: jax.Array, v: jax.Array) -> jax.Array:
    """Eq. (4) solved for x0; well conditioned at every noise level."""
    alpha, sigma = alpha_sigma_like(logsnr, xt)
    return alpha * xt - sigma * v


def predict_eps_from_v(xt: jax.Array, logsnr: jax.Array, v: jax.Array) -> jax.Array:
    """Eq. (4) solved for eps; well conditioned at every noise level."""
    alpha, sigma = alpha_sigma_like(logsnr, xt)
    return sigma * xt + alpha * v


# (xt, logsnr, output) -> (x0, eps).
_READERS = {
    "eps": lambda xt, logsnr, eps: (predict_x0_from_eps(xt, logsnr, eps), eps),
    "x0": lambda xt, logsnr, x0: (x0, predict_eps_from_x0(xt, logsnr, x0)),
    "v": lambda *args: (predict_x0_from_v(*args), predict_eps_from_v(*args)),
}
PARAMETERIZATIONS = tuple(_READERS)


def prediction_from_output(
    output: jax.Array, xt: jax.Array, logsnr: jax.Array, *, parameterization: str
) -> Prediction:
    """Reads a network's output for `xt` [B, H, W, C] at `logsnr` [B] as `eps`, `x0` or `v`.

    `output` is [B, H, W, C], or [B, H, W, 2C] if a learned variance follows the image, as numbers
    from about -1 to 1 that stand for the fraction of eq. (7).
    """
    channels = xt.shape[-1]
    x0, eps = _READERS[parameterization](xt, logsnr, output[..., :channels])
    learned = output.shape[-1] > channels
    fraction = (output[..., channels:] + 1) / 2 if learned else None
    return Prediction(x0=x0, eps=eps, variance_fraction=fraction)


def target_from(
    x0: jax.Array, logsnr: jax.Array, eps: jax.Array, *, parameterization: str
) -> jax.Array:
    """What the network's output [B, H, W, C] should be."""
    if parameterization == "eps":
        return eps
    if parameterization == "x0":
        return x0
    return v_from_x0_and_eps(x0, logsnr, eps)


def with_x0(prediction: Prediction, x0: jax.Array, xt: jax.Array, logsnr: jax.Array) -> Prediction:
    """The prediction with another x0, and the eps that agrees with it."""
    return dataclasses.replace(prediction, x0=x0, eps=predict_eps_from_x0(xt, logsnr, x0))


def posterior(
    x0: jax.Array, xt: jax.Array, logsnr_s: jax.Array, logsnr_t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Eq. (5): mean [B, ...] and variance [B, 1, ...] of q(xs | xt, x0), s < t.

    If s = t, the mean is exactly `xt` and the variance 0.
    """
    logsnr_s, logsnr_t = broadcast_right(logsnr_s, xt), broadcast_right(logsnr_t, xt)
    alpha_s, sigma_s = alpha_sigma_from_logsnr(logsnr_s)
    alpha_t, _ = alpha_sigma_from_logsnr(logsnr_t)
    r, one_minus_r = jnp.exp(logsnr_t - logsnr_s), -jnp.expm1(logsnr_t - logsnr_s)
    mean = r * (alpha_s / alpha_t) * xt + one_minus_r * alpha_s * x0
    return mean, one_minus_r * sigma_s**2


def step_logvars(
    logsnr_s: jax.Array, logsnr_t: jax.Array, min_logvar: jax.Array | float = -jnp.inf
) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the small (eq. 5) and the large variance (eq. 6), like `logsnr_s`, s < t.

    The small one is at least `min_logvar`. If s = t, both are -infinity.
    """
    log_one_minus_r = jnp.log(-jnp.expm1(logsnr_t - logsnr_s))
    return (
        jnp.maximum(log_one_minus_r + jax.nn.log_sigmoid(-logsnr_s), min_logvar),
        log_one_minus_r + jax.nn.log_sigmoid(-logsnr_t),
    )
