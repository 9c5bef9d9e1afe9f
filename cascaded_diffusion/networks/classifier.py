"""Classifiers of real images: feature extractors where Inception does not fit, and for CAS.

Residual networks (He et al. 2015) measure the classification accuracy score (Ravuri & Vinyals
2019): ResNet-50, whose bottlenecks have the stride in the 3x3 convolution, as is usual today, and
a small one. Batch statistics are those of the global batch, on any number of devices.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cascaded_diffusion.types import Params

# {"params": ..., "batch_stats": ...}; the latter only with batch normalization.
Variables = dict[str, Params]
Module = nn.Module

# Nested variables as {"params/layer/kernel": array}, for files of plain tensors, and back.
flatten_params = partial(flatten_dict, sep="/")
unflatten_params = partial(unflatten_dict, sep="/")

_Conv = partial(
    nn.Conv,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal"),
)
_Norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class SmallClassifier(nn.Module):
    """Strided convolutions, a dense layer of features and one of logits.

    [B, H, W, C] in [-1, 1] -> features [B, num_features] after the swish, which the last layer
    separates linearly, and logits [B, K].
    """

    num_classes: int
    num_features: int = 64
    widths: tuple[int, ...] = (32, 64, 64)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        h = image
        for i, width in enumerate(self.widths):
            h = nn.Conv(width, (3, 3), strides=1 if i == 0 and image.shape[1] <= 16 else 2)(h)
            h = nn.swish(nn.GroupNorm(num_groups=8)(h))
        h = h.reshape(h.shape[0], -1)
        h = nn.Dropout(0.3)(h, deterministic=not train)
        features = nn.swish(nn.Dense(self.num_features)(h))
        return features, nn.Dense(self.num_classes)(features)


class _Block(nn.Module):
    """Two 3x3 convolutions, or with `bottleneck` 1x1, 3x3 and 1x1 to four times the width."""

    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(_Norm, use_running_average=not train)
        out = 4 * self.width if self.bottleneck else self.width
        y = x
        if self.bottleneck:
            y = nn.relu(norm()(_Conv(self.width, (1, 1))(y)))
        y = nn.relu(norm()(_Conv(self.width, (3, 3), strides=self.stride, padding=1)(y)))
        # The last scale begins at zero, so each block begins as the identity.
        y = _Conv(out, (1, 1) if self.bottleneck else (3, 3))(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm()(_Conv(out, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """[B, H, W, C] in [-1, 1] -> features [B, F], averaged over the image, and logits [B, K].

    F is the last width, or with bottlenecks four times as much.
    """

    num_classes: int
    # Of the groups of blocks; each group works at half the resolution of the last.
    widths: tuple[int, ...] = (32, 64, 128)
    num_blocks: tuple[int, ...] = (1, 1, 1)  # of each group
    bottleneck: bool = False
    # A 7x7 stem with stride 2 and pooling, for photos; else a 3x3 stem, with stride 2 from 32 px
    # on, which two cores can afford.
    large: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        size, stride = (7, 2) if self.large else (3, 2 if image.shape[1] >= 32 else 1)
        x = _Conv(self.widths[0], (size, size), strides=stride, padding=size // 2)(image)
        x = nn.relu(_Norm(use_running_average=not train)(x))
        if self.large:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for group, (width, count) in enumerate(zip(self.widths, self.num_blocks, strict=True)):
            for i in range(count):
                stride = 2 if group > 0 and i == 0 else 1
                x = _Block(width, stride, self.bottleneck)(x, train=train)
        features = x.mean((1, 2)).astype(jnp.float32)
        return features, nn.Dense(self.num_classes)(features)


CLASSIFIERS: dict[str, Callable[..., Module]] = {
    "small": SmallClassifier,
    "rotation": SmallClassifier,
    "resnet": ResNet,
    "resnet50": partial(
        ResNet, widths=(64, 128, 256, 512), num_blocks=(3, 4, 6, 3), bottleneck=True, large=True
    ),
}


def init_classifier(module: Module, key: jax.Array, shape: Sequence[int]) -> Variables:
    """Fresh variables for images of this shape, [n, H, W, C] of any n."""
    return module.init(key, jnp.zeros((1, *shape[1:])))
