"""Which files in a folder of images are passed over, and how users are told about them."""

from __future__ import annotations

import os
from collections.abc import Mapping

# In lower case: leftovers of macOS archives, network storage, Windows and file systems.
_LITTER = frozenset(
    (
        "__macosx", "@eadir", "#recycle", "#snapshot", "thumbs.db", "ehthumbs.db", "desktop.ini",
        "$recycle.bin", "system volume information", "lost+found", "icon\r",
    )
)  # fmt: skip
_MAX_KINDS = 6


def is_litter(name: str | bytes) -> bool:
    """Whether one component of a path is hidden (".ipynb_checkpoints") or known litter.

    Apply it to every component below the folder that the user named, not to that folder.
    """
    text = os.fsdecode(name)
    return text.startswith(".") or text.lower() in _LITTER


def describe_passed_over(counts: Mapping[str, int]) -> str:
    """`3 other files passed over: 2 .txt, 1 hidden`, from counts by kind; "" for none."""
    total = sum(counts.values())
    if not total:
        return ""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{n:,} {kind}" for kind, n in ranked[:_MAX_KINDS]]
    more = ["and more"] if len(ranked) > _MAX_KINDS else []
    files = "other file" if total == 1 else "other files"
    return f"{total:,} {files} passed over: {', '.join(kinds + more)}"
