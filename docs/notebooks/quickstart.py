# %% [markdown]
# # Quickstart: a cascade on digits
#
# Two diffusion models are trained on 4,000 digits: one makes 16 px images of a class, the other
# enlarges them to 32 px. It takes some five minutes on two CPU cores. Run it from the root of the
# repository, in an environment with `pip install -e '.[demo]'`.

# %%
import os
import pathlib

import matplotlib.pyplot as plt
import numpy as np

import cascaded_diffusion as cd
from cascaded_diffusion.data.arrays import load_mnist
from cascaded_diffusion.runtime import pictures

RUNS = pathlib.Path(os.environ.get("NOTEBOOK_RUNS", "RUN_notebook"))
VARIANT = os.environ.get("NOTEBOOK_VARIANT", "")  # ":smoke" trains for seconds, to no effect


def show(images, columns=10):
    """Shows uint8 images [n, H, W, C] in rows."""
    plt.figure(figsize=(columns, len(images) / columns))
    plt.imshow(pictures.grid(images, columns=columns), cmap="gray")
    plt.axis("off")
    plt.show()


# %% [markdown]
# The images are uint8 arrays [n, H, W, C] with labels from 0 on. Your own arrays work as well.

# %%
images, labels = load_mnist("train")
order = np.random.default_rng(0).permutation(len(images))
images, labels = images[order], labels[order]
show(images[:20])

# %% [markdown]
# A config file says everything about a stage. `train` resumes a run that is there already, so that
# this cell can be stopped and run again.

# %%
for name in ("base16", "sr32"):
    config = cd.load_config(f"configs/mnist_{name}.py{VARIANT}")
    cd.train(config, images=images, labels=labels, workdir=RUNS / name)

# %% [markdown]
# Both stages together are a cascade. An image is a function of the seed, its place and its label.

# %%
cascade = cd.load_cascade(RUNS, f"configs/mnist_cascade32.py{VARIANT}")
small, large = cascade.sample_stages(labels=list(range(10)), seed=1)
show(small)
show(large)

# %% [markdown]
# The second stage enlarges any 16 px image, for example these, which were shrunk by averaging.

# %%
given = images[:10].reshape(10, 16, 2, 16, 2, 1).mean((2, 4)).round().astype(np.uint8)
show(given)
show(cascade.enlarge(given, labels=labels[:10]))
