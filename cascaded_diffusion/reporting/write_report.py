"""The page of a run, or of all the runs of a cascade."""

from __future__ import annotations

import datetime
import pathlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.reporting.page import (
    Section,
    key_values,
    page,
    paragraph,
    picture_file,
    table,
)
from cascaded_diffusion.reporting.run_report import run_sections
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder

_PACKAGES = ("cascaded_diffusion", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_report(output: pathlib.Path, root: pathlib.Path, runs: Sequence[RunFolder]) -> None:
    """Writes the page of `runs`, which `runs_in(root)` found, to a file."""
    sections = [_about(), *_cascade_sections(CascadeFolder(root))]
    for run in runs:
        sections += run_sections(run)
    title = f"{root.resolve().name}: {', '.join(r.read_config().stage.name for r in runs)}"
    # Names that are not UTF-8 are shown with escapes.
    write_whole(output, page(title, sections).encode(errors="backslashreplace"))


def runs_in(root: pathlib.Path) -> list[RunFolder]:
    """The run in a folder, or those in its folders, in order of resolution.

    Raises:
      UserError: there is none.
    """
    if RunFolder(root).exists():
        return [RunFolder(root)]
    children = sorted(root.iterdir()) if root.is_dir() else []
    folders = [RunFolder(p) for p in children if p.is_dir() and RunFolder(p).exists()]
    if not folders:
        raise UserError(
            f"--workdir={root}: no run there, nor in a folder in it; expected a folder that"
            " `python -m cascaded_diffusion.main --workdir=...` has written"
        )
    return sorted(folders, key=lambda f: (f.read_config().stage.resolution, f.path.name))


def _about() -> Section:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {"written": now, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return Section("About this page", [key_values(versions)])


def _cascade_sections(runs: CascadeFolder) -> list[Section]:
    """What a folder of runs has besides the runs: samples, sweeps, the chosen cascade."""
    sections = []
    picture = runs.path / "samples" / "samples.png"
    if picture.exists():
        parts = [picture_file(picture, "Real images, their enlargement, and the cascade's samples")]
        sections.append(Section("Samples of the cascade", parts))
    if runs.cascade_path.exists():
        parts = [key_values(runs.read_cascade(), caption="cascade.json, as a sweep wrote it")]
        sections.append(Section("The cascade", parts))
    for path in sorted(runs.sweep.glob("*.jsonl")):
        records = read_lines(path)
        plot = path.with_suffix(".png")
        parts = [picture_file(plot, f"Sweep of {path.stem}")] if plot.exists() else []
        columns = [
            key
            for key in dict.fromkeys(key for r in records for key in r)
            if key not in ("stages", "samplers", "reference", "features")
        ]
        rows = [
            [str(r[c]) if isinstance(r.get(c), list) else r.get(c) for c in columns]
            for r in records
        ]
        parts.append(table(columns, rows) if rows else paragraph("No setting was scored yet."))
        sections.append(Section(f"Sweep of {path.stem}", parts))
    return sections
