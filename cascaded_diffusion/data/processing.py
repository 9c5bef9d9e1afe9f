"""Images of a raw source at a stage's sizes: decoded, cropped and resized as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from cascaded_diffusion.config.schema import MAX_PIXELS, DataConfig
from cascaded_diffusion.data.decode import decode_image
from cascaded_diffusion.data.records import RawExample, RawSource, Sized
from cascaded_diffusion.data.transforms import CROPS, resize_uint8
from cascaded_diffusion.errors import UserError


class ProcessingReader:
    """A `Reader` of a raw source.

    Args:
      raw: the data set.
      config: how to crop and resize.
      channels: the number of channels of the images, 1 or 3.
      low_res_resolution: if given, a low-res image is made from the crop too.
      say: told about the first image of each kind that was converted to 8-bit RGB or grey, and
        about the first that was enlarged.

    Attributes:
      converted: the number of converted images by kind; "enlarged" is one.
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
        self.raw, self._config, self._channels, self._say = raw, config, channels, say
        sizes = [config.resolution] + ([low_res_resolution] if low_res_resolution else [])
        self.image_shape = (sizes[0], sizes[0], channels)
        self.low_res_shape = (sizes[1], sizes[1], channels) if low_res_resolution else None
        self.class_names, self.identity, self.times = raw.class_names, raw.identity, raw.times
        self.describe, self.content_sample = raw.describe, raw.content_sample
        self.class_counts = raw.class_counts
        self.converted: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.raw)

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
        pixels, note = decode_image(
            image, channels=self._channels, max_pixels=self._config.max_pixels or MAX_PIXELS
        )
        if note is not None:
            self._note(
                note,
                f"converted: {self.describe(index)} ({note}) to 8-bit"
                f" {'grey' if self._channels == 1 else 'RGB'}; so are others like it",
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
