"""What XLA keeps of arrays in memory, and in which order of their axes."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding

from cascaded_diffusion.networks.kernels.platforms import for_platform
from cascaded_diffusion.types import Tree


def _in_order(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    def constrained(shard: jax.Array) -> jax.Array:
        return with_layout_constraint(shard, Layout(tuple(range(x.ndim))))

    # Shard by shard: XLA would gather an array that is divided before it constrains it.
    mesh, spec = sharding.mesh, sharding.spec
    return jax.shard_map(constrained, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def in_order(grads: Tree, shardings: Tree) -> Tree:
    """Gradients, with these shardings, whose axes a GPU keeps in order, the last one fastest.

    cuDNN computes the gradients of convolutions' kernels as [K, 3, 3, C]. XLA extends that order
    to all that is elementwise after them, and transposes parameters, moments and averages.
    """
    ordered = for_platform(gpu=_in_order, default=lambda x, sharding: x)
    return jax.tree.map(ordered, grads, shardings)


def in_memory(values: Tree) -> Tree:
    """Values that a GPU has computed and written to memory before they are used.

    Elsewhere, or without this, XLA may compute them inside of what uses them.
    """
    return for_platform(gpu=jax.lax.optimization_barrier, default=lambda values: values)(values)
