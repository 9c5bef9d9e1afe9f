r"""What the U-Nets share: their attributes, and how their inputs are combined.

The enlarged `low_res` image is concatenated with `xt` along the channels (paper, section 2.2).
The noise level, the class label and `aug_level` are embedded and summed; the sum modulates every
residual block.

A network is told the noise level as a number (`NOISE_INPUTS`):

(1)  cosine_time:  u = arctan(exp(-logsnr / 2)) / (pi / 2)
     maps any schedule's noise level to the time of the offset-free cosine
     schedule with the same level (Salimans & Ho 2022)
(2)  noise_level:  u = alpha = sqrt(sigmoid(logsnr))
     the share of the image that is left, sqrt(alpha_bar) in DDPM's terms
     (WaveGrad, Chen et al. 2021; SR3, Saharia et al. 2021)

With either, a network does not depend on the schedule that trains or samples it. Networks of the
guided-diffusion family know the steps i = 1 .. T of one schedule instead, counted from 0:

(3)  step_index:         u = (i - 1) / 1000
(4)  scaled_step_index:  u = (i - 1) / T

Between steps, i is interpolated linearly in logsnr. The number is embedded by

(5)  sinusoidal(x) = [sin(1000 x w_k), cos(1000 x w_k)],
     w_k = 10000^(-k / (E/2)),  k = 0 .. E/2 - 1   (Vaswani et al. 2017;
     the factor 1000 puts x in [0, 1] on the scale of DDPM's time steps)

with E/2 - 1 in place of E/2 in DDPM's own code, which has other details besides
(`ConditionalNetwork.ddpm_details`).
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.networks import initializers, layers
from cascaded_diffusion.networks.kernels.execution import Execution
from cascaded_diffusion.networks.kernels.norms import EPSILON
from cascaded_diffusion.types import Conditioning, Schedule, check_shape

# logsnr [B] -> what a network is told of it, [B].
NoiseInput = Callable[[jax.Array], jax.Array]

# How an image [B, h, w, C] is enlarged to (H, W).
Upsampler = Callable[[jax.Array, tuple[int, int]], jax.Array]


def cosine_time(logsnr: jax.Array) -> jax.Array:
    """Eq. (1), elementwise."""
    return jnp.arctan(jnp.exp(-0.5 * logsnr)) / (math.pi / 2)


def noise_level(logsnr: jax.Array) -> jax.Array:
    """Eq. (2), elementwise."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr))


@functools.cache  # so that equal networks have the same input
def _index_over(schedule: Schedule, num_timesteps: int, divisor: int) -> NoiseInput:
    steps = np.arange(num_timesteps, 0, -1)  # so that the levels ascend
    with jax.ensure_compile_time_eval():
        levels = np.asarray(schedule(steps / num_timesteps))
    numbers = np.float32((steps - 1) / divisor)
    return lambda logsnr: jnp.interp(logsnr, levels, numbers)


# logsnr [B] -> u [B], by name; made of the schedule and its T, which only the last two need.
NOISE_INPUTS: dict[str, Callable[[Schedule, int | None], NoiseInput]] = {
    "cosine_time": lambda schedule, num_timesteps: cosine_time,
    "noise_level": lambda schedule, num_timesteps: noise_level,
    "step_index": lambda schedule, num_timesteps: _index_over(schedule, num_timesteps, 1000),
    "scaled_step_index": lambda schedule, num_timesteps: _index_over(
        schedule, num_timesteps, num_timesteps
    ),
}


def sinusoidal(x: jax.Array, size: int, *, down_to_period: bool = False) -> jax.Array:
    """Eq. (5): [B] -> [B, size] float32; `size` is even.

    With `down_to_period` the last frequency is 1/10,000 itself, as in DDPM's own code.
    """
    half = size // 2
    steps = max(half - down_to_period, 1)
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / steps)
    angles = 1000.0 * x.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
    """Embeds a scalar: sinusoidal, dense, swish, dense. [B] -> [B, E]."""

    size: int
    sinusoids: int
    dtype: jnp.dtype = jnp.float32
    down_to_period: bool = False  # see `sinusoidal`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = sinusoidal(x, self.sinusoids, down_to_period=self.down_to_period)
        h = layers.dense(self.size, self.dtype, "Dense_0")(h)
        return layers.dense(self.size, self.dtype, "Dense_1")(nn.swish(h))


