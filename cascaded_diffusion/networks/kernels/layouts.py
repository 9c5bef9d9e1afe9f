"""Where XLA may keep an array in another order of its axes than the one it is written in."""

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


def in_full(grads: Tree) -> Tree:
    """Gradients that a GPU has written to memory before they are used.

    XLA would transpose them inside the update of the parameters, which then cannot be written
    over what it was computed from: parameters, moments and averages are copied once more.
    """
    return for_platform(gpu=jax.lax.optimization_barrier, default=lambda grads: grads)(grads)
