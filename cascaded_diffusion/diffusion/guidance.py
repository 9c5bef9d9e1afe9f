r"""Guidance and thresholding, between the network and the sampler.

Classifier-free guidance (Ho & Salimans 2021):

    (1)  eps = eps_uncond + scale (eps_cond - eps_uncond)

`scale` = 1 means no guidance, as in Imagen; the original paper's weight is scale - 1.
Kynkaanniemi et al. 2024 guide only in an interval of noise levels. The cascade paper itself
samples without guidance.

Thresholding keeps the predicted x0 in the range of images (Saharia et al. 2022,
section 2.3), after any guidance:

    (2)  static    x0 = clip(x0, -1, 1)
    (3)  dynamic   x0 = clip(x0, -s, s) / s,  s = max(1, percentile of |x0| in its image)
"""

import jax
import jax.numpy as jnp

from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.types import DenoiseFn, Prediction


def classifier_free(
    conditional: DenoiseFn,
    unconditional: DenoiseFn,
    scale: float,
    *,
    logsnr_range: tuple[jax.Array, jax.Array] | None = None,
) -> DenoiseFn:
    """Eq. (1) as a DenoiseFn.

    x0 is mixed alongside eps rather than derived from it: both are linear in the network's
    output, so the two agree without a division by alpha.

    With a `logsnr_range`, only levels from its first to its second are guided; every image of a
    batch must then have the same level, as in all samplers. Where there is no guidance, outside
    the range or with scale 1, the `unconditional` network does not run.
    """
    if scale == 1.0:
        return conditional

    def guided(xt: jax.Array, logsnr: jax.Array) -> Prediction:
        cond, uncond = conditional(xt, logsnr), unconditional(xt, logsnr)
        return Prediction(
            x0=uncond.x0 + scale * (cond.x0 - uncond.x0),
            eps=uncond.eps + scale * (cond.eps - uncond.eps),
            variance_fraction=cond.variance_fraction,
        )

    if logsnr_range is None:
        return guided
    low, high = logsnr_range

    def denoise(xt: jax.Array, logsnr: jax.Array) -> Prediction:
        inside = (low <= logsnr[0]) & (logsnr[0] <= high)
        return jax.lax.cond(inside, guided, conditional, xt, logsnr)

    return denoise


def static_threshold(x0: jax.Array) -> jax.Array:
    """Eq. (2)."""
    return jnp.clip(x0, -1.0, 1.0)


def dynamic_threshold(x0: jax.Array, percentile: float) -> jax.Array:
    """Eq. (3): `x0` [B, H, W, C] with `percentile` in (0, 1]."""
    s = jnp.quantile(jnp.abs(x0), percentile, axis=tuple(range(1, x0.ndim)), keepdims=True)
    s = jnp.maximum(s, 1.0)
    return jnp.clip(x0, -s, s) / s


def with_threshold(denoise: DenoiseFn, kind: str, percentile: float | None = None) -> DenoiseFn:
    """`denoise` with its x0 thresholded, and eps made to agree with it.

    `kind` is one of `THRESHOLDS`; "dynamic" needs the `percentile`, in (0, 1].
    """
    if kind == "none":
        return denoise

    def thresholded(xt: jax.Array, logsnr: jax.Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        if kind == "static":
            x0 = static_threshold(prediction.x0)
        else:
            x0 = dynamic_threshold(prediction.x0, percentile)
        return gaussian.with_x0(prediction, x0, xt, logsnr)

    return thresholded


THRESHOLDS = ("none", "static", "dynamic")
