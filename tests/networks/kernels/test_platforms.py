"""The one choice of a kernel by platform."""

import jax
import jax.numpy as jnp

from cascaded_diffusion.networks.kernels.platforms import for_platform, traced_for


def test_the_platform_traced_for_decides_and_a_jitted_function_is_traced_again():
    @jax.jit
    def named():
        return for_platform(cpu=jnp.float32(1), tpu=jnp.float32(2), default=jnp.float32(3))

    assert named() == 1
    for platform, expected in (("tpu", 2), ("gpu", 3), ("cpu", 1)):
        with traced_for(platform):
            assert named() == expected
    assert named() == 1
