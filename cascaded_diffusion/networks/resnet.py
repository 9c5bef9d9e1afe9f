"""Residual networks (He et al. 2015) as classifiers: ResNet-50, and a small one.

ResNet-50 measures the classification accuracy score (Ravuri & Vinyals 2019). Its bottlenecks
have the stride in the 3x3 convolution, as is usual today. Batch statistics are those of the
global batch, on any number of devices.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class _Block(nn.Module):
    """Two 3x3 convolutions, or with `bottleneck` 1x1, 3x3 and 1x1 to four times the width."""

    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, kernel_init=_KERNEL_INIT)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        out = 4 * self.width if self.bottleneck else self.width
        y = x
        if self.bottleneck:
            y = nn.relu(norm()(conv(self.width, (1, 1))(y)))
        y = nn.relu(norm()(conv(self.width, (3, 3), strides=self.stride, padding=1)(y)))
        # The last scale begins at zero, so each block begins as the identity.
        y = conv(out, (1, 1) if self.bottleneck else (3, 3))(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm()(conv(out, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """[B, H, W, C] in [-1, 1] -> features [B, F], averaged over the image, and logits [B, K].

    Attributes:
      num_classes: K.
      widths: of the groups of blocks; each group works at half the resolution of the last.
      num_blocks: per group.
      bottleneck: whether blocks are bottlenecks; then F is four times the last width, else the
        last width.
      large: a 7x7 stem with stride 2 and pooling, for photos; else a 3x3 stem, with stride 2
        from 32 px on, which two cores can afford.
    """

    num_classes: int
    widths: tuple[int, ...] = (32, 64, 128)
    num_blocks: tuple[int, ...] = (1, 1, 1)
    bottleneck: bool = False
    large: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        kernel, stride = (7, 2) if self.large else (3, 2 if image.shape[1] >= 32 else 1)
        x = nn.Conv(
            self.widths[0],
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,
            use_bias=False,
            kernel_init=_KERNEL_INIT,
        )(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
        if self.large:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for group, (width, count) in enumerate(zip(self.widths, self.num_blocks, strict=True)):
            for i in range(count):
                stride = 2 if group > 0 and i == 0 else 1
                x = _Block(width, stride, self.bottleneck)(x, train=train)
        features = x.mean((1, 2)).astype(jnp.float32)
        return features, nn.Dense(self.num_classes)(features)


ResNet50 = partial(
    ResNet, widths=(64, 128, 256, 512), num_blocks=(3, 4, 6, 3), bottleneck=True, large=True
)
