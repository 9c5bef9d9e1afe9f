"""Classifiers of real images: feature extractors where Inception does not fit, and for CAS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cascaded_diffusion.networks.resnet import ResNet, ResNet50

# {"params": ..., "batch_stats": ...}; the latter only with batch normalization.
Variables = dict[str, Any]


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
        logits = nn.Dense(self.num_classes)(features)
        return features, logits


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallClassifier,
    "rotation": SmallClassifier,
    "resnet": ResNet,
    "resnet50": ResNet50,
}


def init_classifier(module: nn.Module, key: jax.Array, resolution: int, channels: int) -> Variables:
    """Fresh variables."""
    return dict(module.init(key, jnp.zeros((1, resolution, resolution, channels))))


def apply_classifier(
    module: nn.Module, variables: Variables, image: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Features [B, F] and logits [B, K] at inference."""
    return module.apply(variables, image)


def train_classifier_step(
    module: nn.Module, variables: Variables, image: jax.Array, dropout_key: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """Logits [B, K] in training mode, and the updated variables that are not learned."""
    (_, logits), updated = module.apply(
        variables, image, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
    )
    return logits, dict(updated)


def flatten_params(params: Any) -> dict[str, jax.Array]:
    """Nested variables as `{"params/layer/kernel": array}`, for files of plain tensors."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flatten_params`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
