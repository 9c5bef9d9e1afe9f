"""A TFDS data set of a few made-up JPEGs, prepared without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NUM_TRAIN, NUM_TEST = 12, 5


def photo(index: int) -> bytes:
    """A JPEG whose size and colours depend on the index."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    size = (40 + 3 * (index % 4), 34 + 2 * (index % 3))
    data = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(data, "JPEG", quality=92)
    return data.getvalue()


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["cat", "dog", "eel"]),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples(range(NUM_TRAIN)),
            "test": self._generate_examples(range(100, 100 + NUM_TEST)),
        }

    def _generate_examples(self, indices):
        for i in indices:
            yield i, {"image": io.BytesIO(photo(i)), "label": i % 3, "file_name": f"{i}.jpg"}


def prepare(data_dir, file_format="array_record"):
    """Prepares it below a folder, as TFDS does."""
    TinyPhotos(data_dir=str(data_dir), file_format=file_format).download_and_prepare()
