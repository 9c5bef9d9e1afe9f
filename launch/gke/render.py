"""Fills in a template: `render.py TEMPLATE` with the values as one JSON object on stdin.

`{{ name }}` becomes the value as JSON, which any YAML parser reads as exactly that
value; the line is left out where the value is null. Needs nothing but Python.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

_PLACE = re.compile(r"\{\{ ([a-z_]+) \}\}")
# YAML takes these for line breaks or refuses them, JSON does not; as escapes both read them alike.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def as_scalar(value: Any) -> str:
    """The value as JSON that is YAML too.

    Not ASCII alone: JSON escapes an emoji as two surrogates, which YAML does not put together.
    """
    text = json.dumps(value, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def render(template: str, values: dict[str, Any]) -> str:
    """The template with its places filled in; raises KeyError for names that do not fit."""
    unknown = set(values) - set(_PLACE.findall(template))
    if unknown:
        raise KeyError(f"not in the template: {', '.join(sorted(unknown))}")
    lines = []
    for line in template.splitlines():
        names = [] if line.lstrip().startswith("#") else _PLACE.findall(line)
        if any(values[name] is None for name in names):
            continue
        if names:
            # In one pass: what a value looks like is nobody's business.
            line = _PLACE.sub(lambda found: as_scalar(values[found[1]]), line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def exact(argument: str) -> str:
    """An argument as Kubernetes must be told it: it would replace $(NAME), and reads $$ as $."""
    return argument.replace("$", "$$")


def main() -> int:
    """Returns the exit code."""
    given = json.load(sys.stdin)
    given["command"] = [exact(argument) for argument in given["command"]]
    text = render(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"), given)
    try:
        sys.stdout.buffer.write(text.encode())
    except UnicodeEncodeError:
        print("error: a flag or argument is not UTF-8, expected text", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
