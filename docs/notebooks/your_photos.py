# %% [markdown]
# # Your own folder of photographs
#
# A folder with a sub-folder for each class becomes a data set. This notebook draws such a folder,
# so that it runs anywhere; put your own in its place. A data set of a few thousand photographs
# needs an hour on two cores, or minutes on a GPU, before its samples look like anything.

# %%
import os
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

import cascaded_diffusion as cd
from cascaded_diffusion.data.sources import examples, load_splits
from cascaded_diffusion.runtime import pictures

RUNS = pathlib.Path(os.environ.get("NOTEBOOK_RUNS", "RUN_notebook")) / "photos"
STEPS = int(os.environ.get("NOTEBOOK_STEPS", "2000"))
PHOTOS = RUNS / "images"  # your folder

# %%
if not PHOTOS.exists():
    rng = np.random.default_rng(0)
    for name, draw in (("circles", "ellipse"), ("squares", "rectangle")):
        (PHOTOS / name).mkdir(parents=True)
        for i in range(200):
            picture = Image.new("RGB", (72, 48), tuple(rng.integers(0, 100, 3).tolist()))
            x, y, size = rng.integers(12, 30), rng.integers(4, 14), rng.integers(16, 30)
            fill = tuple(rng.integers(120, 256, 3).tolist())
            box = [int(x), int(y), int(x + size), int(y + size)]
            getattr(ImageDraw.Draw(picture), draw)(box, fill=fill)
            picture.save(PHOTOS / name / f"{i:04d}.jpg")

# %% [markdown]
# The config of a small colour model is taken from a file, and what differs is set by key. Any part
# of the folder can be held out for evaluation.

# %%
config = cd.load_config(
    "configs/cifar10_base16.py:cpu",
    {
        "data.name": "folder",
        "data.path": str(PHOTOS),
        "data.prepared_dir": None,
        "data.train_split": "all[:90%]",
        "data.eval_split": "all[90%:]",
        "stage.num_classes": 2,
        "train.train_steps": STEPS,
        "train.warmup_steps": STEPS // 10,
        "train.sample_every_steps": None,
        "checkpoint.save_every_steps": STEPS,
        "eval.num_samples": 40,
        "eval.final_num_samples": 40,
    },
)
source = load_splits(config.data, [config.data.train_split], config.stage)[config.data.train_split]
print(len(source), "photographs of", source.class_names)
plt.imshow(
    pictures.grid(examples(source, range(0, len(source), len(source) // 16))["image"], columns=8)
)
plt.axis("off")
plt.show()

# %% [markdown]
# `train_stage` is what `python -m cascaded_diffusion.main` calls.

# %%
from cascaded_diffusion.commands.train_stage import train_stage  # noqa: E402

run = cd.RunFolder(RUNS / "base16")
train_stage(config, run)

# %%
cascade = cd.load_cascade(run.path)
samples = cascade.sample(labels=[0, 1] * 8, seed=0)
plt.imshow(pictures.grid(samples, columns=8))
plt.axis("off")
plt.show()
