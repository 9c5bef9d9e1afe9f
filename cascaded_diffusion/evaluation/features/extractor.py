"""Feature extractors and their outputs, from which metrics are computed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.runtime import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Features:
    """Outputs of an extractor for n images, float32."""

    pooled: np.ndarray  # [n, F], for the Fréchet distance, KID, precision and recall
    logits: np.ndarray | None = None  # [n, K] over classes, for the inception score
    spatial: np.ndarray | None = None  # [n, S], for sFID


def extract_in_batches(
    images: np.ndarray, size: int, mesh: Mesh, program: Callable[[jax.Array], Sequence[jax.Array]]
) -> Features:
    """The features of images [n, H, W, C], of which `program` takes exactly `size` at a time.

    `size` is a multiple of the devices. What fills the last batch up is dropped again.
    """
    parts = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
        outputs = program(jax.device_put(padded, mesh_lib.batch_sharding(mesh)))
        parts.append([mesh_lib.host_array(x)[: len(batch)] for x in outputs])
    return Features(*(np.concatenate(outputs) for outputs in zip(*parts, strict=True)))


class FeatureExtractor(Protocol):
    """uint8 images [n, H, W, C] of any n -> `Features`."""

    name: str  # "inception" or another network's name ("classifier"): part of metric names
    # Network, weights (digest) and way of resizing: extractors of one identity give the same.
    identity: str

    def __call__(self, images: np.ndarray) -> Features: ...
