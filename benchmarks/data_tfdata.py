"""The tf.data side of `data.py`: needs an environment with TensorFlow, and nothing of ours."""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import data_cpu
import tensorflow as tf

SIZE, BATCH = 64, 64
LIBRARY = f"TensorFlow {tf.__version__}"


def pipeline(files: list[str], labels: list[int], dct: str) -> tf.data.Dataset:
    """Shuffled, decoded within the crop, shrunk by area, flipped, batched, read ahead."""
    decoder = {} if dct == "default" else {"dct_method": dct}

    def load(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        size = tf.minimum(shape[0], shape[1])
        window = tf.stack([(shape[0] - size) // 2, (shape[1] - size) // 2, size, size])
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3, **decoder)
        image = tf.image.resize(image, (SIZE, SIZE), "area")
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8), label

    dataset = tf.data.Dataset.from_tensor_slices((files, labels))
    dataset = dataset.shuffle(len(files), reshuffle_each_iteration=True).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def main() -> None:
    """Measures; prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=pathlib.Path)
    parser.add_argument("--secs", type=float)
    parser.add_argument("--dct")
    args = parser.parse_args()
    paths = sorted((args.photos / "train").rglob("*.jpg"))
    classes = sorted({path.parent.name for path in paths})
    labels = [classes.index(path.parent.name) for path in paths]
    batches = pipeline(list(map(str, paths)), labels, args.dct).as_numpy_iterator()
    for _ in range(11):
        next(batches)
    begun = data_cpu.seconds()
    start, images = time.monotonic(), 0
    while time.monotonic() - start < args.secs:
        images += len(next(batches)[0])
    rate, cpu = images / (time.monotonic() - start), data_cpu.seconds() - begun
    print(json.dumps({"images_per_sec": rate, "cpu_ms": 1000 * cpu / images, "library": LIBRARY}))


if __name__ == "__main__":
    main()
