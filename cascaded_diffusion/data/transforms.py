"""Host-side transforms of single records. Randomness comes in as a generator."""

from __future__ import annotations

import numpy as np

from cascaded_diffusion.data.sources import Record


def random_flip(record: Record, rng: np.random.Generator) -> Record:
    """Mirrors the image left to right, half of the time."""
    if rng.random() < 0.5:
        return {"image": record["image"][:, ::-1], "label": record["label"]}
    return record
