"""The U-Net: the base model, and with a low-res input, the super-resolution model.

Input `xt` is joined, channel by channel, by the enlarged `low_res` image (paper,
section 2.2). The noise level, the class label and `aug_level` are embedded,
summed, and steer every residual block. The same module serves every stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from cascaded_diffusion.networks import embeddings, layers
from cascaded_diffusion.types import Conditioning, Params, check_shape

# How an image [B, h, w, C] is enlarged to (H, W).
Upsampler = Callable[[jax.Array, tuple[int, int]], jax.Array]


class UNet(nn.Module):
    """A U-Net over [B, H, W, C] images, in the manner of Dhariwal & Nichol 2021.

    Attributes:
      out_channels: channels of the output image.
      num_classes: number of class labels; 0 for none. Label `num_classes` is
        the dropped label of classifier-free guidance.
      channels: channels of the first level.
      channel_mults: channels of each level, as multiples of `channels`; every
        level after the first works at half the resolution of the one before.
      num_res_blocks: residual blocks per level on the way down (one more each
        on the way up).
      attention_resolutions: sizes of the feature maps that get self-attention.
        The middle of the network has one in any case.
      num_heads: attention heads.
      dropout_rate: dropout in the residual blocks.
      patch_size: the image is cut into patches of this size, which become
        channels (space-to-depth), before the first convolution.
      resample: "conv" for strided convolutions, "pool" for 2x2 averages.
      aug_level_input: whether `aug_level` is an input.
      upsample: how the low-res image is enlarged; None for a base model.
      dtype: dtype of the computation; parameters are float32.
    """

    out_channels: int
    num_classes: int
    channels: int
    channel_mults: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int
    dropout_rate: float = 0.0
    patch_size: int = 1
    resample: str = "conv"
    aug_level_input: bool = False
    upsample: Upsampler | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, xt: jax.Array, logsnr: jax.Array, cond: Conditioning, *, deterministic: bool = True
    ) -> jax.Array:
        check_shape(xt, "B H W C", "xt")
        check_shape(logsnr, "B", "logsnr", B=xt.shape[0])
        embedding = self._embed(logsnr, cond)
        h = layers.space_to_depth(self._join(xt, cond), self.patch_size).astype(self.dtype)

        def res_block(h: jax.Array, features: int, name: str) -> jax.Array:
            block = layers.ResBlock(features, self.dropout_rate, self.dtype, name=name)
            return block(h, embedding, deterministic=deterministic)

        def attention(h: jax.Array, name: str) -> jax.Array:
            return layers.AttentionBlock(self.num_heads, self.dtype, name=f"{name}_attention")(h)

        def block(h: jax.Array, features: int, name: str) -> jax.Array:
            h = res_block(h, features, name)
            return attention(h, name) if h.shape[1] in self.attention_resolutions else h

        h = layers.conv3x3(self.channels, self.dtype, "conv_in")(h)
        skips = [h]
        for level, mult in enumerate(self.channel_mults):
            if level > 0:
                h = layers.Downsample(self.resample, self.dtype, name=f"down{level}_resample")(h)
                skips.append(h)
            for i in range(self.num_res_blocks):
                h = block(h, self.channels * mult, f"down{level}_block{i}")
                skips.append(h)

        h = res_block(h, h.shape[-1], "middle_block0")
        h = attention(h, "middle")
        h = res_block(h, h.shape[-1], "middle_block1")

        for level, mult in reversed(list(enumerate(self.channel_mults))):
            for i in range(self.num_res_blocks + 1):
                joined = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(joined, self.channels * mult, f"up{level}_block{i}")
            if level > 0:
                h = layers.Upsample(self.resample, self.dtype, name=f"up{level}_resample")(h)
        assert not skips

        h = nn.swish(layers.group_norm(self.dtype, h.shape[-1], "norm_out")(h))
        # The output is float32 whatever the compute dtype: the loss and the
        # samplers subtract nearly equal numbers.
        conv_out = layers.conv3x3(
            self.out_channels * self.patch_size**2, jnp.float32, "conv_out", zero_init=True
        )
        h = conv_out(h.astype(jnp.float32))
        return layers.depth_to_space(h, self.patch_size)

    def _join(self, xt: jax.Array, cond: Conditioning) -> jax.Array:
        if (cond.low_res is None) != (self.upsample is None):
            raise ValueError("low_res must be given to super-resolution networks, and only to them")
        if cond.low_res is None:
            return xt
        check_shape(cond.low_res, "B h w C", "low_res", B=xt.shape[0], C=xt.shape[-1])
        enlarged = self.upsample(cond.low_res, xt.shape[1:3])
        return jnp.concatenate([xt, enlarged], axis=-1)

    def _embed(self, logsnr: jax.Array, cond: Conditioning) -> jax.Array:
        size = 4 * self.channels
        noise_input = embeddings.noise_input_from_logsnr(logsnr)
        embedding = embeddings.ScalarEmbedding(size, self.channels, self.dtype, name="noise_level")(
            noise_input
        )
        if (cond.label is None) != (self.num_classes == 0):
            raise ValueError("label must be given to class-conditional networks, and only to them")
        if cond.label is not None:
            check_shape(cond.label, "B", "label", B=logsnr.shape[0])
            embedding += nn.Embed(self.num_classes + 1, size, dtype=self.dtype, name="label")(
                cond.label
            )
        if (cond.aug_level is None) == self.aug_level_input:
            raise ValueError("aug_level must be given where aug_level_input is set, and only there")
        if cond.aug_level is not None:
            check_shape(cond.aug_level, "B", "aug_level", B=logsnr.shape[0])
            embedding += embeddings.ScalarEmbedding(
                size, self.channels, self.dtype, name="aug_level"
            )(cond.aug_level)
        return embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network as two pure functions; what lies behind them is flax's affair."""

    module: nn.Module

    def init(self, key: jax.Array, xt: jax.Array, logsnr: jax.Array, cond: Conditioning) -> Params:
        """Fresh float32 parameters. Only the shapes of the inputs matter."""
        return self.module.init(key, xt, logsnr, cond)["params"]

    def apply(
        self,
        params: Params,
        xt: jax.Array,
        logsnr: jax.Array,
        cond: Conditioning,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """[B, H, W, C] float32 output. No dropout without a `dropout_key`."""
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply(
            {"params": params}, xt, logsnr, cond, deterministic=dropout_key is None, rngs=rngs
        )
