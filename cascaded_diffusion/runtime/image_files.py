"""Folders of PNG files, as other frameworks leave their samples."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import numpy as np
from PIL import Image

from cascaded_diffusion.errors import UserError

# Checked from the header, before anything is decoded.
_MAX_PIXELS = 64_000_000
_LOSSY = {".jpg", ".jpeg", ".webp"}


class PngFolder:
    """The PNGs of a folder and of the folders in it, in order of their paths, read when indexed.

    Lossy formats are refused: compression that the eye does not see moves an FID by much.

    Args:
      path: the folder.
      flag: the flag that named it, for error messages.

    Attributes:
      shape: (n, H, W, C), of which H, W and C are the first image's.

    Raises:
      UserError: fewer than two PNGs, or images of a lossy format.
    """

    def __init__(self, path: pathlib.Path, *, flag: str):
        self._flag, self._root = flag, path
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        lossy = [p for p in files if p.suffix.lower() in _LOSSY]
        if lossy:
            raise UserError(
                f"--{flag}={path}: {lossy[0].relative_to(path)} is of a lossy format, expected"
                " PNG: compression changes the features"
            )
        self._files = [p for p in files if p.suffix.lower() == ".png"]
        if len(self._files) < 2:
            raise UserError(
                f"--{flag}={path}: {len(self._files)} .png files there, expected at least 2"
            )
        first = self._read(self._files[0], None)
        self.shape = (len(self._files), *first.shape)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """uint8 [m, H, W, C] for a slice or an array of indices.

        Raises:
          UserError: a file cannot be read, or has another size than the first.
        """
        files = np.asarray(self._files, dtype=object)[rows]
        return np.stack([self._read(p, self.shape[1:]) for p in np.atleast_1d(files)])

    def _read(self, path: pathlib.Path, shape: tuple[int, ...] | None) -> np.ndarray:
        name = f"--{self._flag}={self._root}: {path.relative_to(self._root)}"
        try:
            with _opened(path) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise UserError(
                        f"{name} has {image.width} x {image.height} pixels, expected at most"
                        f" {_MAX_PIXELS}"
                    )
                if image.mode not in ("L", "RGB"):
                    raise UserError(f"{name} has mode {image.mode}, expected 8-bit grey or RGB")
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise UserError(f"{name} cannot be read as PNG ({e})") from e
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if shape is not None and pixels.shape != shape:
            raise UserError(f"{name} is {pixels.shape}, expected {shape}, as the first image")
        return pixels


def _opened(path: pathlib.Path) -> Image.Image:
    with warnings.catch_warnings():
        # Of images that are refused for their size anyway.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=["PNG"])
