"""PNG files, and folders of them, as other frameworks leave their samples.

Decoders inflate text, colour profiles, EXIF and private chunks, or refuse files with large ones,
though pixels do not depend on them. `essential_png` leaves them out.
"""

import collections
import io
import os
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.paths import describe_passed_over, is_litter

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Transparency, and what makes a file an animation. All other ancillary chunks are removed;
# critical ones (with a capital first letter: IHDR, PLTE, IDAT, IEND) stay.
_KEPT = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
# Limits that are checked from the header, before anything is decoded.
_MAX_PIXELS = 64_000_000
_MAX_BYTES = 1 << 30
_LOSSY = {".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".heic"}
_END = b"\0\0\0\0IEND\xaeB`\x82"
_HEADER_BYTES = 33
_COLORS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_CHANNELS = {0: 1, 2: 3}


def essential_png(data: bytes) -> bytes:
    """A PNG file without the chunks that its pixels do not need; nothing is inflated.

    Raises ValueError if it is no PNG, ends before its last chunk, or has a chunk, kept or not, with
    a wrong checksum.
    """
    if not data.startswith(SIGNATURE):
        raise ValueError("no PNG")
    view = memoryview(data)
    parts, at = [view[: len(SIGNATURE)]], len(SIGNATURE)
    while at + 12 <= len(data):
        kind = data[at + 4 : at + 8]
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("damaged PNG: a chunk's checksum is wrong")
        if kind in _KEPT or not kind[0] & 0x20:
            parts.append(view[at : end + 4])
        if kind == b"IEND":
            return b"".join(parts)
        at = end + 4
    raise ValueError("damaged PNG: it ends too early")


class PngFolder:
    """The PNGs of a folder and of the folders in it, in order of their paths, read when indexed.

    Links to folders are followed; hidden files and folders are passed over. Lossy formats are
    refused, since compression that the eye does not see changes an FID considerably. The headers
    of all files are compared at once; their pixels are read later. `shape` is (n, H, W, C), and
    `passed_over` tells people which other files there are.

    Raises UserError if there are fewer than two PNGs, or images of a lossy format, or a file whose
    header is damaged or has another size or kind than the first one's.
    """

    def __init__(self, path: pathlib.Path, *, flag: str):
        self._flag, self._root = flag, path
        self._files: list[str] = []
        self._others: collections.Counter[str] = collections.Counter()
        try:
            self._list()
        except OSError as e:
            where = os.fsdecode(e.filename or os.fspath(path))
            raise UserError(f"--{flag}={path}: {where} cannot be listed ({e.strerror})") from e
        self.passed_over = describe_passed_over(self._others)
        if len(self._files) < 2:
            others = f" ({self.passed_over})" if self.passed_over else ""
            problem = f"{len(self._files)} .png files there, expected at least 2{others}"
            raise UserError(f"--{flag}={path}: {problem}")
        first = self._header(self._files[0])
        for name in self._files[1:]:
            self._check_shape(name, self._header(name), first)
        self.shape = (len(self._files), *first)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, indices: slice | np.ndarray) -> np.ndarray:
        """uint8 [m, H, W, C]. Raises UserError for files that have changed or cannot be read."""
        files = np.asarray(self._files, dtype=object)[indices]
        return np.stack([self._read(name) for name in np.atleast_1d(files)])

    def _list(self) -> None:
        """Finds the files, in order of their paths; each folder once, however links lead to it."""
        left, seen = [""], set()
        while left:
            below = left.pop()
            folder = os.path.join(self._root, below)
            info = os.stat(folder)
            if (info.st_dev, info.st_ino) in seen:
                self._others["links to a folder that was read already"] += 1
                continue
            seen.add((info.st_dev, info.st_ino))
            folders = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = os.path.join(below, entry.name)
                    if is_litter(entry.name):
                        self._pass_over_litter(entry)
                    elif entry.is_dir():
                        folders.append(name)
                    else:
                        self._add(entry, name)
            left.extend(sorted(folders, reverse=True))
        self._files.sort(key=lambda name: name.split(os.sep))

    def _pass_over_litter(self, entry: os.DirEntry[str]) -> None:
        if not entry.is_dir(follow_symlinks=False):
            self._others["hidden"] += 1
        elif count := sum(len(files) for *_, files in os.walk(entry.path)):
            self._others[f"in {entry.name}"] += count

    def _add(self, entry: os.DirEntry[str], name: str) -> None:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in _LOSSY:
            problem = "is of a lossy format, expected PNG: compression changes the features"
            raise self._error(name, problem)
        if suffix != ".png":
            self._others[suffix or "without suffix"] += 1
        elif not entry.is_file():  # reading a pipe, for example, might never end
            raise self._error(name, "is no regular file")
        else:
            self._files.append(name)

    def _error(self, name: str, problem: str) -> UserError:
        return UserError(f"--{self._flag}={self._root}: {name} {problem}")

    def _header(self, name: str) -> tuple[int, int, int]:
        """(H, W, C) of a file. Only its beginning and end are read, which tell if it is whole."""
        try:
            with open(os.path.join(self._root, name), "rb") as f:
                size = os.fstat(f.fileno()).st_size
                head = f.read(_HEADER_BYTES)
                f.seek(max(size - len(_END), 0))
                end = f.read(len(_END))
        except OSError as e:
            raise self._error(name, f"cannot be read ({e.strerror})") from e
        if size > _MAX_BYTES:
            raise self._error(name, f"has {size} bytes, expected at most {_MAX_BYTES}")
        whole = len(head) == _HEADER_BYTES and head.startswith(SIGNATURE) and head[12:16] == b"IHDR"
        if not whole or zlib.crc32(head[12:29]) != int.from_bytes(head[29:], "big"):
            raise self._error(name, "cannot be read as PNG (its header is damaged)")
        if end != _END:  # the file is truncated, or something harmless follows
            self._essential(name)
        width, height, depth, color = struct.unpack(">IIBB", head[16:26])
        if not 0 < width * height <= _MAX_PIXELS:
            problem = f"has {width} x {height} pixels, expected at most {_MAX_PIXELS}"
            raise self._error(name, problem)
        if depth != 8 or color not in _CHANNELS:
            kind = f"{depth}-bit {_COLORS.get(color, 'of an unknown kind')}"
            raise self._error(name, f"is {kind}, expected 8-bit grey or RGB")
        return height, width, _CHANNELS[color]

    def _essential(self, name: str) -> bytes:
        try:
            return essential_png(pathlib.Path(self._root, name).read_bytes())
        except (OSError, ValueError) as e:
            raise self._error(name, f"cannot be read as PNG ({e})") from e

    def _read(self, name: str) -> np.ndarray:
        data = self._essential(name)
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise ValueError(f"animated, {image.n_frames} frames")
                pixels = np.asarray(image)
        except Exception as e:  # damaged files make decoders raise anything
            reason = " ".join(str(e).split()) or type(e).__name__
            raise self._error(name, f"cannot be read as PNG ({reason})") from e
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        self._check_shape(name, pixels.shape, self.shape[1:])
        return pixels

    def _check_shape(self, name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
        if shape != first:
            as_first = f"as the first image, {self._files[0]}, is"
            raise self._error(name, f"is {shape}, expected {first}, {as_first}")
