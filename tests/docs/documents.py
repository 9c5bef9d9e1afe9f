"""The README and the pages of `docs`, taken apart: anchors, inline code, commands."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess

from tests.tiny import ROOT

_FENCED = re.compile(
    r"(?:^<!-- needs: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_INLINE = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(VARIANT=|python |pip |tensorboard |\./launch/)")
# Between arguments, commands and snippets in the record.
_ARGUMENT, _END, _SNIPPET = "\x1f", "\x1e", "\x1d"


def script(name):
    """A script of `docs`, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = script("build").pages()


def anchors(page):
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def inline_code(page):
    return _INLINE.findall(_FENCED.sub("", page.read_text()))


@dataclasses.dataclass
class Snippet:
    """A block of shell commands, or a command in a sentence. `needs`: what a marked block needs."""

    text: str
    needs: str = ""


def snippets(page):
    found, last, text = [], 0, page.read_text()
    for block in _FENCED.finditer(text):
        needs, language, code = block.groups(default="")
        found += _inline_snippets(text[last : block.start()])
        if language == "bash":
            found.append(Snippet(code, needs))
        else:
            wrong = [line for line in code.splitlines() if _COMMAND.match(line)]
            assert not wrong, f"{page}: commands belong into a block of bash: {wrong}"
        last = block.end()
    return found + _inline_snippets(text[last:])


def _inline_snippets(text):
    return [Snippet(code) for code in _INLINE.findall(text) if _COMMAND.match(code)]


def commands(page, folder):
    """(snippet, argv) of each command on a page.

    Bash runs the page's snippets one after the other, without any program: it writes down what it
    would have called, with variables filled in and loops gone through.
    """
    found, record = snippets(page), folder / "here/record"
    (folder / "here").mkdir()
    write_down = f"printf '%s\\x{ord(_ARGUMENT):x}' \"$@\" >>{record}"
    write_down += f"; printf '\\x{ord(_END):x}' >>{record}"
    stub = folder / "stub"
    stub.write_text(f'#!{shutil.which("bash")}\nset -- "$0" "$@"\n{write_down}\n')
    stub.chmod(0o755)
    for path in (*(ROOT / "launch").glob("*.sh"), *(ROOT / f".venv/bin/{p}" for p in ("pip",))):
        _link(folder / "here" / path.relative_to(ROOT), stub)
    _link(folder / "here/.venv/bin/python", stub)
    _link(folder / "venv/bin/python", stub)
    lines = ["set -eu", f"command_not_found_handle() {{ {write_down}; }}"]
    for snippet in found:
        lines += [f"printf '\\x{ord(_SNIPPET):x}' >>{record}", snippet.text]
    result = subprocess.run(
        [shutil.which("bash"), "-c", "\n".join(lines)],
        cwd=folder / "here",
        env={"PATH": str(folder / "nothing")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, (page, result.stderr)
    parts = record.read_text().split(_SNIPPET)[1:] if found else []
    for snippet, part in zip(found, parts, strict=True):
        for command in part.split(_END)[:-1]:
            yield snippet, command.split(_ARGUMENT)[:-1]


def _link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
