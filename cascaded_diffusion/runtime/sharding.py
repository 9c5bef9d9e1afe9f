"""Where parameters and feature maps live in the mesh: rules over paths, names and shapes.

Stored. Parameters, their EMAs and the optimizer's moments are split over `fsdp`, where
they are large enough for it to pay; the widest layers over `tensor` as well. The rules
are the same for all three, so that matching slices are on the same device.

Computed. Right before a block uses its parameters they are gathered from `fsdp`, in the
dtype of the computation; they stay split over `tensor`. The gradient comes back as it is
stored. Leaving the gathering to the partitioner makes it split every convolution, and
compilation for a large mesh does not finish.

Over `tensor` a residual block is split by channels (Shoeybi et al. 2019): its first
convolution makes a part of them, on which the second norm works, and which the second
convolution adds up.

Feature maps. A batch is split over `data` and `fsdp`. With fewer examples than devices,
the largest feature maps are split by rows over `tensor` besides.

The model knows nothing of all this: it calls what it is given (`networks.execution`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cascaded_diffusion.runtime.mesh import DATA_AXES

# Below this many elements an array is not worth splitting.
MIN_SHARDED_SIZE = 4096

# Which axis of which parameter is split over `tensor`: channels, of the widest layers alone.
_TENSOR_RULES = (
    (re.compile(r"(^|/)conv0/(kernel|bias)$"), -1),
    (re.compile(r"(^|/)norm1/(scale|bias)$"), -1),
    (re.compile(r"(^|/)conv1/kernel$"), -2),
)
# A layer is one of the widest with this share of the widest one's channels.
_WIDE = 0.5


def _path(keys: Any) -> str:
    """`params/down0_block0/conv0/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _tensor_axis(path: str, shape: tuple[int, ...]) -> int | None:
    for pattern, axis in _TENSOR_RULES:
        if pattern.search(path):
            return len(shape) + axis
    return None


class _Rules:
    """The rules for one tree of shapes, which decides what is wide, and one mesh."""

    def __init__(self, tree: Any, mesh: Mesh):
        self._fsdp, self._tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
        self._widest = 0
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            axis = _tensor_axis(_path(keys), leaf.shape)
            if axis is not None:
                self._widest = max(self._widest, leaf.shape[axis])

    def computed(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter is split while it is used."""
        axis = _tensor_axis(path, shape)
        if self._tensor == 1 or axis is None or shape[axis] % self._tensor:
            return PartitionSpec()
        if shape[axis] < _WIDE * self._widest:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, "tensor")

    def stored(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How it is split while it is not: the last axis that `fsdp` divides, nearly always
        the output channels, but for the one that `tensor` has."""
        spec = list(self.computed(path, shape)) + [None] * len(shape)
        spec = spec[: len(shape)]
        if self._fsdp > 1 and np.prod(shape) >= MIN_SHARDED_SIZE:
            for axis in reversed(range(len(shape))):
                if spec[axis] is None and shape[axis] % self._fsdp == 0:
                    spec[axis] = "fsdp"
                    break
        while spec and spec[-1] is None:
            spec.pop()
        return PartitionSpec(*spec)


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of shapes (`jax.eval_shape`)."""
    rules = _Rules(abstract_state, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, rules.stored(_path(keys), leaf.shape)),
        abstract_state,
    )


def make_gather(params: Any, mesh: Mesh) -> Callable[[Any, tuple[str, ...], Any], Any] | None:
    """Returns `gather(part, path, dtype)`, or None where nothing is ever split.

    Args:
      params: the tree of all parameters, or of their shapes.
      mesh: the device mesh.

    `gather` takes the parameters of a part of the network as they are stored, the part's
    path in the tree, and the dtype of its computation, in which kernels are gathered:
    half the bytes in bfloat16. None is their own. Gradients are in the dtype of, and
    split as, what is stored.
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return None
    rules = _Rules(params, mesh)

    def gather(part: Any, path: tuple[str, ...], dtype: Any) -> Any:
        def gather_leaf(keys: Any, leaf: jax.Array) -> jax.Array:
            where = "/".join((*path, _path(keys)))
            # Norms' scales and shifts are used in float32.
            wanted = leaf.dtype if dtype is None or leaf.ndim < 2 else dtype
            return _gathered(
                leaf,
                wanted,
                NamedSharding(mesh, rules.stored(where, leaf.shape)),
                NamedSharding(mesh, rules.computed(where, leaf.shape)),
            )

        return jax.tree_util.tree_map_with_path(gather_leaf, part)

    return gather


def _gathered(x: jax.Array, dtype: Any, stored: NamedSharding, computed: NamedSharding) -> Any:
    constrain = jax.lax.with_sharding_constraint

    @jax.custom_vjp
    def gathered(x: jax.Array) -> jax.Array:
        # Converted while it is split: what is sent is what is computed with.
        return constrain(constrain(x.astype(dtype), stored), computed)

    def forward(x: jax.Array) -> tuple[jax.Array, None]:
        return gathered(x), None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (constrain(gradient, stored).astype(x.dtype),)

    gathered.defvjp(forward, backward)
    return gathered(x)


def make_sharding_constraint(
    mesh: Mesh, *, batch_size: int
) -> Callable[[jax.Array], jax.Array] | None:
    """Returns `place(h)`, which says where a feature map [B, H, W, C] is; None on one device.

    Args:
      mesh: the device mesh.
      batch_size: of what is computed at once over the whole mesh. Below one example per
        device, the feature maps of at least half the first one's height are split by rows.
    """
    if mesh.size == 1:
        return None
    tensor = mesh.shape["tensor"]
    by_rows = tensor > 1 and batch_size < mesh.size
    largest = 0

    def place(h: jax.Array) -> jax.Array:
        nonlocal largest
        largest = max(largest, h.shape[1])
        split = by_rows and 2 * h.shape[1] >= largest and h.shape[1] % tensor == 0
        spec = PartitionSpec(DATA_AXES, "tensor") if split else PartitionSpec(DATA_AXES)
        return jax.lax.with_sharding_constraint(h, NamedSharding(mesh, spec))

    return place


def make_per_device(mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns what makes a function of arrays [B, ...] one that each device computes of its own
    examples; on one device the function itself."""

    def divided(function: Callable[..., Any]) -> Callable[..., Any]:
        if mesh.size == 1:
            return function
        spec = PartitionSpec(DATA_AXES)
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    return divided
