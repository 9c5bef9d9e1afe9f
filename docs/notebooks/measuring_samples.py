# %% [markdown]
# # Measuring someone else's samples
#
# Samples of any program, as an `.npz` with `arr_0` uint8 [n, H, W, C] or as a folder of PNGs, are
# measured against real images. FID is a distance in the features of Inception, whose weights are
# downloaded once, or read from a file. Where neither is at hand, as here, the same distance in
# other features shows how it behaves; it must then not be called FID.

# %%
import os
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from cascaded_diffusion.data.arrays import load_mnist
from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, frechet_distance

RUNS = pathlib.Path(os.environ.get("NOTEBOOK_RUNS", "RUN_notebook"))
real, _ = load_mnist("train")
others, _ = load_mnist("test")

# %% [markdown]
# With Inception it is one call, which is also `python -m cascaded_diffusion.evaluate samples`:
#
#     import cascaded_diffusion as cd
#     from cascaded_diffusion.evaluation.samples.stored_images import open_images
#
#     images = open_images("samples.npz", flag="samples")
#     record = cd.measure_files(images, "reference.npz", resize="legacy")
#
# ## How a Fréchet distance behaves
#
# Features are any numbers of an image; here, averages over patches. Mean and covariance of each set
# are all that counts.


# %%
def features(images):
    """uint8 [n, 32, 32, 1] -> [n, 64]: averages over 4 x 4 pixels."""
    return images.reshape(len(images), 8, 4, 8, 4).mean((2, 4)).reshape(len(images), -1)


def distance(a, b):
    """The Fréchet distance of two sets of images."""
    return frechet_distance(*(FeatureStatistics.of(features(x)) for x in (a, b)))


rng = np.random.default_rng(0)
levels = (0, 20, 40, 80)
noisy = [
    distance(
        real,
        np.clip(others + rng.normal(0, s, others.shape), 0, 255).astype(np.uint8) if s else others,
    )
    for s in levels
]
plt.plot(levels, noisy, "o-")
plt.xlabel("noise added to held-out digits, grey levels")
plt.ylabel("Fréchet distance")
plt.show()

# %% [markdown]
# ## The number of samples matters
#
# Few samples are further away by chance alone: compare numbers of the same count only. This is why
# a record here names the count, and why papers say FID-50k.

# %%
counts = (100, 200, 500, 1000, 2000)
means = [np.mean([distance(real, rng.permutation(real)[:n]) for _ in range(3)]) for n in counts]
plt.plot(counts, means, "o-")
plt.xlabel("real images in the set")
plt.ylabel("distance to all 4,000 real images")
plt.show()
