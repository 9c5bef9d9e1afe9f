r"""What devices send each other in a training step, by formula.

Bytes are those of the whole array of a collective, counted once per collective and device group:
the array that an all-gather makes, or that an all-reduce or reduce-scatter takes. A ring of n
devices sends (n - 1) / n of them over each link for the first and the last, twice that for an
all-reduce. With P the parameters that are split over `fsdp`, N all of them, p the parts of a
batch, and b bytes per number of the computation:

(1)  all-gather      p b |P| for the forward pass, and again for rematerialized blocks
(2)  reduce-scatter  p b |P|  gradients of P, over `fsdp`
(3)  all-reduce      p b |N - P|  gradients of the rest; over `data`, a share 1 / fsdp of P's

The formula leaves out what feature maps that are split over `tensor` send.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from cascaded_diffusion.types import Params

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The number of collectives of a kind in a step, and their bytes."""

    count: int = 0
    bytes: int = 0

    def plus(self, count: int, size: int) -> Self:
        return Traffic(self.count + count, self.bytes + size)


def of_training_step(
    params: Params, mesh: Mesh | AbstractMesh, *, parts: int, dtype: DTypeLike, remat: bool
) -> dict[str, Traffic]:
    """The traffic of each of `KINDS` by eqs. (1) to (3).

    `params` are arrays or their shapes, with shardings as `sharding.state_shardings` gives them.
    They are gathered once for each of the `parts` of a batch, in the computation's `dtype`; with
    `remat`, all blocks are computed, and so gathered, twice.
    """
    traffic = dict.fromkeys(KINDS, Traffic())
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        # Vectors and the last convolution are used in float32.
        narrow = leaf.ndim > 1 and "conv_out" not in path
        size = parts * jnp.dtype(dtype if narrow else jnp.float32).itemsize * leaf.size
        if "tensor" in leaf.sharding.spec:
            size //= mesh.shape["tensor"]
        if "fsdp" in leaf.sharding.spec:
            gathers = 2 if remat and ("block" in path or "attention" in path) else 1
            traffic["all-gather"] = traffic["all-gather"].plus(gathers * parts, gathers * size)
            traffic["reduce-scatter"] = traffic["reduce-scatter"].plus(parts, size)
            if mesh.shape["data"] > 1:
                share = size // mesh.shape["fsdp"]
                # Gradients summed over `fsdp` are summed over `data` too, slice by slice.
                traffic["all-reduce"] = traffic["all-reduce"].plus(parts, share)
        elif mesh.shape["data"] * mesh.shape["fsdp"] > 1:
            traffic["all-reduce"] = traffic["all-reduce"].plus(parts, size)
    return traffic
