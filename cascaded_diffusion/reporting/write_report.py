"""The page of a run, or of all the runs of a cascade."""

import datetime
import itertools
import pathlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from xml.etree.ElementTree import Element

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.reporting.page import element, key_values, page, picture_file, table
from cascaded_diffusion.reporting.run_report import run_parts
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder

_PACKAGES = ("cascaded_diffusion", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_report(output: pathlib.Path, root: pathlib.Path, runs: Sequence[RunFolder]) -> None:
    """Writes the page of `runs`, which `runs_in(root)` found, to a file."""
    parts = [*_about(), *_cascade_parts(CascadeFolder(root))]
    for run in runs:
        parts += run_parts(run)
    title = f"{root.resolve().name}: {', '.join(r.read_config().stage.name for r in runs)}"
    # Names that are not UTF-8 are shown with escapes.
    write_whole(output, page(title, parts).encode(errors="backslashreplace"))


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


def _about() -> list[Element]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {"written": now, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return [element("h2", "About this page"), key_values(versions)]


def _cascade_parts(runs: CascadeFolder) -> list[Element]:
    """What a folder of runs has besides the runs: samples, sweeps, the chosen cascade."""
    parts = []
    picture = runs.path / "samples" / "samples.png"
    if picture.exists():
        caption = "Real images, their enlargement, and the cascade's samples"
        parts += [element("h2", "Samples of the cascade"), picture_file(picture, caption)]
    if runs.cascade_path.exists():
        caption = "cascade.json, as a sweep wrote it"
        parts += [element("h2", "The cascade"), key_values(runs.read_cascade(), caption=caption)]
    for path in sorted(runs.sweep.glob("*.jsonl")):
        title = f"Sweep of {path.stem}"
        parts.append(element("h2", title))
        if (plot := path.with_suffix(".png")).exists():
            parts.append(picture_file(plot, title))
        records = read_lines(path)
        hidden = ("stages", "samplers", "reference", "features")
        columns = [key for key in dict.fromkeys(itertools.chain(*records)) if key not in hidden]
        rows = [[record.get(column) for column in columns] for record in records]
        parts.append(table(columns, rows) if rows else element("p", "No setting was scored yet."))
    return parts
