r"""How resizing weighs pixels, on the host and on the device.

Both kinds are linear and separable, so a resize is a matrix for rows and one for columns. With H
input and n output pixels and s = H / n, the weight of input pixel j in output pixel i is

    (1)  area      |[i s, (i+1) s) intersected with [j, j+1)| / s
    (2)  bilinear  max(0, 1 - |j + 1/2 - (i + 1/2) s| / max(s, 1)), then rows to sum 1

(1) is the true area average, equal to TensorFlow's `area`. (2) is the triangle filter, widened
when shrinking ("antialiased"), equal to TensorFlow's and JAX's.
"""

from functools import cache

import numpy as np


@cache
def area_weights(size_in: int, size_out: int) -> np.ndarray:
    """Eq. (1): float32 [size_out, size_in], rows sum to 1. It shrinks and enlarges."""
    scale = size_in / size_out
    edges = np.arange(size_out + 1)[:, None] * scale
    pixel = np.arange(size_in)
    overlap = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
    return _frozen(np.clip(overlap, 0.0, None) / scale)


@cache
def bilinear_weights(size_in: int, size_out: int) -> np.ndarray:
    """Eq. (2): float32 [size_out, size_in], rows sum to 1. It shrinks and enlarges."""
    scale = size_in / size_out
    centre = (np.arange(size_out)[:, None] + 0.5) * scale
    pixel = np.arange(size_in) + 0.5
    weights = np.clip(1.0 - np.abs(pixel - centre) / max(scale, 1.0), 0.0, None)
    return _frozen(weights / weights.sum(axis=1, keepdims=True))


def _frozen(weights: np.ndarray) -> np.ndarray:
    weights = weights.astype(np.float32)
    weights.setflags(write=False)  # it is cached
    return weights
