"""Configs from files, with overrides."""

import copy
import functools
import os
import pathlib
from collections.abc import Mapping

from cascaded_diffusion.commands.config_flags import load_config_file
from cascaded_diffusion.config.run_checks import cascade_config_from, run_config_from
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record


def load_config(
    file: str | os.PathLike[str], overrides: Mapping[str, object] | None = None
) -> RunConfig | CascadeConfig:
    """The checked config of a file, `FILE.py` or `FILE.py:variant`.

    `overrides` are values by key, with dots between its names: `{"train.batch_size": 64}`. Raises
    UserError if the file is missing, cannot be loaded, or a value cannot be.

        config = cd.load_config("configs/mnist_base16.py", {"train.train_steps": 200})
    """
    path = pathlib.Path(file)
    values = with_values(load_config_file(path.parent, path.name), overrides or {})
    return cascade_config_from(values) if "cascade" in values else run_config_from(values)


def with_values(values: Record, changes: Mapping[str, object]) -> Record:
    """A copy of nested values with others by dotted keys. Raises UserError for a lost section."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, last = key.split(".")
        try:
            node = functools.reduce(dict.__getitem__, sections, values)
        except (KeyError, TypeError) as e:
            raise UserError(f"config.{key}: no section {'.'.join(sections)!r}") from e
        node[last] = value
    return values
