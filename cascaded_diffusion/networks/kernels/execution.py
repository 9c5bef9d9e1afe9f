"""How a network is computed, which does not change the result."""

import dataclasses
from collections.abc import Callable

import jax

from cascaded_diffusion.types import Gather, PerDevice


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to compute a network over many devices and within their memory."""

    # Called on the parameters of each block right before the block uses them, so that parameters
    # which are split over devices are whole only that long.
    gather: Gather | None = None
    # Called on each feature map [B, H, W, C]; constrains how it is sharded.
    constrain_sharding: Callable[[jax.Array], jax.Array] | None = None
    # Divides among devices what XLA cannot, which is splash attention. None where devices may not
    # divide the examples, as in sampling; then splash attention is not used.
    per_device: PerDevice | None = None
    # Sizes of the feature maps whose blocks keep only their inputs and are computed again in the
    # backward pass; None for all blocks.
    remat_sizes: tuple[int, ...] | None = ()

    def rematerializes(self, size: int) -> bool:
        """Whether a block on feature maps of this size is computed again in the backward pass."""
        return self.remat_sizes is None or size in self.remat_sizes
