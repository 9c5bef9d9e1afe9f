"""How a network is computed, which changes nothing of what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

# (parameters of a part of the network, their path, dtype of the computation or None)
# -> the parameters as they are needed to compute.
Gather = Callable[[Any, tuple[str, ...], Any], Any]

# Of a function of arrays [B, ...] -> the same, computed by each device of its own examples.
PerDevice = Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]

_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Programs traced in here are for this platform, whatever this process runs on."""
    token = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def platform() -> str:
    """For which platform a program is traced: "cpu", "gpu" or "tpu".

    For what is to be differentiated: of a `platform_dependent` each branch keeps its own
    numbers for the backward pass, and all are counted and allocated.
    """
    return _PLATFORM.get() or jax.default_backend()


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to compute a network over many devices and within their memory.

    Attributes:
      gather: called on the parameters of each block right before the block uses them,
        so that whatever is split over devices is whole there for that long only.
      constrain_sharding: called on each feature map [B, H, W, C]; constrains how it is sharded.
      per_device: for what XLA cannot divide among devices, splash attention; without it that is
        not used. None where examples may not divide, as in sampling.
      remat_sizes: sizes of the feature maps whose blocks keep their inputs only, and
        are computed anew in the backward pass.
    """

    gather: Gather | None = None
    constrain_sharding: Callable[[jax.Array], jax.Array] | None = None
    per_device: PerDevice | None = None
    remat_sizes: tuple[int, ...] = ()
