"""Which kernel computes what on which platform.

|                      | CPU                    | GPU                        | TPU            |
|----------------------|------------------------|----------------------------|----------------|
| attention            | head by head           | cuDNN in 16 bits, else XLA | splash, or XLA |
| 3x3 convolution      | Winograd where it pays | XLA                        | XLA            |
| its gradients        | XLA, in XLA's order    | XLA                        | XLA            |
| sum over pixels      | product with ones      | XLA                        | XLA            |
| sum over groups      | product with a mask    | XLA                        | XLA            |
| 1x1 kernel's gradient| example by example     | XLA                        | XLA            |
| skips across the U   | copied side by side    | in parts                   | as on a CPU    |
| norm's gradient      | swish's slope kept     | swish's slope twice        | as on a CPU    |
| its two sums         | one by one             | as one of complex numbers  | one by one     |
| kernels' gradients   | in XLA's order         | in the kernels' order, and | in XLA's order |
|                      |                        | in full before their use   |                |

`for_platform` chooses while a program is traced. `jax.lax.platform_dependent` would choose while
it is lowered, but then every branch keeps its own numbers for the backward pass, and all of them
are allocated. A program for devices that this process does not have, such as `plan`'s, is traced
inside `traced_for`.
"""

from contextlib import AbstractContextManager
from typing import TypeVar

import jax

T = TypeVar("T")

# JAX's own kind of context: a jitted function is traced again where the platform differs.
_platform = jax.make_user_context(None)


def traced_for(platform: str) -> AbstractContextManager[None]:
    """A context in which programs are traced for "cpu", "gpu" or "tpu", whatever runs here."""
    return _platform(platform)


def for_platform(*, default: T, **kernels: T) -> T:
    """The kernel named after the platform that is being traced for; else the default."""
    return kernels.get(_platform.value or jax.default_backend(), default)
