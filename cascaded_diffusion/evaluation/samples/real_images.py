"""The real images of a data split, shrunk to a stage's resolution in chunks."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from cascaded_diffusion.cascade.pixels import area_downsample, float_from_uint8, uint8_from_float
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages

_CHUNK = 500


@dataclasses.dataclass(frozen=True)
class RealSplit:
    """A split of a data set."""

    data: str  # the data set's name
    split: str  # the split's name
    size: int  # the number of its images
    # Indices -> `image` uint8 [n, H, W, C] and `label` int32 [n].
    read: Callable[[Sequence[int]], Mapping[str, np.ndarray]]
    crop: str = "none"  # how the images became square, for fingerprints
    resize: str = "area"  # how they get to a stage's resolution, for fingerprints

    def __len__(self) -> int:
        return self.size

    def rows(self, rows: Sequence[int], resolution: int) -> LabelledImages:
        """Chosen images at a resolution."""
        parts = list(self.chunks(resolution, rows))
        return LabelledImages(
            np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])
        )

    def whole(self, resolution: int) -> LabelledImages:
        """All images at a resolution, in memory."""
        return self.rows(range(self.size), resolution)

    def chunks(
        self, resolution: int, rows: Sequence[int] | None = None
    ) -> Iterator[LabelledImages]:
        """All images, or chosen ones, at a resolution, in order."""
        rows = range(self.size) if rows is None else rows
        for i in range(0, len(rows), _CHUNK):
            yield shrunk(self.raw(rows[i : i + _CHUNK]), resolution)

    def spread(self, count: int, resolution: int) -> LabelledImages:
        """`count` images spread over a split sorted by class, or if it has fewer, all in turn."""
        rows = np.arange(count)
        rows = rows % self.size if count > self.size else rows * self.size // count
        return self.rows(rows, resolution)

    def raw(self, rows: Sequence[int]) -> LabelledImages:
        """Chosen images at the data set's resolution."""
        examples = self.read(rows)
        return LabelledImages(examples["image"], examples["label"])


def shrunk(data: LabelledImages, resolution: int) -> LabelledImages:
    """Data shrunk by the cascade's own area operator and rounded by its own rule."""
    images = uint8_from_float(area_downsample(float_from_uint8(data.images), resolution))
    return LabelledImages(np.asarray(images), data.labels)