class ConditionalNetwork(nn.Module):
    """The base of every network that a stage may have; a config chooses it by name."""

    out_channels: int  # the image's channels, or twice as many if the variance is learned
    num_classes: int  # 0 for none
    channels: int  # the unit of width, and the channels of the first convolution
    channel_mults: tuple[int | float, ...]  # channels of each level, as multiples of `channels`
    num_res_blocks: tuple[int, ...]  # residual blocks of each level on the way down
    attention_resolutions: tuple[int, ...]  # sizes of the feature maps with self-attention
    num_heads: int | None = None  # of self-attention
    num_head_channels: int | None = None  # of a head; instead of their number
    null_label: bool = True  # whether label `num_classes` exists, which stands for "dropped"
    dropout_rate: float = 0.0  # in the residual blocks
    # Patches of this size become channels (space-to-depth) before the first convolution.
    patch_size: int = 1
    # "conv" for strided convolutions, "pool" for 2x2 averages, "biggan" for residual blocks that
    # resample inside.
    resample: str = "conv"
    scale_shift: bool = True  # how the embedding modulates a block, see `layers.ResBlock`
    # Whether feature maps that skip across the U are multiplied by 1/sqrt(2), as in SR3 and Imagen.
    scale_skips: bool = False
    # As DDPM's own code has it: strided convolutions pad at the bottom and right alone, norms have
    # an epsilon of 1e-6, and the sinusoids of the noise level end at the period itself.
    ddpm_details: bool = False
    noise_input: NoiseInput = cosine_time  # what it is told of the noise level
    aug_level_input: bool = False  # whether `aug_level` is an input
    upsample: Upsampler | None = None  # how the low-res image is enlarged; None for a base model
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    execution: Execution = Execution()

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(round(self.channels * mult) for mult in self.channel_mults)

    @property
    def epsilon(self) -> float:
        """That of every norm."""
        return 1e-6 if self.ddpm_details else EPSILON

    def prepare(
        self, xt: jax.Array, logsnr: jax.Array, cond: Conditioning
    ) -> tuple[jax.Array, jax.Array]:
        """The joined image [B, H, W, C or 2C] and the embedding [B, E].

        Raises ValueError if an input is missing, superfluous or of the wrong shape.
        """
        check_shape(xt, "B H W C", "xt")
        check_shape(logsnr, "B", "logsnr", B=xt.shape[0])
        if (cond.low_res is None) != (self.upsample is None):
            raise ValueError("low_res must be given to super-resolution networks, and only to them")
        if cond.low_res is not None:
            check_shape(cond.low_res, "B h w C", "low_res", B=xt.shape[0], C=xt.shape[-1])
            enlarged = self.upsample(cond.low_res, xt.shape[1:3])
            xt = jnp.concatenate([xt, enlarged], axis=-1)
        return xt, self._embed(logsnr, cond)

    def res_block(
        self,
        h: layers.FeatureMap,
        embedding: jax.Array,
        rows: jax.Array | None,
        features: int,
        name: str,
        **settings: str | bool,
    ) -> jax.Array:
        """A residual block, computed as `execution` says; `settings` of `layers.ResBlock`."""
        size = jax.tree.leaves(h)[0].shape[1]
        block = self._block(layers.ResBlock, name, size)(
            features,
            dropout_rate=self.dropout_rate,
            scale_shift=self.scale_shift,
            dtype=self.dtype,
            epsilon=self.epsilon,
            name=name,
            **settings,
        )
        return self.constrain_sharding(block(h, embedding, rows))

    def attention_block(self, h: jax.Array, name: str) -> jax.Array:
        """Self-attention, computed as `execution` says."""
        block = self._block(layers.AttentionBlock, name, h.shape[1])(
            self.num_heads or h.shape[-1] // self.num_head_channels,
            self.dtype,
            self.execution.per_device,
            self.epsilon,
            name=name,
        )
        return self.constrain_sharding(block(h))

    def constrain_sharding(self, h: jax.Array) -> jax.Array:
        """Shards a feature map [B, H, W, C] as `execution` says."""
        constrain = self.execution.constrain_sharding
        return h if constrain is None else constrain(h)

    def _block(self, block: type[nn.Module], name: str, size: int) -> type[nn.Module]:
        gather = self.execution.gather
        if gather is not None and not self.is_initializing():
            block = nn.map_variables(
                block,
                "params",
                trans_in_fn=lambda v: {"params": gather(v["params"], (name,), self.dtype)},
            )
        # Outermost, so that gathered parameters are not kept for the backward pass either.
        return nn.remat(block) if self.execution.rematerializes(size) else block

    def _embed(self, logsnr: jax.Array, cond: Conditioning) -> jax.Array:
        size = 4 * self.channels

        def embedded(x: jax.Array, name: str) -> jax.Array:
            embed = ScalarEmbedding(size, self.channels, self.dtype, self.ddpm_details, name=name)
            return embed(x)

        embedding = embedded(self.noise_input(logsnr), "noise_level")
        if (cond.label is None) != (self.num_classes == 0):
            raise ValueError("label must be given to class-conditional networks, and only to them")
        if cond.label is not None:
            check_shape(cond.label, "B", "label", B=logsnr.shape[0])
            init, rows = initializers.embedding_normal, self.num_classes + self.null_label
            embed = nn.Embed(rows, size, self.dtype, embedding_init=init, name="label")
            embedding += embed(cond.label)
        if (cond.aug_level is None) == self.aug_level_input:
            raise ValueError("aug_level must be given where aug_level_input is set, and only there")
        if cond.aug_level is not None:
            check_shape(cond.aug_level, "B", "aug_level", B=logsnr.shape[0])
            embedding += embedded(cond.aug_level, "aug_level")
        return embedding
