"""The U-Net: the base model, and with a low-res input, the super-resolution model."""

import dataclasses
from functools import partial
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from cascaded_diffusion.networks import initializers, layers
from cascaded_diffusion.networks.conditioning import ConditionalNetwork
from cascaded_diffusion.networks.efficient_unet import EfficientUNet
from cascaded_diffusion.networks.kernels.execution import Execution
from cascaded_diffusion.types import Conditioning, Params


class UNet(ConditionalNetwork):
    """A U-Net over [B, H, W, C] images, in the manner of Dhariwal & Nichol 2021.

    Every level after the first works at half the resolution of the one before,
    and has one residual block more on the way up than on the way down. Every block at
    the `attention_resolutions` is followed by self-attention, and so is the first of the middle.

    Shapes below: p is `patch_size`, and level l has feature maps of size H/p / 2^l by W/p / 2^l,
    written h w, with M = channels * channel_mults[l] channels. The first convolution
    has `channels`, or M of the first level if that is less.
    """

    @nn.compact
    def __call__(
        self, xt: jax.Array, logsnr: jax.Array, cond: Conditioning, rows: jax.Array | None = None
    ) -> jax.Array:
        h, embedding = self.prepare(xt, logsnr, cond)  # [B, H, W, C or 2C], [B, E]

        def res_block(h: layers.FeatureMap, features: int, name: str, **settings: str) -> jax.Array:
            return self.res_block(h, embedding, rows, features, name, **settings)

        def block(h: layers.FeatureMap, features: int, name: str) -> jax.Array:
            h = res_block(h, features, name)
            if h.shape[1] not in self.attention_resolutions:
                return h
            return self.attention_block(h, f"{name}_attention")

        def resample(h: jax.Array, direction: str, name: str) -> jax.Array:
            if self.resample == "biggan":
                return res_block(h, h.shape[-1], name, resample=direction)
            if direction == "up":
                layer = layers.Upsample(self.resample, self.dtype, name=name)
            else:
                layer = layers.Downsample(self.resample, self.dtype, self.ddpm_details, name=name)
            return self.constrain_sharding(layer(h))

        levels = list(enumerate(zip(self.widths, self.num_res_blocks, strict=True)))
        h = layers.space_to_depth(h, self.patch_size)  # [B, H/p, W/p, p * p * (C or 2C)]
        first = min(self.channels, self.widths[0])
        h = layers.Conv3x3(first, self.dtype, name="conv_in")(h.astype(self.dtype))
        h = self.constrain_sharding(h)  # [B, H/p, W/p, first]
        skips = [h]
        for level, (width, num_blocks) in levels:
            if level > 0:
                h = resample(h, "down", f"down{level}_resample")  # [B, 2h, 2w, *] -> [B, h, w, *]
                skips.append(h)
            for i in range(num_blocks):
                h = block(h, width, f"down{level}_block{i}")  # [B, h, w, M]
                skips.append(h)

        h = res_block(h, h.shape[-1], "middle_block0")  # [B, h, w, M] of the last level
        h = self.attention_block(h, "middle_attention")  # the same
        h = res_block(h, h.shape[-1], "middle_block1")  # the same

        for level, (width, num_blocks) in reversed(levels):
            for i in range(num_blocks + 1):
                # [B, h, w, * + *]: the channels of h and of the feature map that skips across.
                joined = layers.concat_skip(h, skips.pop(), scale=self.scale_skips)
                h = block(joined, width, f"up{level}_block{i}")  # [B, h, w, M]
            if level > 0:
                h = resample(h, "up", f"up{level}_resample")  # [B, h, w, M] -> [B, 2h, 2w, M]
        assert not skips

        h = layers.image_out(h, self.out_channels * self.patch_size**2, self.dtype, self.epsilon)
        return layers.depth_to_space(h, self.patch_size)  # [B, H, W, out_channels] float32


NETWORKS: dict[str, type[ConditionalNetwork]] = {"unet": UNet, "efficient_unet": EfficientUNet}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network as two pure functions; flax stays behind them."""

    module: nn.Module

    @partial(jax.jit, static_argnums=0)  # so that a network is traced once for all that ask
    def init(self, key: jax.Array, xt: jax.Array, logsnr: jax.Array, cond: Conditioning) -> Params:
        """Fresh float32 parameters. Only the shapes of the inputs matter."""
        init = partial(self.module.init, key, xt, logsnr, cond)
        return initializers.drawn_together(lambda: init()["params"], key)

    def with_execution(self, execution: Execution) -> Self:
        """The same network, computed as `execution` says."""
        return Network(module=self.module.clone(execution=execution))

    def apply(
        self,
        params: Params,
        xt: jax.Array,
        logsnr: jax.Array,
        cond: Conditioning,
        *,
        dropout_key: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """[B, H, W, out_channels] float32.

        Without a `dropout_key` there is no dropout. With one, an example's mask is a function
        of the example's number, `rows` [B], by default 0 .. B - 1.
        """
        gather = self.module.execution.gather
        if gather is not None:
            # Residual and attention blocks, which have a conv0 or a qkv, gather their own
            # parameters. The last convolution is computed in float32.
            params = {
                name: part
                if "conv0" in part or "qkv" in part
                else gather(part, (name,), None if name == "conv_out" else self.module.dtype)
                for name, part in params.items()
            }
        if dropout_key is None:
            return self.module.apply({"params": params}, xt, logsnr, cond)
        rows = jnp.arange(xt.shape[0]) if rows is None else rows
        rngs = {"dropout": dropout_key}
        return self.module.apply({"params": params}, xt, logsnr, cond, rows, rngs=rngs)
