"""Does a step again that was not finite, and says which of its rows and gradients are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.runtime.checkpoint import read_apart
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import nonfinite
from cascaded_diffusion.training import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a step gave when it was done again."""

    values: dict[str, float]  # the loss, its parts, the gradient's norm
    leaves: list[str]  # parameters whose gradient is not finite
    rows: list[int]  # of the batch, from 0, whose loss is not finite


def replay(
    config: RunConfig,
    folder: RunFolder,
    step: int,
    records: dict[str, jax.Array],
    *,
    mesh: Mesh,
) -> Replayed:
    """Does step `step` again, from the state in RUN/nonfinite and the records of its batch.

    `records` are as for `step.make_train_step`. Raises UserError if the state cannot be read.
    """
    stage = build_stage(config.stage)
    abstract = step_lib.abstract_state(stage, config.train, mesh)
    state = read_apart(nonfinite.state_path(folder, step), abstract)
    # It was kept after the step, which had changed nothing else.
    state = dataclasses.replace(state, step=jnp.full_like(state.step, step - 1))
    losses = jax.jit(step_lib.make_losses(stage))(state, records)
    _, metrics = jax.jit(step_lib.make_train_step(stage, config.train, mesh))(state, records)
    metrics = jax.device_get(metrics)
    squares = metrics.pop("grad_squares")
    return Replayed(
        values={name: float(value) for name, value in metrics.items()},
        leaves=nonfinite.bad_leaves(nonfinite.leaf_names(state.params), squares),
        rows=np.flatnonzero(~np.isfinite(losses)).tolist(),
    )
