"""Slices of accelerators by name, such as `v5e:16x16`: how many devices, of what kind.

With libtpu installed, JAX describes the devices of a TPU slice on a machine without TPUs, so
that programs can be compiled for them.
"""

import dataclasses
import math
import os

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.accelerators import ACCELERATORS, Accelerator

# The number of dimensions of a slice, the most chips along one of them, and the units per chip in
# the name of the slice's type: cores, on chips that have two.
_TPUS = {"v4": (3, 16, 2), "v5e": (2, 16, 1), "v5p": (3, 28, 2), "v6e": (2, 16, 1)}
_MOST_GPUS = 16_384


# JAX allocates this share of a GPU by default; XLA_PYTHON_CLIENT_MEM_FRACTION is not read.
_GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `name` as the user gave it, its accelerator and its number of devices."""

    name: str
    accelerator: Accelerator
    num_devices: int

    @property
    def is_tpu(self) -> bool:
        return self.accelerator.name in _TPUS

    @property
    def memory_bytes(self) -> float:
        """What JAX gives programs on a device, before the runtime's share."""
        return self.accelerator.memory_bytes * (1.0 if self.is_tpu else _GPU_SHARE)


def parse_topology(text: str) -> Topology:
    """Reads a topology such as `v5e:16x16`, `v5p:4x4x8` or `h100:8`.

    Raises UserError if the accelerator is unknown, or does not come in this shape.
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
        raise UserError(f"--topology={text}: {shape!r} is not a shape; {expected}")
    numbers = [int(s) for s in sizes]
    dimensions, longest, _ = _TPUS.get(kind, (1, _MOST_GPUS, 1))
    if len(numbers) != dimensions or max(numbers) > longest:
        raise UserError(
            f"--topology={text}: {kind} comes in shapes of {dimensions} number(s), of at most"
            f" {longest} each; {expected}"
        )
    return Topology(text, ACCELERATORS[kind], math.prod(numbers))


def set_up_tpu_compiler(topology: Topology) -> None:
    """Lets libtpu work without a TPU. Call it before JAX is imported."""
    kind = topology.accelerator.name
    *_, units = _TPUS[kind]
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{kind}-{units * topology.num_devices}",
        TPU_WORKER_HOSTNAMES="localhost",
        # No TPU is held, so another process that compiles, or has crashed, need not be awaited.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
