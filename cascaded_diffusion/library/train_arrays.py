"""Training a stage on images in memory."""

import os
import pathlib
from collections.abc import Collection, Mapping

import numpy as np

from cascaded_diffusion.commands.jax_setup import set_up_jax
from cascaded_diffusion.commands.train_stage import train_stage
from cascaded_diffusion.config.resume_checks import check_resume
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig, to_dict
from cascaded_diffusion.data.arrays import check_arrays
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
    allow_changed: Collection[str] = (),
) -> RunFolder:
    """Trains a stage on images, or resumes its run, and returns the run's folder.

    The images are kept in the folder as `images.npz`, so that evaluation and later calls find
    them; the last tenth, as their content decides, is held out for evaluation. JAX is set up as the
    binaries do.

    Args:
      config: of the stage's run. Its data section gives the crop and the flips alone.
      images: uint8 [n, h, w, C], at least as large as the stage's.
      labels: integers [n] from 0 to `config.stage.num_classes` - 1, if there are classes.
      workdir: the run's folder; by default RUN/<name of the stage>. A run of imported weights is
        trained further.
      allow_changed: config keys that may change what the run trains from here on.

    Raises UserError if images or labels do not fit the config, or training fails.

        run = cd.train(cd.load_config("configs/mnist_base16.py"), images=x, labels=y)
    """
    set_up_jax()
    if not isinstance(config, RunConfig):
        raise UserError(f"config is a {type(config).__name__}: expected a RunConfig, of a stage")
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
    arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": np.asarray(labels)})
    try:
        check_arrays(arrays, config.stage.num_classes)
    except ValueError as e:
        raise UserError(f"images, labels: {e}") from e
    if images.shape[3] != config.stage.channels:
        raise UserError(
            f"images have {images.shape[3]} channels: expected config.stage.channels ="
            f" {config.stage.channels}"
        )
    folder = RunFolder(workdir or f"RUN/{config.stage.name}")
    path = folder.path / "images.npz"
    imported = (folder.path / "imported.json").exists() and not folder.data_path.exists()
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
    allowed = [*allow_changed, *(["data"] if imported else [])]
    if folder.exists():
        if not path.exists() and not imported:
            raise UserError(
                f"workdir={folder.path}: a run that was trained on other data is there; name"
                " another folder"
            )
        check_resume(folder.read_config(), config, str(folder.path), allowed=allowed)
    if not path.exists() or not folder.exists():  # a refused call may have left images
        write_npz_whole(path, arrays)
    elif not _are_in(path, arrays):
        raise UserError(f"{path}: has other images; resume with the same, or name another workdir")
    train_stage(config, folder, allow_changed=allowed)
    return folder


def _are_in(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether a file has these arrays. Raises UserError if it cannot be read."""
    try:
        stored = read_arrays(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {e}; remove it, and it is written again") from e
    return all(np.array_equal(x, stored.get(k)) for k, x in arrays.items())
