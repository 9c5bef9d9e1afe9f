"""The flags of `import_weights` and `export_weights`, and what they ask for."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from cascaded_diffusion.commands.config_flags import (
    config_values,
    define_config,
    load_config_file,
    parse,
    shipped_configs,
)
from cascaded_diffusion.commands.flag_checks import check_paths, require
from cascaded_diffusion.commands.overrides import with_overrides
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.files.paths import check_local_path
from cascaded_diffusion.interchange.diffusers_folder import config_changes
from cascaded_diffusion.interchange.published import PUBLISHED, Published
from cascaded_diffusion.library.configs import with_values
from cascaded_diffusion.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from cascaded_diffusion.interchange.names import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What `import_weights` is asked for."""

    path: pathlib.Path
    source: str
    config: RunConfig
    folder: RunFolder
    published: Published | None
    qkv_by_head: bool
    cos_first: bool


def define_source(fv: flags.FlagValues) -> None:
    """Adds the flags that say how weights are named and laid out."""
    text = "the code base of the weights"
    flags.DEFINE_enum("source", None, sorted(PUBLISHED), text, flag_values=fv)
    text = "the order of attention's outputs: legacy (by head) or new"
    flags.DEFINE_enum("qkv_order", None, ["legacy", "new"], text, flag_values=fv)


def family_of(source: str, *, qkv_by_head: bool, cos_first: bool = True) -> Family:
    """A code base's names and layouts."""
    from cascaded_diffusion.interchange.names import DIFFUSERS, GUIDED_DIFFUSION

    if source == "diffusers":
        return dataclasses.replace(DIFFUSERS, cos_first=cos_first)
    return dataclasses.replace(GUIDED_DIFFUSION, name=source, qkv_by_head=qkv_by_head)


def read_import(argv: Sequence[str], usage: str) -> ImportRequest:
    """What the command line asks for. Raises UserError for bad input."""
    fv = flags.FlagValues()
    define_config(fv, argv, "the config of the weights' stage, instead of --model")
    define_source(fv)
    flags.DEFINE_string("model", None, "a published network", flag_values=fv)
    flags.DEFINE_string("workdir", None, "the folder of the run to write", flag_values=fv)
    given = parse(fv, argv, usage, "source", "workdir", positional=1)
    if not given:
        raise UserError("FILE is missing: the weights, as 64x64_diffusion.pt")
    check_local_path(fv.workdir, "--workdir")
    path = check_local_path(given[0], "FILE")
    if not path.exists():
        raise UserError(f"FILE={path}: no such file; expected the weights of a U-Net")
    published, cos_first = None, True
    if fv.model is not None:
        published = _published(fv)
    if published is not None and fv.config is None:
        values = with_overrides(
            load_config_file(shipped_configs(published.config), published.config), argv
        )
    else:
        require(fv, "config")
        values = config_values(fv, argv)
    if fv.source == "diffusers":
        if not path.is_dir():
            raise UserError(f"FILE={path}: expected a folder, with config.json and the weights")
        changes, cos_first = config_changes(path, "FILE")
        values = with_overrides(with_values(values, changes), argv)
    by_head = published.qkv_by_head if published is not None else True
    if fv.qkv_order is not None:
        by_head = fv.qkv_order == "legacy"
    return ImportRequest(
        path=path,
        source=fv.source,
        config=run_config_from(values),
        folder=RunFolder(fv.workdir),
        published=published,
        qkv_by_head=by_head,
        cos_first=cos_first,
    )


def _published(fv: flags.FlagValues) -> Published:
    models = PUBLISHED[fv.source]
    if fv.model not in models:
        known = ", ".join(models) or "none: give --config"
        raise UserError(f"--model={fv.model}: of --source={fv.source} there is {known}")
    return models[fv.model]


def run_import(request: ImportRequest) -> None:
    """Imports, and prints what was imported."""
    from cascaded_diffusion.interchange.importing import import_weights

    family = family_of(request.source, qkv_by_head=request.qkv_by_head, cos_first=request.cos_first)
    about = import_weights(
        request.path, request.config, family, request.folder, published=request.published
    )
    print(
        f"{request.config.stage.name}: {about['parameters']:,} parameters of {about['file']}"
        f" ({', '.join(about['dtypes'])}) are step 0 of {request.folder.path}"
    )
    if "sha256" in about:
        print(f"SHA-256 {about['sha256']}{_compared(request.published, about)}")


def _compared(published: Published | None, about: Record) -> str:
    if published is None:
        return ""
    if published.sha256 is None:
        return f", which cannot be compared: that of {published.url} is not known here"
    if about["as_published"]:
        return f", that of {published.url}"
    return f"; that of {published.url} is {published.sha256}: these are other weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What `export_weights` is asked for."""

    folder: RunFolder
    source: str
    qkv_by_head: bool
    output: pathlib.Path
    step: int | None


def read_export(argv: Sequence[str], usage: str) -> ExportRequest:
    """What the command line asks for. Raises UserError for bad input."""
    fv = flags.FlagValues()
    define_source(fv)
    flags.DEFINE_string("workdir", None, "folder of the stage's run", flag_values=fv)
    flags.DEFINE_string("output", None, "the file or folder to write", flag_values=fv)
    text = "the checkpoint, instead of the chosen one"
    flags.DEFINE_integer("step", None, text, flag_values=fv)
    parse(fv, argv, usage, "source", "workdir", "output")
    check_paths(fv, "workdir")
    output = check_local_path(fv.output, "--output")
    return ExportRequest(
        folder=RunFolder(fv.workdir),
        source=fv.source,
        qkv_by_head=fv.qkv_order != "new",
        output=output,
        step=fv.step,
    )


def run_export(request: ExportRequest) -> None:
    """Exports, and prints what was written."""
    from cascaded_diffusion.interchange.exporting import export_weights

    family = family_of(request.source, qkv_by_head=request.qkv_by_head)
    about = export_weights(request.folder, family, request.output, step=request.step)
    print(
        f"{about['stage']}: {about['tensors']} tensors of step {about['step']}, EMA"
        f" {about['ema_decay']}, are in {request.output}; time steps: {about['timesteps']}"
    )
