"""Builds the site of the documentation. Every warning is an error.

    python docs/build.py [--output=docs/site]

The pages link to each other, and to pictures, measurements and code elsewhere in the repository, as
they must on a code host. This script therefore copies the README, the pages, and every file that
they link to into a temporary folder with the same layout, adds a page for every room of the package
(mkdocstrings reads the docstrings without importing the code), and lets Zensical build the site.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cascaded_diffusion"
_LINK = re.compile(r"!?\[[^]\n]*\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_BINARIES = "binaries"


def pages() -> list[pathlib.Path]:
    """The README and all pages below `docs`."""
    docs = ROOT / "docs"
    found = (p for p in docs.rglob("*.md") if "site" not in p.relative_to(docs).parts)
    return [ROOT / "README.md", *sorted(found)]


def links(page: pathlib.Path) -> Iterator[tuple[pathlib.Path, str, str]]:
    """(file, anchor, link as written) of every link in a page that is not a URL."""
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor, link


def rooms() -> dict[str, list[str]]:
    """The public modules of every room; those of the package root come first."""
    found: dict[str, list[str]] = {_BINARIES: []}
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
        if not name.startswith("_"):
            room = folders[0] if folders else _BINARIES
            found.setdefault(room, []).append(".".join(["cascaded_diffusion", *folders, name]))
    return found


def prepare(folder: pathlib.Path) -> None:
    """Writes the sources of the site and its config, `mkdocs.yml`, to a folder."""
    source = folder / "source"
    for page in pages():
        for path in [page, *(path for path, _, _ in links(page))]:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    api = source / "docs/reference/api"
    api.mkdir()
    nav = "      - API: docs/reference/api.md\n"
    listed = nav + "      - Rooms:\n"
    for room, modules in rooms().items():
        text = "\n".join([f"# {room}\n", *(f"::: {name}\n" for name in modules)])
        (api / f"{room}.md").write_text(text)
        listed += f"          - {room}: docs/reference/api/{room}.md\n"
    config = (ROOT / "docs/mkdocs.yml").read_text()
    assert nav in config
    # It holds tags for Python objects, and so stays text.
    config = config.replace(nav, listed).replace("PACKAGE_PATH", json.dumps(str(ROOT)))
    (folder / "mkdocs.yml").write_text(f"{config}docs_dir: source\nsite_dir: site\n")


def build(output: pathlib.Path) -> int:
    """Builds the site in `output`, which is made anew. Returns the builder's exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(folder)
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        code = subprocess.run(command, cwd=folder, check=False).returncode
        if code == 0:
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(folder / "site", output)
            print(f"{output / 'index.html'}")
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs/site")
    sys.exit(build(parser.parse_args().output))
