"""Training a stage on images in memory."""

import os

import numpy as np

from cascaded_diffusion.commands.jax_setup import set_up_jax
from cascaded_diffusion.commands.train_stage import train_stage
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import write_npz_whole
from cascaded_diffusion.runtime.run_folder import RunFolder


def train(
    config: RunConfig,
    *,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    workdir: str | os.PathLike[str] | None = None,
) -> RunFolder:
    """Trains a stage on images, or resumes its run, and returns the run's folder.

    The images are kept in the folder as `images.npz`, so that evaluation and later calls find
    them; the last tenth, as their content decides, is held out for evaluation. JAX is set up as the
    binaries do.

    Args:
      config: of the stage's run. Its data section gives the crop and the flips alone.
      images: uint8 [n, h, w, C], at least as large as the stage's.
      labels: integers [n] from 0 to `config.stage.num_classes` - 1, if there are classes.
      workdir: the run's folder; by default RUN/<name of the stage>.

    Raises UserError if images or labels do not fit the config, or training fails.

        run = cd.train(cd.load_config("configs/mnist_base16.py"), images=x, labels=y)
    """
    set_up_jax()
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < 20:
        raise UserError(
            f"images are {images.dtype} {images.shape}: expected uint8 (n, height, width, channels)"
            " of at least 20 images"
        )
    if (labels is None) != (config.stage.num_classes == 0):
        given = "none are given" if labels is None else "they are given"
        raise UserError(
            f"labels: {given}, and config.stage.num_classes is {config.stage.num_classes}"
        )
    folder = RunFolder(workdir or f"RUN/{config.stage.name}")
    path = folder.path / "images.npz"
    arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": np.asarray(labels)})
    if not path.exists():
        write_npz_whole(path, arrays)
    elif any(not np.array_equal(x, read_arrays(path).get(k)) for k, x in arrays.items()):
        raise UserError(f"{path}: has other images; resume with the same, or name another workdir")
    values = to_dict(config)
    values["data"].update(
        name="npz",
        path=str(path.absolute()),
        prepared_dir=None,
        train_split="all[:90%]",
        eval_split="all[90%:]",
        resolution=min(images.shape[1:3]),
        crop="none" if images.shape[1] == images.shape[2] else "center",
        low_res="derived",
    )
    config = run_config_from(values)
    train_stage(config, folder)
    return folder
