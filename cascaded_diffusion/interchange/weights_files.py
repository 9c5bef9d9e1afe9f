"""Files of weights: PyTorch's, safetensors', folders of diffusers. No code of theirs is run."""

import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.torch_file import map_tensors

# What a file begins with that was saved in place of weights.
_IMPOSTORS = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself by `git lfs pull`",
    b"<!doctype html": "a page of HTML, as servers send instead of a file; download it again",
    b"<html": "a page of HTML, as servers send instead of a file; download it again",
    b"<?xml": "an answer in XML, as servers send instead of a file; download it again",
}
# Names that only one kind of network has, the most telling first.
_SIGNS = {
    "model.diffusion_model.input_blocks": "a latent diffusion model (Stable Diffusion)",
    "first_stage_model.": "a latent diffusion model (Stable Diffusion)",
    "attn2.to_k": "a text-conditional U-Net of diffusers",
    "add_embedding.": "a text-conditional U-Net of diffusers",
    "unets.": "imagen-pytorch's cascade",
    "downs.": "a U-Net of denoising-diffusion-pytorch",
    "Mixed_5b": "Inception, which measures FID",
    "map_layer0": "a network of EDM",
    "adaLN_modulation": "a DiT, which is no U-Net",
    "middle_block.": "a U-Net of guided-diffusion or improved-diffusion",
    "mid_block.": "a U-Net of diffusers",
    "down_blocks.": "a U-Net of diffusers",
}
# Of those, what can be imported.
OWN_KINDS = ("a U-Net of guided-diffusion or improved-diffusion", "a U-Net of diffusers")
_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# How diffusers called the parts of an attention block until its version 0.15.
_FORMER_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_FORMER = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(_FORMER_PARTS)})\.")

# What the number is of which an exported network embeds sines and cosines, by the config's
# `stage.network.noise_input`.
TIMESTEPS = {
    "cosine_time": "1000 * atan(exp(-logsnr / 2)) / (pi / 2)",
    "noise_level": "1000 * sqrt(sigmoid(logsnr))",
    "step_index": "the step, from 0",
    "scaled_step_index": "1000 / T times the step, from 0",
}


def read_weights(path: pathlib.Path, flag: str) -> dict[str, np.ndarray]:
    """The tensors of a file, or of a folder of diffusers, by name; as views of the file.

    Raises UserError, which begins with `flag` and the path, if there are none.
    """
    if path.is_dir():
        folder = unet_folder(path, flag)
        path = next(folder / name for name in _DIFFUSERS_WEIGHTS if (folder / name).exists())
    if not path.is_file():
        raise UserError(f"{flag}={path}: no such file; expected the weights of a U-Net")
    with path.open("rb") as f:
        start = f.read(64).lstrip().lower()
    if not start:
        raise UserError(f"{flag}={path}: is empty; download it again")
    for sign, what in _IMPOSTORS.items():
        if start.startswith(sign):
            raise UserError(f"{flag}={path}: is {what}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return map_tensors(path)
    except ValueError as e:
        raise UserError(f"{flag}={path}: cannot be read: {e}") from e


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as e:
        raise ValueError(f"not a whole file of safetensors ({e})") from e


def told_timesteps(folder: pathlib.Path) -> str | None:
    """What our export says that a folder's network is told, one of TIMESTEPS; None of others'."""
    from safetensors import SafetensorError, safe_open

    path = folder / _DIFFUSERS_WEIGHTS[0]
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("timesteps")
    except (SafetensorError, OSError):
        return None  # there is none, or reading its tensors says what is wrong


def unet_folder(path: pathlib.Path, flag: str) -> pathlib.Path:
    """Where a folder of diffusers has its U-Net: itself, or its folder `unet`."""
    for folder in (path, path / "unet"):
        weights = any((folder / name).exists() for name in _DIFFUSERS_WEIGHTS)
        if weights and (folder / "config.json").exists():
            return folder
    raise UserError(
        f"{flag}={path}: has no config.json beside a {_DIFFUSERS_WEIGHTS[0]}, neither itself nor"
        " in unet/; expected a folder that diffusers' save_pretrained has written"
    )


def kind_of(names: Iterable[str]) -> str:
    """What kind of network has tensors of these names, in words."""
    names = list(names)
    if any("input_blocks." in n for n in names) and not any("output_blocks." in n for n in names):
        return "a classifier of guided-diffusion"
    for sign, what in _SIGNS.items():
        if any(sign in name for name in names):
            return what
    return f"of an unknown kind (its first tensor is {min(names)[:80]!r})" if names else "empty"


def with_usual_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without a wrapper's `module.`, and without diffusers' former names."""
    wrapped = bool(tensors) and all(name.startswith("module.") for name in tensors)
    return {
        _FORMER.sub(
            lambda m: f"{m[1]}.{_FORMER_PARTS[m[2]]}.",
            name.removeprefix("module.") if wrapped else name,
        ): x
        for name, x in tensors.items()
    }
