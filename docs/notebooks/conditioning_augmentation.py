# %% [markdown]
# # Conditioning augmentation, seen
#
# A super-resolution stage is trained on shrunk real images, and used on generated ones, which have
# other flaws. The paper's remedy is to corrupt its input on purpose, with noise of a strength s
# that the network is told, and to choose s after training. This notebook shows what s does to the
# input, what the stage makes of it, and truncated beside non-truncated sampling. It needs the runs
# of the quickstart.

# %%
import os
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np

import cascaded_diffusion as cd
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.data.arrays import load_mnist
from cascaded_diffusion.runtime import pictures

RUNS = pathlib.Path(os.environ.get("NOTEBOOK_RUNS", "RUN_notebook"))
VARIANT = os.environ.get("NOTEBOOK_VARIANT", "")
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.45)


def show_rows(rows, title):
    """A row of images [n, H, W, C] for each level."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, len(rows)))
    figure.suptitle(title)
    for axis, (level, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(pictures.grid(images, columns=len(images)), cmap="gray")
        axis.set_ylabel(f"s = {level:g}", rotation=0, labelpad=24)
        axis.set_xticks([])
        axis.set_yticks([])
    plt.show()


cascade = cd.load_cascade(RUNS, f"configs/mnist_cascade32.py{VARIANT}")
labels = list(range(10))

# %% [markdown]
# ## What the stage is given
#
# The input z_s of equation (1) of `cascade/augment.py`: a small image and noise, of the strength
# that the low-resolution model's own forward process has at time s.

# %%
images, all_labels = load_mnist("test")
real = np.stack([images[all_labels == k][0] for k in labels])
low_res = real.reshape(10, 16, 2, 16, 2, 1).mean((2, 4)).round().astype(np.uint8)
top = cascade.stages[-1].stage
keys = jax.random.split(jax.random.key(0), len(labels))


def damaged(level):
    damage = top.augment.for_sampling(keys, low_res.shape, level)
    noise, logsnr = damage.noise, damage.logsnr
    x = float_from_uint8(low_res)
    if level == 0:
        return low_res
    alpha2 = (1 / (1 + np.exp(-np.asarray(logsnr))))[:, None, None, None]
    return np.asarray(uint8_from_float(np.sqrt(alpha2) * x + np.sqrt(1 - alpha2) * noise))


show_rows({level: damaged(level) for level in LEVELS}, "the low-res input")

# %% [markdown]
# ## What it makes of real images
#
# With s = 0 it must believe every pixel. With more noise it invents more of its own.

# %%
show_rows(
    {level: cascade.enlarge(low_res, labels, aug_levels=(level,)) for level in LEVELS},
    "enlargements of real images",
)

# %% [markdown]
# ## What it makes of generated images
#
# Here the flaws of the base model matter. Noise hides them, until it hides the digit as well.

# %%
show_rows(
    {level: cascade.sample(labels, aug_levels=(level,), truncated=False) for level in LEVELS},
    "samples of the cascade, non-truncated",
)

# %% [markdown]
# Truncated sampling stops the base model's chain at time s instead: it costs fewer evaluations, and
# the next stage gets the same kind of input.

# %%
show_rows(
    {level: cascade.sample(labels, aug_levels=(level,), truncated=True) for level in LEVELS},
    "samples of the cascade, truncated",
)
