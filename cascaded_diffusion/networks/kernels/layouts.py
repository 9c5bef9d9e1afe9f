"""Where XLA may keep an array in another order of its axes than the one it is written in."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding

from cascaded_diffusion.networks.kernels.platforms import for_platform


def _in_order(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    def constrained(shard: jax.Array) -> jax.Array:
        return with_layout_constraint(shard, Layout(tuple(range(x.ndim))))

    # Shard by shard: XLA would gather an array that is divided before it constrains it.
    mesh, spec = sharding.mesh, sharding.spec
    return jax.shard_map(constrained, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def in_order(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x`, with this sharding, whose axes a GPU keeps in order, the last one fastest.

    cuDNN computes the gradients of convolutions' kernels as [K, 3, 3, C]. XLA extends that order
    to all that is elementwise after them, and transposes parameters, moments and averages.
    """
    return for_platform(gpu=_in_order, default=lambda x, sharding: x)(x, sharding)
