"""Overrides of a config on the command line: `--config.section.key=value`."""

import ast
from collections.abc import Sequence
from typing import Any

from cascaded_diffusion.config.convert import takes_text
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record


def with_overrides(values: Record, argv: Sequence[str]) -> Record:
    """Returns a copy of the nested `values` with the overrides of the command line applied.

    A number in a path indexes a tuple: `--config.cascade.samplers.0.num_steps=50`.
    """
    values = _unshared(values)
    for arg in overrides_in(argv):
        path, equals, text = arg.lstrip("-").partition("=")
        *sections, name = path.split(".")[1:]
        if not equals:
            raise UserError(f"{arg}: expected {arg}=value")
        node: Any = values
        for section in sections:
            node = _entered(node, section, arg)
        if not isinstance(node, dict):
            raise UserError(f"{arg}: {sections[-1]!r} has no keys by name; give it as a whole")
        root = CascadeConfig if "cascade" in values else RunConfig
        is_text, optional = takes_text(root, [*sections, name])
        if is_text:
            node[name] = None if optional and text == "None" else _unquoted(text)
        else:
            node[name] = _parse_value(text)
    return values


def _unshared(node: Any) -> Any:
    """A copy in which no two keys share a section, as they may in a config file."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_unshared(value) for value in node)
    return node


def _entered(node: Any, section: str, arg: str) -> Any:
    """Returns a section of `node`, made if missing. Tuples become lists, which can be changed."""
    if isinstance(node, list):
        if section not in map(str, range(len(node))):
            raise UserError(f"{arg}: expected a number below {len(node)} for {section!r}")
        child = node[int(section)]
    else:
        if isinstance(node.get(section), tuple):
            node[section] = list(node[section])
        child = node.setdefault(section, {})
    if not isinstance(child, (dict, list)):
        raise UserError(f"{arg}: config key {section!r} is not a section")
    return child


def _parse_value(text: str) -> object:
    """Reads a Python literal, `nan`, `inf`, `true` or `false`; other text stays a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        # Thousands of brackets raise the last two.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def _unquoted(text: str) -> str:
    """Removes the quotes of a Python string."""
    if text[:1] in ("'", '"'):
        value = _parse_value(text)
        return value if isinstance(value, str) else text
    return text


def overrides_in(argv: Sequence[str]) -> list[str]:
    """The arguments that override config keys."""
    return [arg for arg in argv[1:] if _is_override(arg)]


def refuse_overrides(argv: Sequence[str], why: str) -> None:
    """Raises UserError if a config key is overridden where that would mean nothing."""
    if overrides := overrides_in(argv):
        raise UserError(f"{overrides[0]}: {why}")


def _is_override(arg: str) -> bool:
    return arg.startswith(("--config.", "-config."))


def without_overrides(argv: Sequence[str]) -> list[str]:
    """Returns the arguments that do not override config keys."""
    return [argv[0], *(arg for arg in argv[1:] if not _is_override(arg))]
