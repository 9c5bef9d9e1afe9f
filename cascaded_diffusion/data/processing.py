"""Images of a raw source at a stage's sizes: decoded, cropped and resized as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from cascaded_diffusion.config.schema import MAX_PIXELS, DataConfig
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.records import RawExample, RawSource, Sized, Source
from cascaded_diffusion.data.transforms import CROPS, resize_uint8
from cascaded_diffusion.errors import UserError


class ProcessedSource(Source):
    """A raw source, cropped and resized as `config` says, with 1 or 3 channels.

    A low-res image is made of the crop too if there is a `low_res_resolution`. `say` is told
    about the first image of each kind that was converted to 8-bit RGB or grey, and about the
    first that was enlarged; `converted` counts them by kind, of which "enlarged" is one.
    """

    def __init__(
        self,
        raw: RawSource,
        config: DataConfig,
        *,
        channels: int,
        low_res_resolution: int | None = None,
        say: Callable[[str], None] | None = None,
    ):
        size = config.resolution
        super().__init__(config, len(raw), (size, size, channels), low_res_resolution)
        self.raw, self._config, self._say = raw, config, say
        self.class_names, self.class_counts = raw.class_names, raw.class_counts
        self.identity, self.times = raw.identity, raw.times
        self.converted: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.raw)

    def describe(self, index: int) -> str:
        return self.raw.describe(index)

    def content_sample(self) -> str:
        return self.raw.content_sample()

    def read(self, index: int) -> Sized:
        return self.processed(self.raw.read(index), index)

    def processed(self, example: RawExample, index: int) -> Sized:
        """Processes a record that has been read already, as `read` does."""
        image, label = example
        self.check_label(label, index)
        pixels = self.decoded(image, index)
        height, width = pixels.shape[:2]
        if min(height, width) < self.image_shape[0]:
            self._note(
                "enlarged",
                f"enlarged: {self.describe(index)} ({width} x {height} pixels) to"
                f" {self.image_shape[0]} px; so are others that are smaller",
            )
        return self.sized(pixels, label)

    def check_label(self, label: int, index: int) -> None:
        """Raises UserError for a label that is none of the classes."""
        if self.class_names and not 0 <= label < len(self.class_names):
            raise UserError(
                f"{self.describe(index)}: label {label} is out of range, expected 0 to"
                f" {len(self.class_names) - 1}; take another config.data.train_split or"
                " eval_split, or --config.stage.num_classes=0 for a model without classes"
            )

    def _note(self, kind: str, line: str) -> None:
        self.converted[kind] += 1
        if self.converted[kind] == 1 and self._say is not None:
            self._say(line)

    def decoded(self, image: bytes | np.ndarray, index: int) -> np.ndarray:
        """The pixels of an image: uint8 [H, W, C] of any size."""
        if isinstance(image, np.ndarray):
            return image
        channels = self.image_shape[2]
        pixels, note = decode_image(
            image, channels=channels, max_pixels=self._config.max_pixels or MAX_PIXELS
        )
        if note is not None:
            self._note(
                note,
                f"converted: {self.describe(index)} ({note}) to 8-bit"
                f" {'grey' if channels == 1 else 'RGB'}; so are others like it",
            )
        return pixels

    def sized(self, pixels: np.ndarray, label: int) -> Sized:
        """Crops pixels, and resizes the crop to every size that is wanted."""
        crop, method = CROPS[self._config.crop](pixels), self._config.resize
        image = resize_uint8(crop, self.image_shape[0], method)
        record: Sized = {"image": image, "label": np.int32(label)}
        if self.low_res_shape is not None:
            record["low_res"] = resize_uint8(crop, self.low_res_shape[0], method)
        return record
