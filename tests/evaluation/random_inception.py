"""Weights for FID's Inception that can be made anywhere: numpy, a seed, and nothing else."""

import numpy as np


def random_checkpoint(tensors, seed=0):
    """Arrays for `checkpoint_tensors()`: name -> (dtype, shape).

    He's scale for kernels and batch statistics near those of a standard normal input keep
    the activations of every layer near 1.
    """
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, shape) in tensors.items():
        part = name.rsplit(".", 1)[1]
        if name.startswith("fc."):
            array = rng.normal(0, 0.02, shape)
        elif name.endswith("conv.weight"):
            array = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif part == "running_var":
            array = rng.uniform(0.5, 1.5, shape)
        elif part in ("running_mean", "bias"):
            array = rng.normal(0, 0.1, shape)
        elif part == "weight":
            array = rng.uniform(0.8, 1.2, shape)
        else:
            array = np.zeros(shape)
        arrays[name] = array.astype(dtype)
    return arrays


def fixture_images():
    """Two seeded images of each of three sizes: noise over a gradient, uint8 RGB."""
    rng = np.random.default_rng(7)
    images = {}
    for size in (32, 64, 320):
        ramp = np.linspace(0, 255, size)[None, :, None, None] + np.zeros((2, size, size, 3))
        noise = rng.normal(0, 60, (2, size, size, 3))
        images[size] = np.clip(ramp + noise, 0, 255).astype(np.uint8)
    return images
