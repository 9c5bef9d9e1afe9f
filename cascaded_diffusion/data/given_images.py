"""The user's own images to be enlarged: one file or a folder of them, of one size."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from cascaded_diffusion.data.corruption import CorruptRecord
from cascaded_diffusion.data.decode import SUFFIXES, decode_image
from cascaded_diffusion.data.folder import load_folder
from cascaded_diffusion.data.transforms import center_crop, resize_uint8
from cascaded_diffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class GivenImages:
    """Images of one size, in order of their names.

    Attributes:
      images: uint8 [n, h, h, C].
      names: the paths of their files, relative to the folder.
      passed_over: which other files there are, for people; "" for none.
      notes: what was done to the images, in lines for people.
    """

    images: np.ndarray
    names: tuple[str, ...]
    passed_over: str
    notes: tuple[str, ...]


def read_given_images(
    path: str,
    *,
    channels: int,
    sizes: Sequence[int],
    resize_to: int | None,
    max_pixels: int,
    flag: str,
) -> GivenImages:
    """Reads the image files of a folder and of the folders in it, or one image file.

    Hidden files, and files that are no images, are passed over.

    Args:
      path: the file or folder.
      channels: 1 (grey) or 3 (RGB); images of the other kind are converted, and noted.
      sizes: the sizes that an image may have, in pixels.
      resize_to: one of `sizes`, to which the centre square of every image is shrunk. None: the
        images have one of the sizes.
      max_pixels: larger images are refused.
      flag: the flag that named the path, for error messages.

    Raises:
      UserError: there is no such file or folder, or no image in it; an image cannot be read, or
        has another size.
    """
    names, files, passed_over = _listed(path, flag)
    converted = collections.Counter[str]()
    first: dict[str, str] = {}
    images: list[np.ndarray] = []
    for name, file in zip(names, files, strict=True):
        try:
            pixels, kind = _decoded(file.read_bytes(), channels, max_pixels)
        except (CorruptRecord, OSError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            raise UserError(f"--{flag}={path}: {name}: {reason}") from e
        if kind is not None:
            converted[kind] += 1
            first.setdefault(kind, name)
        images.append(
            fitted(pixels, sizes=sizes, resize_to=resize_to, name=name, flag=f"--{flag}={path}")
        )
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"--{flag}={path}: {names[0]} is {_size(images[0])}, {name} {_size(images[-1])}:"
                " expected images of one size"
            )
    to = "grey" if channels == 1 else "RGB"
    notes = tuple(
        f"converted to 8-bit {to}: {count} of {len(images)} images ({kind}), the first is"
        f" {first[kind]}"
        for kind, count in converted.items()
    )
    return GivenImages(np.stack(images), names, passed_over, notes)


def fitted(
    image: np.ndarray, *, sizes: Sequence[int], resize_to: int | None, name: str, flag: str
) -> np.ndarray:
    """An image uint8 [H, W, C] at a size that a cascade accepts: uint8 [h, h, C].

    `sizes` and `resize_to` are those of `read_given_images`; messages contain `name` and `flag`.

    Raises:
      UserError: the image has another size, or is smaller than `resize_to`.
    """
    height, width = image.shape[:2]
    if resize_to is not None:
        if min(height, width) < resize_to:
            raise UserError(
                f"{flag}: {name} is {_size(image)}, expected at least {resize_to} x {resize_to}, to"
                " which --resize_low_res shrinks: images are not enlarged by other means"
            )
        return resize_uint8(center_crop(image), resize_to, "area")
    if height != width or height not in sizes:
        wanted = " or ".join(f"{size} x {size}" for size in sizes)
        how = ""
        if shrinkable := [size for size in sizes if size <= min(height, width)]:
            how = (
                f"; --resize_low_res={shrinkable[-1]} cuts out the centre square of every image"
                " and shrinks it"
            )
        raise UserError(
            f"{flag}: {name} is {_size(image)}, expected {wanted}, as the cascade enlarges{how}"
        )
    return image


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} pixels"


def output_names(names: Iterable[str]) -> list[str]:
    """The names of PNG files for images: `cat.jpg` -> `cat.png`.

    If any two would be the same, on a file system that ignores case, all become `cat.jpg.png`.
    """
    paths = [pathlib.PurePath(name) for name in names]
    short = [str(path.with_suffix(".png")) for path in paths]
    if len({name.casefold() for name in short}) == len(short):
        return short
    return [f"{path}.png" for path in paths]


def _listed(path: str, flag: str) -> tuple[tuple[str, ...], list[pathlib.Path], str]:
    """The names, the files, and what was passed over."""
    if os.path.isdir(path):
        found = load_folder(path, ".", classes=None)
        names = tuple(os.fsdecode(found.name(i)) for i in range(len(found)))
        return names, [pathlib.Path(path, name) for name in names], found.passed_over
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--{flag}={path}: no such file or folder")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--{flag}={path}: expected a folder of images, a file that ends with"
            f" {', '.join(SUFFIXES)}, or an .npz with arr_0 (images)"
        )
    return (file.name,), [file], ""


def _decoded(data: bytes, channels: int, max_pixels: int) -> tuple[np.ndarray, str | None]:
    """The pixels, and from what they were converted, if they were."""
    colour, kind = decode_image(data, channels=3, max_pixels=max_pixels)
    is_grey = bool((colour == colour[..., :1]).all())
    if channels == 3:
        return colour, kind or ("grey" if is_grey else None)
    grey, kind = decode_image(data, channels=1, max_pixels=max_pixels)
    return grey, kind or (None if is_grey else "colour")
