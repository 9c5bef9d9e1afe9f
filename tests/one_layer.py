"""The smallest network there is, for tests of what surrounds a network.

A U-Net of one level still takes four times as long to compile, and most of the suite's time is
compilation. The networks' own tests, those of sharding and of resuming, and those of photos end
to end train real ones.

    python -m tests.one_layer BINARY FLAGS...

runs a binary with it, in a process of its own.
"""

import contextlib
import sys

import flax.linen as nn
import pytest

from cascaded_diffusion.networks import layers, unet
from cascaded_diffusion.networks.conditioning import ConditionalNetwork


class OneLayer(ConditionalNetwork):
    """A convolution, modulated by the embedding, and the output layer. Takes a U-Net's config."""

    @nn.compact
    def __call__(self, xt, logsnr, cond, rows=None):
        h, embedding = self.prepare(xt, logsnr, cond)
        h = layers.Conv3x3(self.channels, self.dtype, name="conv_in")(h.astype(self.dtype))
        shift = nn.Dense(self.channels, dtype=self.dtype, name="shift")(embedding)
        h = self.constrain_sharding(h + shift[:, None, None])
        return layers.image_out(h, self.out_channels, self.dtype)


@contextlib.contextmanager
def in_place_of_the_unet(network=OneLayer):
    """Stages that are built meanwhile have this network where their configs say "unet"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unet.NETWORKS, "unet", network)
        yield


if __name__ == "__main__":
    from tests.binary_server import run

    with in_place_of_the_unet():
        sys.exit(run(*sys.argv[1:]))
