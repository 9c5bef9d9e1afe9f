"""What flows through the framework.

Shape letters, used in docstrings and by `check_shape`: `B` batch, `H W C` high resolution, `h w`
low resolution, `E` embedding, `N` tokens, `K` classes.

Images are float32 in [-1, 1]. `t` in [0, 1] is diffusion time; 1 is pure noise. Modules exchange
noise levels as `logsnr` = log(alpha^2 / sigma^2).
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.typing import DTypeLike

Params = dict  # nested, of arrays or of their shapes
Tree = TypeVar("Tree")  # a pytree; where it is returned, one of the same structure


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One global training batch. Images are float32 in [-1, 1]."""

    image: jax.Array  # [B, H, W, C] at the data set's resolution
    label: jax.Array | None = None  # [B] int32 class ids; None for data without classes
    low_res: jax.Array | None = None  # [B, h, w, C] if it is stored; None: derived from `image`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Everything a stage is conditioned on. Each field is optional.

    cond = cd.Conditioning(label=jnp.array([3, 7]), low_res=small, aug_level=jnp.full(2, 0.1))
    """

    label: jax.Array | None = None  # [B] int32 class ids; `num_classes` stands for "dropped"
    # [B, h, w, C] float32, already damaged by conditioning augmentation; the network enlarges it.
    low_res: jax.Array | None = None
    aug_level: jax.Array | None = None  # [B] float32 in [0, 1], the strength of that damage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A network's output in both of its useful forms, [B, H, W, C] each.

    prediction = cd.Prediction(x0=x0, eps=predict_eps_from_x0(xt, logsnr, x0))
    """

    x0: jax.Array  # the predicted clean image
    eps: jax.Array  # the predicted noise, consistent with `x0` and `xt`
    # Where the log-variance of the reverse step lies between the small (0) and the large one (1);
    # None if it is not learned. Unlike a variance, a fraction fits steps of any length.
    variance_fraction: jax.Array | None = None


# t [...] in [0, 1] -> logsnr [...], decreasing in t.
Schedule = Callable[[jax.Array], jax.Array]

# (xt [B, H, W, C], logsnr [B]) -> Prediction. Parameters, conditioning and guidance are closed
# over, so this is all that a sampler knows of a network.
DenoiseFn = Callable[[jax.Array, jax.Array], Prediction]

# (parameters of a part of the network, their path, dtype of the computation or None)
# -> the parameters as the computation needs them.
Gather = Callable[[Params, tuple[str, ...], DTypeLike | None], Params]

# A function of arrays [B, ...] -> the same, applied by each device to its own examples.
PerDevice = Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]


def check_shape(x: jax.Array, spec: str, name: str, **sizes: int) -> None:
    """Raises ValueError, which calls `x` `name`, unless its shape is that of `spec`.

    `spec` names the dimensions, for example `"B H W C"`; `sizes` are those required, by name. For
    a tracer, the check runs while tracing and costs nothing.
    """
    dims = spec.split()
    fits = len(x.shape) == len(dims) and all(
        got == sizes.get(dim, got) for got, dim in zip(x.shape, dims, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims)
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({wanted})")
