"""The Efficient U-Net of Imagen (Saharia et al. 2022, section 2.4 and appendix B).

A U-Net for super-resolution at high resolutions. Most of its parameters are at the low
resolutions, and every level, including the first, changes resolution on the cheap side of its
blocks: it strides before them on the way down and enlarges after them on the way up. Full
resolution has only the first and the last convolution, and the one that ends the enlarging.
"""

import flax.linen as nn
import jax

from cascaded_diffusion.networks import layers
from cascaded_diffusion.networks.conditioning import ConditionalNetwork
from cascaded_diffusion.types import Conditioning


class EfficientUNet(ConditionalNetwork):
    """The Efficient U-Net over [B, H, W, C] images.

    It differs from `UNet` in these ways:
      * level l works at size H / 2^(l + 1), and has `num_res_blocks[l]` blocks on
        the way up as well; every block has a projection on its skip branch;
      * attention follows a level's last block only;
      * only the last feature map of each level skips across the U. The deepest level's does
        not, since nothing lies between its way down and its way up; nor does the output of
        the first convolution, which spares full resolution;
      * there are no blocks in the middle.

    `resample` must be "conv" and `patch_size` 1. Shapes below: h w are level l's size, and
    M = channels * channel_mults[l].
    """

    @nn.compact
    def __call__(
        self, xt: jax.Array, logsnr: jax.Array, cond: Conditioning, rows: jax.Array | None = None
    ) -> jax.Array:
        if self.resample != "conv" or self.patch_size != 1:
            raise ValueError('the efficient U-Net needs resample "conv" and patch_size 1')
        h, embedding = self.prepare(xt, logsnr, cond)  # [B, H, W, C or 2C], [B, E]

        def blocks(h: layers.FeatureMap, features: int, count: int, name: str) -> jax.Array:
            for i in range(count):
                block_name = f"{name}_block{i}"
                h = self.res_block(h, embedding, rows, features, block_name, project_skip=True)
            if h.shape[1] not in self.attention_resolutions:
                return h
            return self.attention_block(h, f"{name}_attention")

        levels = list(enumerate(zip(self.widths, self.num_res_blocks, strict=True)))
        h = layers.Conv3x3(self.channels, self.dtype, name="conv_in")(h.astype(self.dtype))
        h = self.constrain_sharding(h)  # [B, H, W, channels]
        skips = []
        for level, (features, count) in levels:
            name = f"down{level}_resample"
            halve = layers.Conv3x3(features, self.dtype, 2, pad_ends=self.ddpm_details, name=name)
            h = halve(h)
            h = self.constrain_sharding(h)  # [B, 2h, 2w, *] -> [B, h, w, M]
            h = blocks(h, features, count, f"down{level}")  # [B, h, w, M]
            skips.append(h)
        skips.pop()

        for level, (features, count) in reversed(levels):
            if level + 1 < len(levels):
                h = layers.concat_skip(h, skips.pop(), scale=self.scale_skips)  # [B, h, w, * + M]
            h = blocks(h, features, count, f"up{level}")  # [B, h, w, M]
            h = layers.Upsample("conv", self.dtype, name=f"up{level}_resample")(h)
            h = self.constrain_sharding(h)  # [B, 2h, 2w, M]
        assert not skips

        return layers.image_out(
            h, self.out_channels, self.dtype, self.epsilon
        )  # [B, H, W, *] float32
