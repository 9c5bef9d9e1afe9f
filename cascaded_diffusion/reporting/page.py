"""Building blocks of a self-contained HTML page: no script, nothing fetched, all text escaped."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from cascaded_diffusion.config.convert import flattened

# A picture of more bytes is named, not embedded: the page is to be mailed.
_MAX_PICTURE_BYTES = 8_000_000

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #8888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 { margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums; }
td.number { text-align: right; } caption { text-align: left; color: var(--quiet); }
img { max-width: 100%; height: auto; background: #fff; } figure { margin: 1rem 0; }
figcaption, .quiet { color: var(--quiet); } code { font-size: .9em; }
nav ul { columns: 2; } @media print { nav { display: none; } h2 { break-before: page; } }
"""


@dataclasses.dataclass(frozen=True)
class Markup:
    """HTML that goes into the page as it is. Everything else is escaped."""

    text: str


def escaped(value: Any) -> str:
    """A value as text of the page: numbers are shortened, None is a dash."""
    if isinstance(value, Markup):
        return value.text
    if value is None:
        return "&ndash;"
    if isinstance(value, float):
        return html.escape(f"{value:.6g}" if math.isfinite(value) else str(value))
    return html.escape(str(value))


def paragraph(text: Any, *, quiet: bool = False) -> Markup:
    """One paragraph."""
    kind = ' class="quiet"' if quiet else ""
    return Markup(f"<p{kind}>{escaped(text)}</p>")


def code(text: str) -> Markup:
    """A command or a name."""
    return Markup(f"<code>{escaped(text)}</code>")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "") -> Markup:
    """A table; numbers are set to the right."""

    def cell(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        kind = ' class="number"' if number else ""
        return f"<td{kind}>{escaped(value)}</td>"

    head = "".join(f"<th>{escaped(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(cell(v) for v in row)}</tr>" for row in rows)
    above = f"<caption>{escaped(caption)}</caption>" if caption else ""
    return Markup(f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def key_values(values: Mapping[str, Any], *, caption: str = "") -> Markup:
    """A table of nested values, one row each, names joined by dots."""
    rows = [(name, _short(value)) for name, value in flattened(values).items()]
    return table(("key", "value"), rows, caption=caption)


def _short(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [round(x, 6) if isinstance(x, float) else x for x in value]


def picture(data: bytes, caption: str) -> Markup:
    """An embedded PNG."""
    source = base64.b64encode(data).decode()
    text = escaped(caption)
    return Markup(
        f'<figure><img alt="{text}" src="data:image/png;base64,{source}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def picture_file(path: pathlib.Path, caption: str) -> Markup:
    """An embedded PNG file, or a sentence if there is none or it is too large."""
    if not path.is_file():
        return paragraph(f"{caption}: not there yet ({path.name}).", quiet=True)
    if path.stat().st_size > _MAX_PICTURE_BYTES:
        return paragraph(f"{caption}: too large for this page, see {path}.", quiet=True)
    return picture(path.read_bytes(), caption)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
      title: its heading.
      parts: what is in it, in order.
      level: 2 or 3, of the heading.
    """

    title: str
    parts: Sequence[Markup]
    level: int = 2


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page, with a table of contents."""
    entries, body = [], []
    for i, section in enumerate(sections):
        if section.level == 2:
            entries.append(f'<li><a href="#s{i}">{escaped(section.title)}</a></li>')
        heading = f"h{section.level}"
        body.append(f'<{heading} id="s{i}">{escaped(section.title)}</{heading}>')
        body += [part.text for part in section.parts]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escaped(title)}</h1><nav><ul>{''.join(entries)}</ul></nav>"
        + "\n".join(body)
        + "</body></html>\n"
    )
