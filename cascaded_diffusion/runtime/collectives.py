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
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
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
      remat: whether all blocks are computed twice.
    """
    traffic = dict.fromkeys(KINDS, Traffic())
    for leaf in jax.tree.leaves(params):
        width = jnp.dtype(dtype if leaf.ndim > 1 else jnp.float32).itemsize
        size = parts * width * leaf.size // _tensor_share(leaf)
        if "fsdp" in leaf.sharding.spec:
            gathers = 2 if remat else 1
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
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def in_program(hlo: str) -> dict[str, Traffic]:
    """The collectives of a compiled program, from its text; loops count as often as they run.

    Raises:
      ValueError: a loop with collectives does not say how often it runs.
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
    for line in computations.get(name, ()):
        found = _OPERATION.search(line)
        if found:
            yield found["kind"], _size(found), times
            continue
        called = _CALLED.search(line)
        if not called or " fusion(" in line or " reduce(" in line:
            continue
        if " while(" not in line:
            yield from _walk(computations, called[1], times)
            continue
        inside = list(_walk(computations, called[1], 1))
        trips = _TRIPS.search(line)
        if inside and not trips:
            raise ValueError(f"a loop with collectives that does not say how often: {line[:120]}")
        for kind, size, within in inside:
            yield kind, size, times * int(trips[1]) * within


def _size(found: re.Match[str]) -> int:
    """Bytes of what an all-gather makes, of what the others take."""
    shapes = [_bytes(*shape) for shape in _SHAPE.findall(found["result"])]
    if found["kind"] == "reduce-scatter":
        # Its operands are shown with their shapes in some versions, else the groups tell.
        groups = re.search(r"replica_groups=\[(\d+),(\d+)\]", found["rest"])
        explicit = re.search(r"replica_groups=\{\{([\d,]+)\}", found["rest"])
        width = int(groups[2]) if groups else len(explicit[1].split(",")) if explicit else 1
        return width * (sum(shapes) // 2 if found["start"] and len(shapes) > 1 else sum(shapes))
    if found["start"] and found["kind"] == "all-gather":
        return sum(shapes[len(shapes) // 2 :])  # operands come first
    return sum(shapes)


def _bytes(dtype: str, dims: str) -> int:
    width = 1 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) // 8
    return width * math.prod(int(d) for d in dims.split(",") if d)
