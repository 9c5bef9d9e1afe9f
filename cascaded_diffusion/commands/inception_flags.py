"""The flags that say where the weights of Inception are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

import cascaded_diffusion as library
from cascaded_diffusion.commands.flag_checks import check_paths
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import path_of

if TYPE_CHECKING:
    from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor


def define_inception(fv: flags.FlagValues) -> None:
    """Adds the flags."""
    where = "file of the FID Inception weights; default: the cached ones, else a download"
    other = "accept weights other than the public ones; the FID is then not comparable"
    flags.DEFINE_string("inception_weights", None, where, flag_values=fv)
    flags.DEFINE_bool("allow_other_inception_weights", False, other, flag_values=fv)


def check_inception(fv: flags.FlagValues) -> None:
    """Raises UserError if --inception_weights was given and no file is there."""
    check_paths(fv, "inception_weights")
    weights = fv.inception_weights
    if weights is not None and not path_of(weights).is_file():
        raise UserError(
            f"--inception_weights={weights}: no such file; without this flag the cached weights are"
            " used, or downloaded"
        )


def inception_loader(fv: flags.FlagValues) -> Callable[..., FeatureExtractor]:
    """A function of `resize` and `mesh` that loads Inception. Getting it imports JAX."""
    return functools.partial(
        library.load_inception,
        fv.inception_weights,
        allow_other_weights=fv.allow_other_inception_weights,
    )
