"""The state that training carries from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from cascaded_diffusion.config.schema import ema_name
from cascaded_diffusion.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """The trainer's state, a pytree.

    Attributes:
      step: int32 scalar, the number of optimizer steps taken.
      params: the network's parameters, float32.
      ema_params: their exponential moving averages, by `ema_name` of the decay.
      opt_state: the optimizer's state.
      key: typed PRNG key of the run. Step k draws from `fold_in(key, k)`: only `step` advances,
        and a resumed run repeats no noise.
    """

    step: jax.Array
    params: Params
    ema_params: dict[str, Params]
    opt_state: optax.OptState
    key: jax.Array


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema_decays: Sequence[float],
) -> TrainState:
    """The state before the first step. Every EMA starts at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params={ema_name(d): jax.tree.map(jnp.copy, params) for d in ema_decays},
        opt_state=optimizer.init(params),
        key=key,
    )


def updated_ema(ema_params: Params, params: Params, step: jax.Array, *, decay: float) -> Params:
    r"""EMA with a warm-up: the effective decay is min(decay, (1 + step) / (10 + step)).

    Without the warm-up, the average of a run shorter than a few times 1 / (1 - decay) steps
    would still contain the random initial parameters.
    """
    step = step.astype(jnp.float32)
    effective = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - effective) * (p - e), ema_params, params)
