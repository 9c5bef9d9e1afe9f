r"""What devices send each other in a training step: by formula, and read off a compiled program.

Bytes are those of the whole array that a collective is about, once per collective and
device group: of what an all-gather makes, of what an all-reduce or reduce-scatter takes.
A ring of n devices sends (n - 1) / n of them over each link for the first and last, twice
that for an all-reduce.

By the formula, with P the parameters that are split over `fsdp`, N all of them, p the
parts of a batch, and b bytes per number of the computation:

(1)  all-gather      p b |P| for the forward pass, and again for what is rematerialized
(2)  reduce-scatter  p b |P|  gradients of P, over `fsdp`
(3)  all-reduce      p b |N - P|  gradients of the rest; over `data`, a share 1 / fsdp of P's

Not counted is what feature maps that are split over `tensor` send.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """How many collectives of a kind there are in a step, and their bytes."""

    count: int = 0
    bytes: int = 0

    def plus(self, count: int, size: int) -> Traffic:
        return Traffic(self.count + count, self.bytes + size)


def of_training_step(
    params: Any, mesh: Mesh, *, parts: int, dtype: Any, remat: bool
) -> dict[str, Traffic]:
    """Eqs. (1) to (3), for parameters with shardings as `sharding.state_shardings` gives them.

    Args:
      params: tree of arrays or their shapes, with shardings.
      mesh: the device mesh.
      parts: of a batch, each gathered for.
      dtype: of the computation, in which kernels are gathered and gradients summed.
      remat: whether all blocks are computed twice, and so gathered twice.
    """
    traffic = dict.fromkeys(KINDS, Traffic())
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(key, "key", key)) for key in keys]
        # Vectors and the last convolution are used in float32.
        narrow = leaf.ndim > 1 and "conv_out" not in names
        size = parts * jnp.dtype(dtype if narrow else jnp.float32).itemsize * leaf.size
        size //= _tensor_share(leaf)
        if "fsdp" in leaf.sharding.spec:
            in_block = any("block" in name or "attention" in name for name in names)
            gathers = 2 if remat and in_block else 1
            traffic["all-gather"] = traffic["all-gather"].plus(gathers * parts, gathers * size)
            traffic["reduce-scatter"] = traffic["reduce-scatter"].plus(parts, size)
            if mesh.shape["data"] > 1:
                share = size // mesh.shape["fsdp"]
                # What is summed over `fsdp` is summed over `data` too, each slice by itself.
                traffic["all-reduce"] = traffic["all-reduce"].plus(parts, share)
        elif mesh.shape["data"] * mesh.shape["fsdp"] > 1:
            traffic["all-reduce"] = traffic["all-reduce"].plus(parts, size)
    return traffic


def _tensor_share(leaf: Any) -> int:
    spec, mesh = leaf.sharding.spec, leaf.sharding.mesh
    return mesh.shape["tensor"] if "tensor" in spec else 1


_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\((?P<rest>.*)"
)
_CALLED = re.compile(r"(?:body|to_apply|called_computations|branch_computations)=\{?%?([\w.\-]+)")
# The TPU's compiler makes a reduce-scatter as a fusion: an all-reduce of which slices are kept.
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
        not among how many.
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
    """How often a loop runs: as it says, else what its counter, in steps of 1, stays below."""
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
    """Bytes of what an all-gather makes, of what the others take."""
    kind, result = found["kind"], found["result"]
    if found["start"] and kind != "all-reduce":
        # What is taken, what is made, and perhaps what the device keeps of it.
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
    """Among how many devices a collective is; None if it does not say."""
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
