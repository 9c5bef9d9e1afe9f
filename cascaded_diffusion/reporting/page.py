"""Building blocks of a self-contained HTML page: nothing fetched, all text escaped.

Its one script shows the picture that a slider points at. Without it, all pictures are shown.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from cascaded_diffusion.config.convert import flattened
from cascaded_diffusion.files.bucket import AnyPath

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
.pixels img { image-rendering: pixelated; width: 100%; } .slider input { width: 20rem; }
.as-they-are { overflow-x: auto; }
.as-they-are img { image-rendering: pixelated; max-width: none; }
nav ul { columns: 2; } @media print { nav { display: none; } h2 { break-before: page; } }
"""


_SCRIPT = """
for (const slider of document.querySelectorAll(".slider")) {
  const figures = slider.querySelectorAll("figure"), input = document.createElement("input");
  Object.assign(input, {type: "range", min: 0, max: figures.length - 1, value: 0});
  input.setAttribute("aria-label", slider.dataset.label);
  input.oninput = () => figures.forEach((f, i) => { f.hidden = i != input.value; });
  slider.prepend(input);
  input.oninput();
}
"""


def element(tag: str, *children: Element | str, **attributes: str) -> Element:
    """An HTML element. At most the first child is text."""
    node = Element(tag, attributes)
    for child in children:
        if isinstance(child, str):
            node.text = child
        else:
            node.append(child)
    return node


def quiet(text: str) -> Element:
    """A paragraph about what is not there."""
    return element("p", text, **{"class": "quiet"})


def _cell(value: object) -> Element:
    """A cell of a table: numbers are shortened and set to the right, None is a dash."""
    if isinstance(value, float):
        text = f"{value:.6g}" if math.isfinite(value) else str(value)
    else:
        text = "–" if value is None else str(value)  # noqa: RUF001
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return element("td", text, **({"class": "number"} if number else {}))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = ""
) -> Element:
    """A table of text and numbers."""
    return element(
        "table",
        *([element("caption", caption)] if caption else []),
        element("thead", element("tr", *(element("th", name) for name in columns))),
        element("tbody", *(element("tr", *map(_cell, row)) for row in rows)),
    )


def key_values(values: Mapping[str, object], *, caption: str = "") -> Element:
    """A table of nested values, one row each, names joined by dots."""
    rows = [
        (name, [round(x, 6) if isinstance(x, float) else x for x in value])
        if isinstance(value, list)
        else (name, value)
        for name, value in flattened(values).items()
    ]
    return table(("key", "value"), rows, caption=caption)


def picture(data: bytes, caption: str) -> Element:
    """An embedded PNG."""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = element("img", alt=caption, src=source)
    return element("figure", image, element("figcaption", caption))


def picture_file(path: AnyPath, caption: str) -> Element:
    """An embedded PNG file, or a sentence if there is none or it is too large."""
    if not path.is_file():
        return quiet(f"{caption}: not there yet ({path.name}).")
    if path.stat().st_size > _MAX_PICTURE_BYTES:
        return quiet(f"{caption}: too large for this page, see {path}.")
    return picture(path.read_bytes(), caption)


def samples_file(path: AnyPath, caption: str) -> Element:
    """An embedded PNG file whose pixels are shown as they are; a wide one is scrolled."""
    figure = picture_file(path, caption)
    return element("div", figure, **{"class": "as-they-are"})


def slider(label: str, files: Sequence[tuple[str, AnyPath]]) -> Element:
    """Pictures, by their captions, of which a slider called `label` shows one at a time.

    They are shown with their pixels as they are, not smoothed.
    """
    figures = [picture_file(path, caption) for caption, path in files]
    kind = "slider pixels" if len(figures) > 1 else "pixels"
    return element("div", *figures, **{"class": kind, "data-label": label})


def page(title: str, parts: Sequence[Element]) -> str:
    """The whole page, with a table of contents of its `h2` headings."""
    contents = element("ul")
    for i, heading in enumerate(part for part in parts if part.tag == "h2"):
        heading.set("id", f"s{i}")
        contents.append(element("li", element("a", heading.text or "", href=f"#s{i}")))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", _STYLE),
    )
    body = element("body", element("h1", title), element("nav", contents), *parts)
    if any("slider" in part.get("class", "") for part in parts):
        body.append(element("script", _SCRIPT))
    whole = element("html", head, body, lang="en")
    html = ElementTree.tostring(whole, encoding="unicode", method="html")
    return f"<!doctype html>\n{html}\n"
