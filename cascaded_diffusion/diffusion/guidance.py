r"""Classifier-free guidance (Ho & Salimans 2021).

    (1)  eps = eps_uncond + scale (eps_cond - eps_uncond)

`scale` = 1 is no guidance, as in Imagen; the original paper's weight is
scale - 1. The cascade paper itself samples without guidance.
"""

from __future__ import annotations

import jax

from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.types import DenoiseFn, Prediction


def classifier_free(conditional: DenoiseFn, unconditional: DenoiseFn, scale: float) -> DenoiseFn:
    """Eq. (1) as a DenoiseFn. With scale 1 the unconditional network never runs.

    x0 is mixed alongside eps rather than derived from it: both are linear in
    the network's output, so the two agree, and no division by alpha is needed.
    """
    if scale == 1.0:
        return conditional

    def denoise(xt: jax.Array, logsnr: jax.Array) -> Prediction:
        cond, uncond = conditional(xt, logsnr), unconditional(xt, logsnr)
        return Prediction(
            x0=uncond.x0 + scale * (cond.x0 - uncond.x0),
            eps=uncond.eps + scale * (cond.eps - uncond.eps),
            logvar=cond.logvar,
        )

    return denoise


def with_clipping(denoise: DenoiseFn) -> DenoiseFn:
    """Static thresholding of the predicted x0 to [-1, 1], after any guidance."""

    def clipped(xt: jax.Array, logsnr: jax.Array) -> Prediction:
        return gaussian.clip_x0(denoise(xt, logsnr), xt, logsnr)

    return clipped
