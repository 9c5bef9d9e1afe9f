"""Slices of accelerators by name, such as `v5e:16x16`: how many devices, of what kind.

With libtpu installed, the devices of a TPU slice can be had without one: they serve to
compile for, with the compiler that would be used there.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.accelerators import ACCELERATORS, Accelerator

# Dimensions of a slice, and the longest it may be along one.
_TPU_DIMENSIONS = {"v4": (3, 16), "v5e": (2, 16), "v5p": (3, 28), "v6e": (2, 16)}
_MOST_GPUS = 16_384
# What a slice's type counts, per chip: cores where a chip has two.
_TYPE_UNITS = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `name` as the user gave it, its accelerator and its number of devices."""

    name: str
    accelerator: Accelerator
    num_devices: int

    @property
    def is_tpu(self) -> bool:
        return self.accelerator.name in _TPU_DIMENSIONS


def parse_topology(text: str) -> Topology:
    """The topology of `v5e:16x16`, `v5p:4x4x8` or `h100:8`.

    Raises:
      UserError: an unknown accelerator, or a shape that it does not come in.
    """
    kind, _, shape = text.partition(":")
    expected = "expected KIND:SHAPE, as v5e:16x16, v5p:4x4x8 or h100:8"
    if kind not in ACCELERATORS:
        raise UserError(
            f"--topology={text}: unknown accelerator {kind!r}; {expected}, of the kinds"
            f" {', '.join(ACCELERATORS)}"
        )
    sizes = shape.split("x")
    if not all(s.isascii() and s.isdecimal() and len(s) < 10 and int(s) > 0 for s in sizes):
        raise UserError(f"--topology={text}: {shape!r} is no shape; {expected}")
    numbers = [int(s) for s in sizes]
    dimensions, longest = _TPU_DIMENSIONS.get(kind, (1, _MOST_GPUS))
    if len(numbers) != dimensions or max(numbers) > longest:
        at_most = f", of at most {longest} each"
        raise UserError(
            f"--topology={text}: {kind} comes in shapes of {dimensions} number(s){at_most};"
            f" {expected}"
        )
    return Topology(text, ACCELERATORS[kind], math.prod(numbers))


def set_up_tpu_compiler(topology: Topology) -> None:
    """Lets libtpu do without a TPU. To be called before JAX is imported."""
    kind = topology.accelerator.name
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{kind}-{_TYPE_UNITS[kind] * topology.num_devices}",
        TPU_WORKER_HOSTNAMES="localhost",
        # It holds no TPU: another process that compiles, or has crashed, is no reason to wait.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a slice, to compile for.

    Raises:
      UserError: the compiler does not know the slice.
    """
    from jax.experimental import topologies

    try:
        # A v4 chip's two cores are one device, as they are where JAX runs on it.
        options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as e:  # libtpu's errors have no type of their own
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(
            f"--topology={topology.name}: libtpu does not know it ({reason}); plan without"
            " its compiler by --nocompile"
        ) from e
    return list(found.devices)
