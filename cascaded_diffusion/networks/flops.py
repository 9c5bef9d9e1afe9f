"""FLOPs of a network, as the literature counts them: a multiply-add is two.

Convolutions and matrix products count, including the multiplications with a convolution's
padding, which XLA's own count leaves out (a tenth at 4 and 8 px). Where a CPU has a kernel of
its own, the general one counts: its shortcuts save time, not FLOPs.
"""

import math
from collections.abc import Callable

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from cascaded_diffusion.networks.kernels.platforms import traced_for


def count_flops(function: Callable[..., object], *args: object) -> int:
    """FLOPs of one call of `function`, traced with arrays or their shapes."""
    with traced_for("tpu"):  # which has no shortcuts
        return 2 * _multiply_adds(jax.make_jaxpr(function)(*args).jaxpr)


def _multiply_adds(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inputs = [getattr(v.aval, "shape", ()) for v in equation.invars]
        output = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.params["dimension_numbers"].rhs_spec  # out, in, spatial
            total += output * math.prod(inputs[1][axis] for axis in kernel[1:])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += output * math.prod(inputs[0][axis] for axis in contracted)
        total += sum(map(_multiply_adds, jaxprs_in_params(equation.params)))
    return total
