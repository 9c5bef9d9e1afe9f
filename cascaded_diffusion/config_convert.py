"""The one strict way from plain values into a config dataclass.

Every problem is a `UserError` of one line that names the key, its value and what
is allowed. No device is touched here, and nothing is imported from JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cascaded_diffusion.errors import UserError

T = TypeVar("T")


def fail(key: str, value: Any, expected: str) -> typing.NoReturn:
    """Raises the UserError of a config key with a value that cannot be."""
    raise UserError(f"config.{key} = {value!r}: expected {expected}")


def _describe(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {_describe(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return f"a section with the keys of {hint.__name__}"
    return {int: "an integer", float: "a number", bool: "True or False", str: "a string"}[hint]


def _may_be_none(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _convert_value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, or UserError. Nothing is silently rounded or cast."""
    if dataclasses.is_dataclass(hint):
        return convert(hint, value, f"{key}.")
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (inner,) = (h for h in typing.get_args(hint) if h is not type(None))
        try:
            return _convert_value(inner, value, key)
        except UserError:
            if dataclasses.is_dataclass(inner):
                raise
    elif typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, (tuple, list)):
            return tuple(_convert_value(inner, v, f"{key}[{i}]") for i, v in enumerate(value))
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    fail(key, value, _describe(hint))


def _check_bounds(value: Any, metadata: Mapping[str, Any], key: str) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_bounds(item, metadata, f"{key}[{i}]")
        return
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        fail(key, value, "a finite number")
    if "choices" in metadata and value not in metadata["choices"]:
        close = difflib.get_close_matches(str(value), metadata["choices"], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        fail(key, value, f"one of {', '.join(map(repr, metadata['choices']))}{hint}")
    if "maximum" in metadata and not metadata["minimum"] <= value <= metadata["maximum"]:
        fail(key, value, f"a value from {metadata['minimum']} to {metadata['maximum']}")
    if "minimum" in metadata and not value >= metadata["minimum"]:
        fail(key, value, f"a value of at least {metadata['minimum']}")
    if "above" in metadata and not value > metadata["above"]:
        fail(key, value, f"a value above {metadata['above']}")


def convert(cls: type[T], values: Any, prefix: str = "") -> T:
    """`values` (nested mappings) as the config dataclass `cls`; UserError for what is wrong."""
    if not isinstance(values, Mapping):
        fail(prefix.rstrip("."), values, f"a section with the keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"config.{prefix}{key} is not a config key{nearest_key(key, fields)}")
    converted = {}
    for name, field in fields.items():
        key = prefix + name
        if name not in values and not _may_be_none(hints[name]):
            raise UserError(f"config.{key} is missing")
        converted[name] = _convert_value(hints[name], values.get(name), key)
        _check_bounds(converted[name], field.metadata, key)
    return cls(**converted)


def nearest_key(key: str, known: typing.Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the list of known keys where nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
