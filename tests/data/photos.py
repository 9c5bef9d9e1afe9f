"""Folders of made-up photos, and configs that read them."""

import io
import pathlib

import numpy as np
from PIL import Image

from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig
from tests.tiny import config_values, with_overrides

CLASSES = ("ant", "bee", "cow")


def photo(index: int, kind: str = "JPEG", size: tuple[int, int] | None = None) -> bytes:
    """An image file whose colours depend on the index."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    size = size or (44 + 3 * (index % 4), 40 + 2 * (index % 3))
    data = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(data, kind)
    return data.getvalue()


def write_tree(root: pathlib.Path, split: str = "train", per_class: int = 8) -> pathlib.Path:
    """SPLIT/CLASS/NAME.jpg for each of `CLASSES`."""
    for k, name in enumerate(CLASSES):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(per_class):
            (folder / f"{i:03d}.jpg").write_bytes(photo(100 * k + i))
    return root


def photo_config(path: pathlib.Path, *, sr: bool = False, **overrides) -> RunConfig:
    """A config at 16 px (or 16 to 32) that reads a folder; overrides as `data__resolution=...`."""
    values = config_values("cifar10_sr32" if sr else "cifar10_base16")
    size = 32 if sr else 16
    named = {
        "data.name": "folder",
        "data.path": str(path),
        "data.prepared_dir": None,
        "data.resolution": size,
        "data.train_split": "train",
        "data.eval_split": "train",
        "data.random_flip": True,
        "stage.num_classes": len(CLASSES),
        "train.batch_size": 8,
        "eval.num_samples": 30,
        "eval.final_num_samples": 30,
        "eval.batch_size": 24,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return run_config_from(with_overrides(values, named))
