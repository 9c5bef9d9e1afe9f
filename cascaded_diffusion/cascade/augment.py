r"""Conditioning augmentation: damage the low-res input on purpose (paper, section 3).

A super-resolution stage is trained on real low-res images and used on generated
ones. Damaging its input while training hides the difference from it. The Gaussian
variant runs the low-res model's own forward process, at low resolution:

    (1)  z_s = alpha_s z_0 + sigma_s eps,      s ~ U{1/T, ..., 1} or U(0, 1]

The strength `s` = `aug_level` is an input of the network, so that one amortized
network serves every strength and the strength is chosen after training. When
sampling there are two ways to come by z_s (section 3.2, 3.3):

    non-truncated   generate z_0, then apply (1)
    truncated       stop the low-res chain at t = s: its state is a sample of z_s

`condition` is the one way an input image becomes a `Conditioning`, in training
and in sampling alike. Enlarging comes last, inside the network.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from cascaded_diffusion.diffusion import gaussian, losses, samplers
from cascaded_diffusion.types import Conditioning, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoAugment:
    """The clean low-res image, and no `aug_level` input (the paper's ablation)."""

    has_level = False

    def training_level(self, key: jax.Array, batch_size: int) -> None:
        del key, batch_size

    def condition(
        self,
        low_res: jax.Array,
        aug_level: jax.Array | None,
        noise: jax.Array | None,
        *,
        label: jax.Array | None,
        already_noisy: bool = False,
    ) -> Conditioning:
        if aug_level is not None or already_noisy:
            raise ValueError("this stage was trained without conditioning augmentation")
        del noise
        return Conditioning(label=label, low_res=low_res)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianAugment:
    """Gaussian noise of amortized strength, eq. (1).

    Attributes:
      schedule: the forward process of the stage that makes the low-res images.
      num_timesteps: its number of discrete steps, None where it is continuous.
    """

    schedule: Schedule
    num_timesteps: int | None

    has_level = True

    def training_level(self, key: jax.Array, batch_size: int) -> jax.Array:
        """A uniformly random `aug_level` for every example, [B]."""
        return losses.uniform_t(key, (batch_size,), num_timesteps=self.num_timesteps)

    def condition(
        self,
        low_res: jax.Array,
        aug_level: jax.Array,
        noise: jax.Array | None,
        *,
        label: jax.Array | None,
        already_noisy: bool = False,
    ) -> Conditioning:
        """What the network is shown of a low-res image.

        Args:
          low_res: [B, h, w, C], clean, or noised to `aug_level` already.
          aug_level: [B] in [0, 1]. At 0 the image stays exactly as it is.
          noise: [B, h, w, C] standard normal; not needed if `already_noisy`.
          label: [B] or None.
          already_noisy: the image comes from a truncated chain.
        """
        if not already_noisy:
            noisy = gaussian.diffuse(low_res, self.schedule(aug_level), noise)
            untouched = gaussian.broadcast_right(aug_level, low_res) == 0.0
            low_res = jnp.where(untouched, low_res, noisy)
        return Conditioning(label=label, low_res=low_res, aug_level=aug_level)


Augment = NoAugment | GaussianAugment


def low_res_noise(keys: jax.Array, low_res: jax.Array) -> jax.Array:
    """The noise of non-truncated sampling: [B] keys, one per image, -> like `low_res`."""
    return samplers.normal_per_image(keys, low_res.shape[1:])
