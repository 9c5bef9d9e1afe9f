"""Files and folders that programs leave beside images: passed over wherever a folder is listed."""

from __future__ import annotations

# In lower case. Of macOS's archives, of network storage, of Windows, of file systems.
_LITTER = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "#snapshot",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "icon\r",
    }
)
_LITTER_BYTES = frozenset(name.encode() for name in _LITTER)


def is_litter(name: str | bytes) -> bool:
    """Whether one component of a path is hidden (".ipynb_checkpoints") or known litter.

    Ask it of every component below the folder that the user named, not of that folder itself.
    """
    if isinstance(name, bytes):
        return name.startswith(b".") or name.lower() in _LITTER_BYTES
    return name.startswith(".") or name.lower() in _LITTER
