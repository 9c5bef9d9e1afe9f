"""Collectives of a compiled program, read off its text, to compare the formula with.

Bytes are counted as in `planning.collectives`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from cascaded_diffusion.planning.collectives import KINDS, Traffic

_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\((?P<rest>.*)"
)
_CALLED = re.compile(r"(?:body|to_apply|called_computations|branch_computations)=\{?%?([\w.\-]+)")
# The TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and slices of it.
_REDUCE_SCATTER_FUSION = re.compile(r" fusion\(.*calls=%?(all-reduce-scatter[\w.\-]*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LOOP = re.compile(r" while\(%?(?P<state>[\w.\-]+)\).*condition=%?(?P<condition>[\w.\-]+)")
_COMPARED = re.compile(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_COUNTER = re.compile(r" get-tuple-element\(.*\), index=(\d+)")
_CONSTANT = re.compile(r" constant\((-?\d+)\)")
_COPY = re.compile(r" copy\(%?([\w.\-]+)\)")


def in_program(hlo: str) -> dict[str, Traffic]:
    """The collectives of a compiled program, from its text; loops count as often as they run.

    Raises:
      ValueError: a loop with collectives does not say how often it runs, or a reduce-scatter
        among how many devices it is.
    """
    computations, entry = _computations(hlo)
    traffic = dict.fromkeys(KINDS, Traffic())
    for kind, size, times in _walk(computations, entry, 1):
        traffic[kind] = traffic[kind].plus(times, times * size)
    return traffic


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: int
) -> Iterator[tuple[str, int, int]]:
    lines = computations.get(name, ())
    for line in lines:
        found = _OPERATION.search(line)
        if found:
            if _group_size(found["rest"]) != 1:  # Else nothing is sent.
                yield found["kind"], _size(found), times
            continue
        fusion = _REDUCE_SCATTER_FUSION.search(line)
        if fusion:
            for _, size, within in _walk(computations, fusion[1], times):
                yield "reduce-scatter", size, within
            continue
        called = _CALLED.search(line)
        if not called or " fusion(" in line or " reduce(" in line:
            continue
        if " while(" not in line:
            yield from _walk(computations, called[1], times)
            continue
        inside = list(_walk(computations, called[1], 1))
        if not inside:
            continue
        trips = _trips(computations, lines, line)
        if trips is None:
            raise ValueError(f"a loop with collectives that does not say how often: {line[:120]}")
        for kind, size, within in inside:
            yield kind, size, times * trips * within


def _trips(computations: dict[str, list[str]], around: Sequence[str], line: str) -> int | None:
    """How often a loop runs: as it says, or as its counter, which rises by 1, tells."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    loop = _LOOP.search(line)
    condition = computations.get(loop["condition"], ()) if loop else ()
    compared = next(filter(None, map(_COMPARED.search, condition)), None)
    if compared is None:
        return None
    counter = _COUNTER.search(_defined(condition, compared[1]))
    state = re.search(r" tuple\((.*?)\)", _defined(around, loop["state"]))
    if counter is None or state is None:
        return None
    names = re.findall(r"%?([\w.\-]+)(?:,|$)", re.sub(r"/\*.*?\*/", "", state[1]))
    first = _integer(around, names[int(counter[1])])
    last = _integer(condition, compared[2])
    return None if first is None or last is None else max(0, last - first)


def _defined(lines: Sequence[str], name: str) -> str:
    """The line of a computation that defines `name`."""
    definition = re.compile(rf"\s*(?:ROOT )?%?{re.escape(name)} = ")
    return next(filter(definition.match, lines), "")


def _integer(lines: Sequence[str], name: str) -> int | None:
    line = _defined(lines, name)
    copied = _COPY.search(line)
    if copied:
        return _integer(lines, copied[1])
    constant = _CONSTANT.search(line)
    return int(constant[1]) if constant else None


def _size(found: re.Match[str]) -> int:
    """Bytes of the array that an all-gather makes, or that another collective takes."""
    kind, result = found["kind"], found["result"]
    if found["start"] and kind != "all-reduce":
        # The array taken, the array made, and perhaps what the device keeps of it.
        parts = _parts(result)
        return _bytes(parts[1 if kind == "all-gather" else 0])
    size = _bytes(result)
    if kind != "reduce-scatter":
        return size
    devices = _group_size(found["rest"])
    if devices is None:
        raise ValueError(
            f"a reduce-scatter that does not say among how many: {found['rest'][:120]}"
        )
    return size * devices


def _parts(result: str) -> list[str]:
    """The elements of a tuple's shape."""
    parts, depth = [""], 0
    for c in result.strip()[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _group_size(rest: str) -> int | None:
    """The number of devices of a collective; None if it does not say."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\].*?\{('[^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return None


def _bytes(shapes: str) -> int:
    size = 0
    for dtype, dims in _SHAPE.findall(shapes):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        size += math.ceil(bits * math.prod(int(d) for d in dims.split(",") if d) / 8)
    return size
