"""Stored samples: ADM-style `.npz` files, which other frameworks read and write too."""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from cascaded_diffusion.config import StageConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import write_whole


def save_samples(
    path: pathlib.Path,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes an ADM-style file: `arr_0` uint8 NHWC, `arr_1` int64 labels.

    `provenance`, all that the samples are a function of, is kept beside them as JSON.
    """
    data = io.BytesIO()
    arrays = {"arr_0": images, "arr_1": labels.astype(np.int64)}
    if provenance is not None:
        arrays["provenance"] = np.asarray(json.dumps(provenance))
    np.savez(data, **arrays)
    write_whole(path, data.getvalue())


def read_provenance(path: pathlib.Path) -> Mapping[str, Any] | None:
    """What `save_samples` was told of the samples' origin; None without file or origin."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return json.loads(str(stored["provenance"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def stored_samples(path: pathlib.Path) -> np.ndarray:
    """The images of a file whose provenance has been read."""
    with np.load(path, allow_pickle=False) as stored:
        return stored["arr_0"]


def load_samples(path: str, stage: StageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Reads an ADM-style file.

    Raises:
      UserError: it cannot be read, or does not hold images as the stage makes them.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            images, labels = stored["arr_0"], stored["arr_1"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(
            f"--samples={path}: expected an .npz with arr_0 (images) and arr_1 (labels) ({e})"
        ) from e
    expected = (stage.resolution, stage.resolution, stage.channels)
    if images.dtype != np.uint8 or images.shape[1:] != expected or len(images) < 2:
        raise UserError(
            f"--samples={path}: arr_0 is {images.dtype} {images.shape}, expected uint8"
            f" (n, {', '.join(map(str, expected))}) with n of at least 2, as {stage.name!r} makes"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"--samples={path}: arr_1 is {labels.dtype} {labels.shape}, expected {len(images)}"
            " integer labels"
        )
    return images, labels
