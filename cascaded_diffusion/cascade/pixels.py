r"""Pixels on the device: from stored values to the model's range and back, and resized.

(1)  float = uint8 / 127.5 - 1                        [0, 255] -> [-1, 1]
(2)  uint8 = round(clip((float + 1) * 127.5, 0, 255)), halves to even

Down, from the data to a stage's targets and low-res input, images are resized by the true area
averages of `resize_weights`, as in the host's data pipeline. Up, from a low-res image to the
network's input, they are resized bilinearly or bicubically, with half-pixel centres, which needs
no antialiasing.
"""

from functools import partial

import jax
import jax.numpy as jnp

from cascaded_diffusion.resize_weights import area_weights


def float_from_uint8(image: jax.Array) -> jax.Array:
    """Eq. (1), float32."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def uint8_from_float(image: jax.Array) -> jax.Array:
    """Eq. (2). The caller excludes values that are not finite, which have no pixel value."""
    return jnp.round(jnp.clip((image + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def quantized(image: jax.Array) -> jax.Array:
    """`image` rounded to the 256 pixel values, float32 in [-1, 1], as if stored and read.

    The targets of a stage and the low-res input of the next one pass through this, whether they
    are generated or real, stored or not.
    """
    return float_from_uint8(uint8_from_float(image))


def area_downsample(image: jax.Array, resolution: int) -> jax.Array:
    """Shrinks [B, H, W, C] to [B, resolution, resolution, C] by area averages.

    Raises ValueError if `resolution` is larger than the image.
    """
    _, height, width, _ = image.shape
    if (height, width) == (resolution, resolution):
        return image
    if resolution > min(height, width):
        raise ValueError(f"cannot shrink {height}x{width} to {resolution}")
    rows, columns = area_weights(height, resolution), area_weights(width, resolution)
    # Highest precision: on TPU a default float32 matmul rounds its inputs to bfloat16.
    return jnp.einsum("ih,bhwc,jw->bijc", rows, image, columns, precision=jax.lax.Precision.HIGHEST)


def _upsample(image: jax.Array, size: tuple[int, int], *, method: str) -> jax.Array:
    shape, precision = (len(image), *size, image.shape[-1]), jax.lax.Precision.HIGHEST
    return jax.image.resize(image, shape, method, antialias=False, precision=precision)


# (image [B, h, w, C], (H, W)) -> [B, H, W, C].
UPSAMPLERS = {name: partial(_upsample, method=name) for name in ("bilinear", "bicubic")}
