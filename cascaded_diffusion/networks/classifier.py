"""A small convolutional classifier: the feature extractor where Inception is not apt."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class SmallClassifier(nn.Module):
    """Strided convolutions, one dense layer of features, one of logits.

    [B, H, W, C] in [-1, 1] -> features [B, num_features] (after the swish, so
    that they are what the last layer separates linearly) and logits [B, K].
    """

    num_classes: int
    num_features: int = 64
    widths: tuple[int, ...] = (32, 64, 64)

    @nn.compact
    def __call__(
        self, image: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        h = image
        for i, width in enumerate(self.widths):
            h = nn.Conv(width, (3, 3), strides=1 if i == 0 and image.shape[1] <= 16 else 2)(h)
            h = nn.swish(nn.GroupNorm(num_groups=8)(h))
        h = h.reshape(h.shape[0], -1)
        h = nn.Dropout(0.3)(h, deterministic=deterministic)
        features = nn.swish(nn.Dense(self.num_features)(h))
        logits = nn.Dense(self.num_classes)(features)
        return features, logits


def init_classifier(
    module: SmallClassifier, key: jax.Array, resolution: int, channels: int
) -> dict:
    """Fresh parameters."""
    return module.init(key, jnp.zeros((1, resolution, resolution, channels)))["params"]


def apply_classifier(
    module: SmallClassifier, params: dict, image: jax.Array, *, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Features [B, F] and logits [B, K]. No dropout without a `dropout_key`."""
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    return module.apply({"params": params}, image, deterministic=dropout_key is None, rngs=rngs)


def flatten_params(params: dict) -> dict[str, jax.Array]:
    """Nested parameters as `{"layer/kernel": array}`, for files that hold tensors only."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat["/".join(str(entry.key) for entry in path)] = leaf
    return flat
