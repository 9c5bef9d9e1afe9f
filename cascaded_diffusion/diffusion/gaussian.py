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

from __future__ import annotations

import jax
import jax.numpy as jnp

from cascaded_diffusion.types import Prediction


def broadcast_right(x: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes `x` [B] to [B, 1, ..., 1] so that it multiplies `like` [B, ...]."""
    return jnp.reshape(x, x.shape + (1,) * (like.ndim - x.ndim))


def alpha_sigma_from_logsnr(logsnr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eq. (2): alpha and sigma, each with the shape of `logsnr`."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def _alpha_sigma_like(logsnr: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    return alpha_sigma_from_logsnr(broadcast_right(logsnr, image))


def diffuse(x0: jax.Array, logsnr: jax.Array, eps: jax.Array) -> jax.Array:
    """Eq. (3): noises `x0` [B, ...] to level `logsnr` [B] with `eps` [B, ...]."""
    alpha, sigma = _alpha_sigma_like(logsnr, x0)
    return alpha * x0 + sigma * eps


def predict_x0_from_eps(xt: jax.Array, logsnr: jax.Array, eps: jax.Array) -> jax.Array:
    """Eq. (3) solved for x0. At logsnr -20 it amplifies errors by e^10: clip it."""
    alpha, sigma = _alpha_sigma_like(logsnr, xt)
    return (xt - sigma * eps) / alpha


def predict_eps_from_x0(xt: jax.Array, logsnr: jax.Array, x0: jax.Array) -> jax.Array:
    """Eq. (3) solved for eps. Amplifies errors by e^10 at logsnr +20."""
    alpha, sigma = _alpha_sigma_like(logsnr, xt)
    return (xt - alpha * x0) / sigma


def v_from_x0_and_eps(x0: jax.Array, logsnr: jax.Array, eps: jax.Array) -> jax.Array:
    """Eq. (4)."""
    alpha, sigma = _alpha_sigma_like(logsnr, x0)
    return alpha * eps - sigma * x0


def predict_x0_from_v(xt: jax.Array, logsnr: jax.Array, v: jax.Array) -> jax.Array:
    """Eq. (4) solved for x0; well conditioned at every noise level."""
    alpha, sigma = _alpha_sigma_like(logsnr, xt)
    return alpha * xt - sigma * v


def predict_eps_from_v(xt: jax.Array, logsnr: jax.Array, v: jax.Array) -> jax.Array:
    """Eq. (4) solved for eps; well conditioned at every noise level."""
    alpha, sigma = _alpha_sigma_like(logsnr, xt)
    return sigma * xt + alpha * v


def _prediction_from_eps(xt: jax.Array, logsnr: jax.Array, eps: jax.Array) -> Prediction:
    return Prediction(x0=predict_x0_from_eps(xt, logsnr, eps), eps=eps)


def _prediction_from_x0(xt: jax.Array, logsnr: jax.Array, x0: jax.Array) -> Prediction:
    return Prediction(x0=x0, eps=predict_eps_from_x0(xt, logsnr, x0))


def _prediction_from_v(xt: jax.Array, logsnr: jax.Array, v: jax.Array) -> Prediction:
    return Prediction(x0=predict_x0_from_v(xt, logsnr, v), eps=predict_eps_from_v(xt, logsnr, v))


_PREDICTIONS = {
    "eps": _prediction_from_eps,
    "x0": _prediction_from_x0,
    "v": _prediction_from_v,
}
PARAMETERIZATIONS = tuple(_PREDICTIONS)


def prediction_from_output(
    output: jax.Array, xt: jax.Array, logsnr: jax.Array, *, parameterization: str
) -> Prediction:
    """Reads a network's output as `eps`, `x0` or `v`.

    Args:
      output: [B, H, W, C], or [B, H, W, 2C] where a learned variance follows the
        image: then a number from about -1 to 1 stands for the fraction of eq. (7).
      xt: [B, H, W, C], the network's input.
      logsnr: [B], its noise level.
      parameterization: one of `PARAMETERIZATIONS`.
    """
    channels = xt.shape[-1]
    prediction = _PREDICTIONS[parameterization](xt, logsnr, output[..., :channels])
    if output.shape[-1] == channels:
        return prediction
    fraction = (output[..., channels:] + 1) / 2
    return Prediction(x0=prediction.x0, eps=prediction.eps, variance_fraction=fraction)


def target_from(
    x0: jax.Array, logsnr: jax.Array, eps: jax.Array, *, parameterization: str
) -> jax.Array:
    """What the network's output [B, H, W, C] should have been."""
    if parameterization == "eps":
        return eps
    if parameterization == "x0":
        return x0
    return v_from_x0_and_eps(x0, logsnr, eps)


def with_x0(prediction: Prediction, x0: jax.Array, xt: jax.Array, logsnr: jax.Array) -> Prediction:
    """The prediction with another x0, and the eps that agrees with it."""
    return Prediction(
        x0=x0,
        eps=predict_eps_from_x0(xt, logsnr, x0),
        variance_fraction=prediction.variance_fraction,
    )


def posterior(
    x0: jax.Array, xt: jax.Array, logsnr_s: jax.Array, logsnr_t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Eq. (5): mean [B, ...] and variance [B, 1, ...] of q(xs | xt, x0), s < t.

    Where s = t it is the identity: mean `xt`, variance 0, exactly.
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

    The small one is cut off below at `min_logvar`. Where s = t both are -infinity.
    """
    log_one_minus_r = jnp.log(-jnp.expm1(logsnr_t - logsnr_s))
    return (
        jnp.maximum(log_one_minus_r + jax.nn.log_sigmoid(-logsnr_s), min_logvar),
        log_one_minus_r + jax.nn.log_sigmoid(-logsnr_t),
    )
