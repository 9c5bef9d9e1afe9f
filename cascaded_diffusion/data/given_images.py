"""The user's own images to be enlarged: one file or a folder of them, of one size."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cascaded_diffusion.data.decode import SUFFIXES, decode_image
from cascaded_diffusion.data.folder import FolderSource, load_folder
from cascaded_diffusion.data.records import CorruptRecord
from cascaded_diffusion.data.transforms import center_crop, resize_uint8
from cascaded_diffusion.errors import UserError


class GivenImages(NamedTuple):
    """Images of one size, uint8 [n, h, h, C], in order of their `names`: paths below the folder.

    Lines for people say which other files were `passed_over` ("" for none), and what was done to
    the images (`notes`).
    """

    images: np.ndarray
    names: tuple[str, ...]
    passed_over: str
    notes: tuple[str, ...]


def read_given_images(
    path: str, *, channels: int, sizes: Sequence[int], resize_to: int | None, max_pixels: int
) -> GivenImages:
    """Reads the image files of a folder and of the folders in it, or one image file: --low_res.

    Hidden files, and files that are no images, are passed over. `channels` is 1 (grey) or 3
    (RGB); images of the other kind are converted, and noted. The images have one of the `sizes`,
    or their centre squares are shrunk to one of them, `resize_to`. Images of more than
    `max_pixels` are refused.

    Raises UserError if there is no such file or folder, or no image in it, or if an image cannot
    be read or has another size.
    """
    files, flag = _listed(path), f"--low_res={path}"
    names = tuple(os.fsdecode(files.name(i)) for i in range(len(files)))
    converted: dict[str, list[str]] = {}
    images: list[np.ndarray] = []
    for index, name in enumerate(names):
        try:
            pixels, kind = _decoded(files.read(index).image, channels, max_pixels)
        except CorruptRecord as e:
            raise UserError(f"{flag}: {name}: {e}") from e
        if kind is not None:
            converted.setdefault(kind, []).append(name)
        images.append(fitted(pixels, sizes=sizes, resize_to=resize_to, where=f"{flag}: {name}"))
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"{flag}: {names[0]} is {_size(images[0])}, {name} {_size(images[-1])}:"
                " expected images of one size"
            )
    to = f"converted to 8-bit {'grey' if channels == 1 else 'RGB'}"
    notes = tuple(
        f"{to}: {len(found)} of {len(images)} images ({kind}), the first is {found[0]}"
        for kind, found in converted.items()
    )
    return GivenImages(np.stack(images), names, files.passed_over, notes)


def _listed(path: str) -> FolderSource:
    if os.path.isdir(path):
        return load_folder(path, ".", classes=None)
    if not os.path.isfile(path):
        raise UserError(f"--low_res={path}: no such file or folder")
    if not path.lower().endswith(SUFFIXES):
        raise UserError(
            f"--low_res={path}: expected a folder of images, a file that ends with"
            f" {', '.join(SUFFIXES)}, or an .npz with arr_0 (images)"
        )
    folder, name = os.path.split(os.fsencode(path))
    return FolderSource(folder, ".", [(name, 0, 0)], np.zeros(1, np.int32), [], "")


def fitted(
    image: np.ndarray, *, sizes: Sequence[int], resize_to: int | None, where: str
) -> np.ndarray:
    """An image uint8 [H, W, C] at a size that a cascade accepts: uint8 [h, h, C].

    `sizes` and `resize_to` are those of `read_given_images`. Raises UserError, with `where` the
    image is, if it has another size or is smaller than `resize_to`.
    """
    height, width = image.shape[:2]
    if resize_to is not None:
        if min(height, width) < resize_to:
            raise UserError(
                f"{where} is {_size(image)}, expected at least {resize_to} x {resize_to}, to"
                " which --resize_low_res shrinks: images are not enlarged by other means"
            )
        return resize_uint8(center_crop(image), resize_to, "area")
    if height != width or height not in sizes:
        wanted = " or ".join(f"{size} x {size}" for size in sizes)
        problem = f"{where} is {_size(image)}, expected {wanted}, as the cascade enlarges"
        if shrinkable := [size for size in sizes if size <= min(height, width)]:
            problem += (
                f"; --resize_low_res={shrinkable[-1]} cuts out the centre square of every image"
                " and shrinks it"
            )
        raise UserError(problem)
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


def _decoded(data: bytes, channels: int, max_pixels: int) -> tuple[np.ndarray, str | None]:
    """The pixels, and from what they were converted, if they were."""
    colour, kind = decode_image(data, channels=3, max_pixels=max_pixels)
    is_grey = bool((colour == colour[..., :1]).all())
    if channels == 3:
        return colour, kind or ("grey" if is_grey else None)
    grey, kind = decode_image(data, channels=1, max_pixels=max_pixels)
    return grey, kind or (None if is_grey else "colour")
