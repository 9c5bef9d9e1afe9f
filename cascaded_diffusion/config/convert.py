"""The one strict conversion of plain values into a config dataclass.

Every problem is a `UserError` of one line that names the key, its value and what is allowed.
Nothing here imports JAX.
"""

import dataclasses
import difflib
import functools
import math
import operator
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cascaded_diffusion.errors import UserError

T = TypeVar("T")

_MAX_ITEMS = 16  # of a tuple
_MAX_TEXT = 4096  # bytes of a string: the longest path there is on Linux


def fail(key: str, value: object, expected: str) -> typing.NoReturn:
    """Raises the UserError that names a config key, its value and what is expected."""
    raise UserError(f"config.{key} = {_shown(value)}: expected {expected}")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # Python prints no integer of 5,000 digits
        return f"(an {type(value).__name__} too long to print)"
    return text if len(text) <= 200 else f"{text[:150]}...{text[-30:]}"


def fail_at(config: object, key: str, expected: str) -> typing.NoReturn:
    """Like `fail`, with the value that `config` has for `key`.

    `config` is the whole config or any section on the way to the key: the leading names of
    "stage.network.channels" that a section does not have are skipped.
    """
    path = key.split(".")
    while not hasattr(config, path[0]):
        del path[0]
    fail(key, functools.reduce(getattr, path, config), expected)


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """A type without its `| None`, and whether it had it."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return functools.reduce(operator.or_, inner), len(inner) < len(typing.get_args(hint))
    return hint, False


def _describe(hint: Any) -> str:
    hint, optional = _split_optional(hint)
    names = {int: "an integer", float: "a number", bool: "True or False", int | float: "a number"}
    if typing.get_origin(hint) is tuple:
        text = f"a tuple of {_describe(typing.get_args(hint)[0])}"
    elif dataclasses.is_dataclass(hint):
        text = f"a section with the keys of {hint.__name__}"
    else:
        text = names.get(hint, "a string")
    return f"{text} or None" if optional else text


def _convert_value(hint: Any, value: object, key: str, expected: str = "") -> Any:
    """`value` as the type `hint`, or UserError. Nothing is silently rounded or cast."""
    expected = expected or _describe(hint)
    hint, optional = _split_optional(hint)
    if optional and value is None:
        return None
    if dataclasses.is_dataclass(hint):
        return convert(hint, value, f"{key}.")
    if typing.get_origin(hint) is typing.Literal:
        text, choices = _convert_value(str, value, key, expected), typing.get_args(hint)
        if text not in choices:
            close = difflib.get_close_matches(text, choices, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            fail(key, text, f"one of {', '.join(map(repr, choices))}{meant}")
        return text
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, (tuple, list)):
            if len(value) > _MAX_ITEMS:
                fail(key, value, f"at most {_MAX_ITEMS} values")
            return tuple(_convert_value(inner, v, f"{key}[{i}]") for i, v in enumerate(value))
    elif hint == int | float and isinstance(value, int) and not isinstance(value, bool):
        return value  # an integer stays one
    elif hint in (float, int | float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:  # an integer above 1e308
                fail(key, value, "a finite number")
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is str:
            _check_text(key, value)
        return value
    fail(key, value, expected)


def _check_text(key: str, text: str) -> None:
    """Checks that the file system can take a text as a name."""
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        fail(key, text, "text that can be encoded in UTF-8")
    if "\0" in text or size > _MAX_TEXT:
        fail(key, text, f"text of at most {_MAX_TEXT} bytes, without NUL characters")


def _check_bounds(value: object, metadata: Mapping[str, float], key: str) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_bounds(item, metadata, f"{key}[{i}]")
        return
    if not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        fail(key, value, "a finite number")
    if "minimum" in metadata and not metadata["minimum"] <= value <= metadata["maximum"]:
        fail(key, value, f"a value from {metadata['minimum']} to {metadata['maximum']}")
    if "above" in metadata and not metadata["above"] < value <= metadata["maximum"]:
        fail(key, value, f"a value above {metadata['above']}, at most {metadata['maximum']}")


def convert(cls: type[T], values: object, prefix: str = "") -> T:
    """`values` (nested mappings) as the config dataclass `cls`; UserError for what is wrong."""
    if not isinstance(values, Mapping):
        fail(prefix.rstrip("."), values, f"a section with the keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            shown = _shown(key).strip("'\"")
            close = difflib.get_close_matches(shown, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"
            raise UserError(f"config.{prefix}{shown} is not a config key; {hint}")
    converted = {}
    for name, field in fields.items():
        key = prefix + name
        if name not in values and not _split_optional(hints[name])[1]:
            raise UserError(f"config.{key} is missing")
        converted[name] = _convert_value(hints[name], values.get(name), key)
        _check_bounds(converted[name], field.metadata, key)
    return cls(**converted)


def takes_text(cls: type, path: typing.Sequence[str]) -> tuple[bool, bool]:
    """Whether the key to which `path` leads from a config dataclass is text, and may be None.

    A number in the path is an index into a tuple. A path that leads to no key is not text.
    """
    hint: Any = cls
    for name in path:
        hint, _ = _split_optional(hint)
        if typing.get_origin(hint) is tuple and name.isdecimal():
            hint = typing.get_args(hint)[0]
        else:
            hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    hint, optional = _split_optional(hint)
    return hint is str or typing.get_origin(hint) is typing.Literal, optional


def flattened(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
