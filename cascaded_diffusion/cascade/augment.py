r"""Conditioning augmentation: damage the low-res input on purpose (paper, section 3).

A super-resolution stage is trained on real low-res images and used on generated ones. Damaging
its input during training hides the difference. At low resolutions the damage is the low-res
model's own forward process:

    (1)  z_s = alpha_s z_0 + sigma_s eps,      s ~ U{1/T, ..., S} or U(0, S]

The strength `s` = `aug_level` is an input of the network, so one amortized network serves every
strength, which is chosen after training. There are two ways to sample z_s (section 3.2, 3.3):

    non-truncated   generate z_0, then apply (1)
    truncated       stop the low-res chain at t = s: its state is a sample of z_s

At high resolutions the damage is a Gaussian blur of some training examples, with these weights
and a standard deviation in pixels, and none when sampling (section 3.1):

    (2)  w_k ~ exp(-k^2 / (2 sigma^2)),  |k| <= (size - 1) / 2,   sigma ~ U[lowest, highest]
"""

import dataclasses

import jax
import jax.numpy as jnp

from cascaded_diffusion.cascade.pixels import quantized
from cascaded_diffusion.diffusion import gaussian, losses, samplers
from cascaded_diffusion.types import Conditioning, Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Damage:
    """What is done to a batch of low-res images; None stands for nothing."""

    aug_level: jax.Array | None = None  # [B] in [0, 1]; at 0 the image stays exactly as it is
    logsnr: jax.Array | None = None  # [B], the noise level of aug_level
    noise: jax.Array | None = None  # [B, h, w, C] standard normal
    blur_weights: jax.Array | None = None  # [B, size], eq. (2), summing to 1
    blur_border: str = dataclasses.field(default="edge", metadata={"static": True})


def blur(image: jax.Array, weights: jax.Array, border: str = "edge") -> jax.Array:
    """Separable blur of [B, h, w, C] by [B, size].

    Beyond the border, border pixels repeat ("edge"), or the image is mirrored ("reflect").
    """
    size = weights.shape[1]
    beyond = (size // 2, size // 2)
    padded = jnp.pad(image, ((0, 0), beyond, beyond, (0, 0)), mode=border)
    weights = weights[:, :, None, None, None]
    rows = sum(weights[:, k] * padded[:, k : k + image.shape[1]] for k in range(size))
    return sum(weights[:, k] * rows[:, :, k : k + image.shape[2]] for k in range(size))


def gaussian_weights(sigma: jax.Array, size: int) -> jax.Array:
    """Eq. (2): [B] -> [B, size]. Sigma 0 is the identity."""
    offsets = jnp.arange(size) - size // 2
    safe = jnp.where(sigma > 0, sigma, 1.0)[:, None]
    weights = jnp.exp(-0.5 * jnp.square(offsets / safe))
    weights = jnp.where(sigma[:, None] > 0, weights, (offsets == 0).astype(weights.dtype))
    return weights / weights.sum(1, keepdims=True)


def condition(
    low_res: jax.Array, damage: Damage, *, label: jax.Array | None, already_noisy: bool = False
) -> Conditioning:
    """What the network is conditioned on, in training and in sampling: rounded, then damaged.

    `low_res` [B, h, w, C] is clean, or `already_noisy` at `damage.aug_level`, from a truncated
    chain; a stage without `aug_level` then raises ValueError. `label` is [B].
    """
    clean = quantized(low_res)
    if damage.blur_weights is not None:
        clean = blur(clean, damage.blur_weights, damage.blur_border)
    if damage.aug_level is None:
        if already_noisy:
            raise ValueError("this stage was trained without Gaussian conditioning augmentation")
        return Conditioning(label=label, low_res=clean)
    noisy = low_res if already_noisy else gaussian.diffuse(clean, damage.logsnr, damage.noise)
    untouched = gaussian.broadcast_right(damage.aug_level, low_res) == 0.0
    low_res = jnp.where(untouched, clean, noisy)
    return Conditioning(label=label, low_res=low_res, aug_level=damage.aug_level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoAugment:
    """The clean low-res image, and no `aug_level` input (the paper's ablation)."""

    def for_training(self, key: jax.Array, shape: tuple[int, ...]) -> Damage:
        """The damage of a training batch of low-res images of `shape` [B, h, w, C]."""
        return Damage()

    def for_sampling(
        self, keys: jax.Array, shape: tuple[int, ...], aug_level: jax.Array | float | None
    ) -> Damage:
        """The damage when sampling, with one key per image, [B]; the level is a scalar."""
        return Damage()


@dataclasses.dataclass(frozen=True)
class BlurAugment(NoAugment):
    """Blur of some training examples, eq. (2); nothing when sampling."""

    kernel_size: int  # pixels, odd
    sigmas: tuple[float, float]  # lowest and highest standard deviation, in pixels
    prob: float  # the share of examples that are blurred
    border: str = "edge"  # see `blur`

    def for_training(self, key: jax.Array, shape: tuple[int, ...]) -> Damage:
        sigma_key, chosen_key = jax.random.split(key)
        low, high = self.sigmas
        sigma = jax.random.uniform(sigma_key, shape[:1], minval=low, maxval=high)
        chosen = jax.random.bernoulli(chosen_key, self.prob, shape[:1])
        weights = gaussian_weights(jnp.where(chosen, sigma, 0), self.kernel_size)
        return Damage(blur_weights=weights, blur_border=self.border)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianAugment:
    """Gaussian noise of amortized strength, eq. (1)."""

    schedule: Schedule  # the forward process of the stage that makes the low-res images
    num_timesteps: int | None  # its discrete steps; None if it is continuous
    max_level: float  # S, the largest strength in training

    def for_training(self, key: jax.Array, shape: tuple[int, ...]) -> Damage:
        level_key, noise_key = jax.random.split(key)
        level = losses.uniform_t(
            level_key, shape[:1], num_timesteps=self.num_timesteps, max_t=self.max_level
        )
        return self._damage(level, jax.random.normal(noise_key, shape))

    def for_sampling(
        self, keys: jax.Array, shape: tuple[int, ...], aug_level: jax.Array | float | None
    ) -> Damage:
        level = jnp.full(shape[:1], 0.0 if aug_level is None else aug_level, jnp.float32)
        noise = samplers.normal_per_image(keys, shape[1:])
        return self._damage(nearest_level(level, self.num_timesteps), noise)

    def _damage(self, level: jax.Array, noise: jax.Array) -> Damage:
        return Damage(aug_level=level, logsnr=self.schedule(level), noise=noise)


Augment = NoAugment | BlurAugment | GaussianAugment


def nearest_level(level: jax.Array | float, num_timesteps: int | None) -> jax.Array | float:
    """The nearest level of a process of T discrete steps; any level if T is None."""
    if num_timesteps is None:
        return level
    return jnp.round(jnp.asarray(level, jnp.float32) * num_timesteps) / num_timesteps
