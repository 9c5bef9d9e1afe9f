"""PNG files without what their pixels do not need: text, colour profiles, EXIF, private chunks.

Decoders inflate such chunks, or refuse files with large ones, though pixels do not depend on them.
"""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Transparency, and what makes a file an animation. All other ancillary chunks are removed;
# critical ones (with a capital first letter: IHDR, PLTE, IDAT, IEND) stay.
_KEPT = (b"tRNS", b"acTL", b"fcTL", b"fdAT")


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
