r"""The two resizes of a cascade, on the device.

Down, from the data to a stage's targets and low-res input, is the true area average of
`resize_weights`, eq. (1), as in the host's data pipeline. Up, from a low-res image to the
network's input, is bilinear or bicubic, with half-pixel centres; it needs no antialiasing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cascaded_diffusion.resize_weights import area_weights


def area_downsample(image: jax.Array, resolution: int) -> jax.Array:
    """Shrinks [B, H, W, C] to [B, resolution, resolution, C] by area averages.

    Raises:
      ValueError: `resolution` is larger than the image.
    """
    _, height, width, _ = image.shape
    if (height, width) == (resolution, resolution):
        return image
    if resolution > min(height, width):
        raise ValueError(f"cannot shrink {height}x{width} to {resolution}")
    rows, columns = area_weights(height, resolution), area_weights(width, resolution)
    # Highest precision: on TPU a default float32 matmul rounds its inputs to bfloat16.
    return jnp.einsum("ih,bhwc,jw->bijc", rows, image, columns, precision=jax.lax.Precision.HIGHEST)


def _upsample(method: str) -> Callable[[jax.Array, tuple[int, int]], jax.Array]:
    def enlarge(image: jax.Array, size: tuple[int, int]) -> jax.Array:
        b, _, _, c = image.shape
        return jax.image.resize(
            image, (b, *size, c), method, antialias=False, precision=jax.lax.Precision.HIGHEST
        )

    return enlarge


UPSAMPLERS = {"bilinear": _upsample("bilinear"), "bicubic": _upsample("bicubic")}
