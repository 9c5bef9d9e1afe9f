r"""The variational bound: as a loss, and as the bits per dimension of a trained model.

With the T steps of a chain from t = 1 to t = 0 (Nichol & Dhariwal 2021, eq. 4-7):

    (1)  L_vlb = sum of terms (+ prior),  term = KL(q(xs | xt, x0) || p(xs | xt))
    (2)  the last term, to t = 0, is -log p(x0 | xt), x0 one of 256 pixel values
         (Ho et al. 2020, eq. 13);  prior = KL(q(x1 | x0) || N(0, I)) has no parameters
    (3)  L_hybrid = L_simple + weight L_vlb, the mean of p detached in L_vlb: the bound
         then trains the learned variance alone; weight 0.001

All in bits per dimension. A uniform draw of one step estimates the sum by T term.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.diffusion.losses import mean_per_example
from cascaded_diffusion.diffusion.samplers import LogVariance, fold_in_each, normal_per_image
from cascaded_diffusion.types import DenoiseFn, Prediction, Schedule


def second_step_logvar(schedule: Schedule, times: np.ndarray) -> jax.Array:
    """The small log-variance of the second step from t = 0, a scalar.

    The first step's posterior has no variance at all; it is given the second one's (Nichol &
    Dhariwal 2021), so this is the smallest log-variance. A chain of a single step has no second
    and takes the large log-variance.
    """
    if len(times) < 3:
        return gaussian.step_logvars(schedule(times[-1]), schedule(times[-2]))[1]
    return gaussian.step_logvars(schedule(times[-2]), schedule(times[-3]))[0]


def normal_kl(
    mean_q: jax.Array, logvar_q: jax.Array, mean_p: jax.Array, logvar_p: jax.Array
) -> jax.Array:
    """KL(q || p) of two Gaussians in nats, elementwise."""
    # Thousands of such terms are summed. For two nearly equal variances, exp(d) - 1 - d would
    # be nothing but rounding.
    d = logvar_q - logvar_p
    return 0.5 * (jnp.expm1(d) - d + jnp.square(mean_q - mean_p) * jnp.exp(-logvar_p))


def discretized_log_likelihood(x0: jax.Array, mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """log of the mass that N(mean, exp(logvar)) puts on the pixel value of `x0`, elementwise.

    Eq. (2). The 256 values lie 2/255 apart in [-1, 1]; the lowest and the highest have the tails.
    """
    half, inv_std = 1.0 / 255.0, jnp.exp(-0.5 * logvar)
    above, below = inv_std * (x0 - mean + half), inv_std * (x0 - mean - half)
    # Far in a tail, the difference of two masses is lost to rounding, unless it is taken in
    # logarithms on the side where both are small.
    right = below > 0
    high, low = jnp.where(right, -below, above), jnp.where(right, -above, below)
    log_high, log_low = jax.scipy.stats.norm.logcdf(high), jax.scipy.stats.norm.logcdf(low)
    inside = log_high + jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))
    at_low_end = jax.scipy.stats.norm.logcdf(above)
    at_high_end = jax.scipy.stats.norm.logcdf(-below)
    return jnp.where(x0 < -0.999, at_low_end, jnp.where(x0 > 0.999, at_high_end, inside))


def vlb_term(
    prediction: Prediction,
    x0: jax.Array,
    xt: jax.Array,
    logsnr_s: jax.Array,
    logsnr_t: jax.Array,
    *,
    log_variance: LogVariance,
    is_first: jax.Array,
    min_logvar: jax.Array,
) -> jax.Array:
    """One term of eq. (1) per example, in bits per dimension: [B].

    `x0` [B, H, W, C] are pixel values. The step leads from `logsnr_t` to `logsnr_s`, both [B];
    `is_first` [B] says whether it ends at t = 0. `min_logvar` is from `second_step_logvar`.
    """
    s, t = gaussian.broadcast_right(logsnr_s, xt), gaussian.broadcast_right(logsnr_t, xt)
    logvar_q, _ = gaussian.step_logvars(s, t, min_logvar)
    mean_q, _ = gaussian.posterior(x0, xt, logsnr_s, logsnr_t)
    mean_p, _ = gaussian.posterior(prediction.x0, xt, logsnr_s, logsnr_t)
    logvar_p = log_variance(prediction, s, t, min_logvar)
    kl = normal_kl(mean_q, logvar_q, mean_p, logvar_p)
    nll = -discretized_log_likelihood(x0, mean_p, logvar_p)
    term = jnp.where(gaussian.broadcast_right(is_first, xt), nll, kl)
    return mean_per_example(term) / math.log(2.0)


def mean_detached(prediction: Prediction) -> Prediction:
    """The prediction, through which only the gradient of its variance flows, eq. (3)."""
    return dataclasses.replace(
        prediction,
        x0=jax.lax.stop_gradient(prediction.x0),
        eps=jax.lax.stop_gradient(prediction.eps),
    )


def bits_per_dim(
    denoise: DenoiseFn,
    x0: jax.Array,
    keys: jax.Array,
    *,
    schedule: Schedule,
    times: np.ndarray,
    log_variance: LogVariance,
) -> jax.Array:
    """Eq. (1) and (2) in full, one draw of noise per step: [B] bits per dimension.

    `denoise` is neither guided nor thresholded beyond the range of pixels. `x0` [B, H, W, C] are
    pixel values in [-1, 1], `keys` [B] typed PRNG keys, and `times` [T + 1] descend from 1 to 0.
    """
    batch = x0.shape[0]
    min_logvar = second_step_logvar(schedule, times)
    times = jnp.asarray(times, jnp.float32)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        logsnr_t, logsnr_s = (
            jnp.full((batch,), schedule(t), jnp.float32) for t in (times[i], times[i + 1])
        )
        noise = normal_per_image(fold_in_each(keys, i), x0.shape[1:])
        xt = gaussian.diffuse(x0, logsnr_t, noise)
        return total + vlb_term(
            denoise(xt, logsnr_t),
            x0,
            xt,
            logsnr_s,
            logsnr_t,
            log_variance=log_variance,
            is_first=jnp.full((batch,), times[i + 1] == 0.0),
            min_logvar=min_logvar,
        )

    alpha2, sigma2 = (jax.nn.sigmoid(x) for x in (schedule(times[0]), -schedule(times[0])))
    prior = normal_kl(jnp.sqrt(alpha2) * x0, jnp.log(sigma2), jnp.zeros_like(x0), 0.0)
    first = mean_per_example(prior) / math.log(2.0)
    return jax.lax.fori_loop(0, len(times) - 1, body, first)
