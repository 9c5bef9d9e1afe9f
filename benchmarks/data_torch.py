"""The PyTorch side of `data.py`: needs an environment with PyTorch and Pillow, nothing of ours."""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import time

import data_cpu
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

SIZE, BATCH = 64, 64
LIBRARY = f"PyTorch {torch.__version__}"


class Photos(Dataset):
    """Class folders of JPEGs."""

    def __init__(self, paths: list[pathlib.Path]):
        self._paths = paths
        self._classes = sorted({path.parent.name for path in paths})

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Cropped, shrunk by Pillow's box filter, flipped at random."""
        path = self._paths[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        size = min(image.size)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.resize(
            (SIZE, SIZE), Image.Resampling.BOX, box=(left, top, left + size, top + size)
        )
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        label = self._classes.index(path.parent.name)
        return torch.from_numpy(np.array(image)), label


def main() -> None:
    """Measures; prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=pathlib.Path)
    parser.add_argument("--secs", type=float)
    args = parser.parse_args()
    photos = Photos(sorted((args.photos / "train").rglob("*.jpg")))
    loader = DataLoader(
        photos, BATCH, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True
    )

    def batches():  # noqa: ANN202
        while True:
            yield from loader

    endless = batches()
    for _ in range(11):
        next(endless)
    begun = data_cpu.seconds()
    start, images = time.monotonic(), 0
    while time.monotonic() - start < args.secs:
        images += len(next(endless)[0])
    rate, cpu = images / (time.monotonic() - start), data_cpu.seconds() - begun
    print(json.dumps({"images_per_sec": rate, "cpu_ms": 1000 * cpu / images, "library": LIBRARY}))


if __name__ == "__main__":
    main()
