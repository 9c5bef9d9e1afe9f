"""Where parameters and feature maps live in the mesh: rules over paths, names and shapes.

Storage. Parameters, their EMAs and the optimizer's moments are split alike: over `fsdp` if they are
large enough, and the widest layers over `tensor` as well.

Computation. Right before a block uses its parameters they are gathered from `fsdp`, in the
dtype of the computation; they stay split over `tensor`. The gradient comes back split as the
parameters are stored. If the partitioner does the gathering, it splits every convolution, and
compilation for a large mesh does not finish.

Over `tensor` a residual block is split by channels (Shoeybi et al. 2019): each device computes
some of its first convolution's channels and their norm, and the second convolution sums over
them.

Feature maps. A batch is split over `data` and `fsdp`. If there are fewer examples than devices,
the largest feature maps are also split by rows over `tensor`.

The network knows nothing of this: it calls what its `Execution` holds.
"""

import re
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from cascaded_diffusion.runtime.mesh import DATA_AXES
from cascaded_diffusion.types import Gather, Params, PerDevice, Tree

# An array with fewer elements is not worth splitting.
MIN_SHARDED_SIZE = 4096

# Which axis of which parameter is split over `tensor`: the channels of the widest layers.
_TENSOR_RULES = (
    (re.compile(r"(^|/)conv0/(kernel|bias)$"), -1),
    (re.compile(r"(^|/)norm1/(scale|bias)$"), -1),
    (re.compile(r"(^|/)conv1/kernel$"), -2),
)
# A layer counts as wide if it has at least this share of the widest layer's channels.
_WIDE = 0.5


def _path(keys: jax.tree_util.KeyPath) -> str:
    """`params/down0_block0/conv0/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _tensor_axis(path: str, shape: tuple[int, ...]) -> int | None:
    axes = (len(shape) + axis for pattern, axis in _TENSOR_RULES if pattern.search(path))
    return next(axes, None)


class _Rules:
    """The rules for one mesh and one tree of shapes, which decides which layers are wide."""

    def __init__(self, tree: object, mesh: Mesh | AbstractMesh):
        self._fsdp, self._tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
        widths = (
            leaf.shape[axis]
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if (axis := _tensor_axis(_path(keys), leaf.shape)) is not None
        )
        self._wide = _WIDE * max(widths, default=0)

    def computed(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter is split while it is used."""
        axis = _tensor_axis(path, shape)
        if axis is None or self._tensor == 1:
            return PartitionSpec()
        if shape[axis] % self._tensor or shape[axis] < self._wide:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, "tensor")

    def stored(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter is stored: `fsdp` splits the last axis that it divides and `tensor`
        leaves, nearly always the output channels."""
        computed = self.computed(path, shape)
        if self._fsdp == 1 or np.prod(shape) < MIN_SHARDED_SIZE:
            return computed
        spec = [*computed, *[None] * (len(shape) - len(computed))]
        for axis in reversed(range(len(shape))):
            if spec[axis] is None and shape[axis] % self._fsdp == 0:
                spec[axis] = "fsdp"
                break
        while spec and spec[-1] is None:
            spec.pop()
        return PartitionSpec(*spec)


def state_shardings(abstract_state: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """A NamedSharding for every leaf of a tree of shapes (`jax.eval_shape`)."""
    rules = _Rules(abstract_state, mesh)

    def stored(keys: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, rules.stored(_path(keys), leaf.shape))

    return jax.tree_util.tree_map_with_path(stored, abstract_state)


def with_shardings(abstract_state: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """A tree of shapes, each with the sharding by which it is stored."""
    return jax.tree.map(
        lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
        abstract_state,
        state_shardings(abstract_state, mesh),
    )


def make_gather(params: Params, mesh: Mesh) -> Gather | None:
    """Returns `gather(part, path, dtype)`, or None if the mesh splits no parameters.

    `gather` takes the stored parameters of a part of the network, the part's path in the tree,
    and the dtype in which kernels are gathered: bfloat16 halves the bytes, None keeps their own.
    Gradients have the dtype and the sharding of the stored parameters. `params` is the tree of
    all parameters, or of their shapes.
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return None
    rules = _Rules(params, mesh)

    def gather(part: Params, path: tuple[str, ...], dtype: DTypeLike | None) -> Params:
        def gather_leaf(keys: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
            where = "/".join((*path, _path(keys)))
            # Norms' scales and shifts are used in float32.
            wanted = leaf.dtype if dtype is None or leaf.ndim < 2 else dtype
            stored = NamedSharding(mesh, rules.stored(where, leaf.shape))
            computed = NamedSharding(mesh, rules.computed(where, leaf.shape))
            return _gathered(leaf, wanted, stored, computed)

        return jax.tree_util.tree_map_with_path(gather_leaf, part)

    return gather


def _gathered(
    x: jax.Array, dtype: DTypeLike, stored: NamedSharding, computed: NamedSharding
) -> jax.Array:
    constrain = jax.lax.with_sharding_constraint

    @jax.custom_vjp
    def gathered(x: jax.Array) -> jax.Array:
        # Converted while still split, so the narrower numbers are sent.
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
    """Returns `constrain(h)`, which shards a feature map [B, H, W, C]; None on one device.

    If the mesh computes fewer examples at once than it has devices, feature maps of at least half
    the first one's height are split by rows.
    """
    if mesh.size == 1:
        return None
    tensor = mesh.shape["tensor"]
    by_rows = tensor > 1 and batch_size < mesh.size
    largest = 0

    def constrain(h: jax.Array) -> jax.Array:
        nonlocal largest
        largest = max(largest, h.shape[1])
        split = by_rows and 2 * h.shape[1] >= largest and h.shape[1] % tensor == 0
        spec = PartitionSpec(DATA_AXES, "tensor") if split else PartitionSpec(DATA_AXES)
        return jax.lax.with_sharding_constraint(h, NamedSharding(mesh, spec))

    return constrain


def make_per_device(mesh: Mesh) -> PerDevice:
    """Returns a transform of functions of arrays [B, ...]: each device applies the function to
    its own examples. On one device it returns the function itself."""

    def divided(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        if mesh.size == 1:
            return function
        spec = PartitionSpec(DATA_AXES)
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    return divided
