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

import io
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from cascaded_diffusion.data.records import CorruptRecord
from cascaded_diffusion.files.image_files import SIGNATURE, essential_png

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp")
_JPEG_START = b"\xff\xd8"
_KINDS = {
    _JPEG_START: JpegImagePlugin.JpegImageFile,
    SIGNATURE: PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
# We check the number of pixels ourselves.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes, *, channels: int, max_pixels: int) -> tuple[np.ndarray, str | None]:
    """Decodes an image file to uint8 [H, W, channels]: 1 (grey) or 3 (RGB).

    Also returns what the image was converted from if it was not 8-bit grey or RGB ("CMYK",
    "16-bit", "palette", "transparency"), else None. Raises CorruptRecord if the data is damaged,
    animated, no image of `FORMATS`, or has more than `max_pixels`.
    """
    if not data:
        raise CorruptRecord("empty, 0 bytes")
    if data.startswith(_JPEG_START):
        fast = _decode_jpeg(data, channels, max_pixels)
        if fast is not None:
            return fast, None
    try:
        return _decode_any(data, channels, max_pixels)
    except CorruptRecord:
        raise
    except Exception as e:  # damaged files make decoders raise anything
        reason = " ".join(str(e).split()) or type(e).__name__
        raise CorruptRecord(f"cannot be read as {', '.join(FORMATS)} ({reason})") from e


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
    wanted, accepted = ("GRAY", ["GRAY"]) if channels == 1 else ("RGB", ["RGB", "YCbCr"])
    if colorspace not in accepted:
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace=wanted, strict=True)
    except ValueError as e:
        raise CorruptRecord(f"damaged JPEG ({e})") from e


def _decode_any(data: bytes, channels: int, max_pixels: int) -> tuple[np.ndarray, str | None]:
    if data.startswith(SIGNATURE):
        # This also verifies the checksums of pixels, which Pillow does not.
        data = essential_png(data)
    # Image.open would take a phone's JPEG of several pictures for an animation, and has a limit
    # of its own on the number of pixels.
    kind = next((kind for start, kind in _KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise CorruptRecord(f"cannot be read as {', '.join(FORMATS)}")
    image = kind(io.BytesIO(data))
    _check_size(image.width, image.height, max_pixels)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise CorruptRecord(f"animated, {frames} frames: expected a single image")
    if image.format == "JPEG" and image.mode in ("L", "RGB", "CMYK"):
        # Pillow ignores damage after which libjpeg can continue.
        colours = "CMYK" if image.mode == "CMYK" else "RGB"
        simplejpeg.decode_jpeg(data, colorspace=colours, strict=True)
    image.load()
    note = {"CMYK": "CMYK", "P": "palette"}.get(image.mode)
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        note = "transparency"
    # Byte 24 of a PNG is its bit depth. Pillow would cut such pixels to 8 bits.
    if image.format == "PNG" and data[24] == 16:
        image, note = _from_16_bit(data), "16-bit"
    elif image.mode == "P" and note == "transparency":
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return (pixels[..., None] if channels == 1 else pixels), note


def _from_16_bit(data: bytes) -> Image.Image:
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    deep = deep.reshape(*deep.shape[:2], -1)
    shallow = np.rint(deep[..., : 3 if deep.shape[2] >= 3 else 1] / 257.0).astype(np.uint8)
    # cv2 has blue first.
    return Image.fromarray(shallow[..., ::-1] if shallow.shape[2] == 3 else shallow[..., 0])
