"""Encoded images -> pixels: JPEG, PNG and WebP. All damage is an error.

JPEGs take a strict fast path (libjpeg-turbo, where every warning of the decoder is an error),
everything else goes through Pillow. Both give the same pixels, those of libjpeg's accurate DCT.
The number of pixels is checked from the header, before anything is decoded. Images other than
8-bit RGB or grey are converted by a fixed rule, and the caller is told which:

- CMYK by Pillow's conversion; palettes by their colours; transparency is dropped
- 16 bits per channel: round(v / 257)
- EXIF orientation is ignored, as it is in TensorFlow, ADM and torchvision

Animated files are refused, since nothing says which frame is meant. Phones put several pictures
into one JPEG (MPO): the first is the photo, the others are previews or depth. Text, colour
profiles and other ancillary chunks of a PNG are ignored, however large.
"""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.files.image_files import SIGNATURE, essential_png

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp")
_JPEG_START = b"\xff\xd8"
_KINDS = {
    _JPEG_START: JpegImagePlugin.JpegImageFile,
    SIGNATURE: PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
_COLORSPACES = {1: "GRAY", 3: "RGB"}
# We check the number of pixels ourselves.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_PLAIN_JPEG = ("GRAY", "RGB", "YCbCr")


def decode_image(data: bytes, *, channels: int, max_pixels: int) -> tuple[np.ndarray, str | None]:
    """Decodes one image.

    Args:
      data: the file's bytes.
      channels: 1 (grey) or 3 (RGB), to which the image is converted.
      max_pixels: larger images are refused.

    Returns:
      uint8 [H, W, channels]; and what the image was converted from if it was not 8-bit grey or
      RGB ("CMYK", "16-bit", "palette", "transparency"), else None.

    Raises:
      CorruptRecord: the data is damaged, animated, too large, or no image of `FORMATS`.
    """
    if not data:
        raise CorruptRecord("empty, 0 bytes")
    if data.startswith(_JPEG_START):
        fast = _decode_jpeg(data, channels, max_pixels)
        if fast is not None:
            return fast, None
    return _decode_any(data, channels, max_pixels)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise CorruptRecord(f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise CorruptRecord(
            f"{width} x {height} pixels, expected at most {max_pixels} (config.data.max_pixels)"
        )


def _decode_jpeg(data: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """A plain JPEG; None if Pillow should decide."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    if colorspace not in _PLAIN_JPEG or (colorspace == "GRAY") != (channels == 1):
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace=_COLORSPACES[channels], strict=True)
    except ValueError as e:
        raise CorruptRecord(f"damaged JPEG ({e})") from e


def _decode_any(data: bytes, channels: int, max_pixels: int) -> tuple[np.ndarray, str | None]:
    try:
        if data.startswith(SIGNATURE):
            # This also verifies the checksums of pixels, which Pillow does not.
            data = essential_png(data)
        image = _opened(data)
        _check_size(image.width, image.height, max_pixels)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise CorruptRecord(f"animated, {frames} frames: expected a single image")
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            # Pillow ignores damage after which libjpeg can continue.
            simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        image.load()
        # Byte 24 of a PNG is its bit depth. Pillow would cut such pixels to 8 bits.
        if image.format == "PNG" and data[24] == 16:
            return _from_16_bit(data, channels), "16-bit"
        return _to_channels(image, channels)
    except CorruptRecord:
        raise
    except Exception as e:  # damaged files make decoders raise anything
        raise CorruptRecord(f"cannot be read as {', '.join(FORMATS)} ({_one_line(e)})") from e


def _opened(data: bytes) -> Image.Image:
    # Image.open would take a phone's JPEG of several pictures for an animation, and has a limit
    # of its own on the number of pixels.
    for start, kind in _KINDS.items():
        if data.startswith(start):
            return kind(io.BytesIO(data))
    raise CorruptRecord(f"cannot be read as {', '.join(FORMATS)}")


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _from_16_bit(data: bytes, channels: int) -> np.ndarray:
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    deep = deep.reshape(*deep.shape[:2], -1)
    shallow = np.rint(deep[..., : 3 if deep.shape[2] >= 3 else 1] / 257.0).astype(np.uint8)
    # cv2 has blue first.
    image = Image.fromarray(shallow[..., ::-1] if shallow.shape[2] == 3 else shallow[..., 0])
    return _to_channels(image, channels)[0]


def _to_channels(image: Image.Image, channels: int) -> tuple[np.ndarray, str | None]:
    note = {"CMYK": "CMYK", "P": "palette"}.get(image.mode)
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        note = "transparency"
    if image.mode == "P" and note == "transparency":
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return (pixels[..., None] if channels == 1 else pixels), note
