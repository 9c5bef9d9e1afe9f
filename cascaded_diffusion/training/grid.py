"""Grids of EMA samples for TensorBoard."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.cascade import keys_for
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.types import Params

Records = dict[str, np.ndarray]

# Size of a sample grid.
GRID_ROWS, GRID_COLUMNS = 4, 10


class GridSampler:
    """Makes grids of EMA samples, always from the same noise and labels.

    `stage` comes from `step.stage_for_sampling`, so its parameters may be split over the mesh. A
    super-resolution stage enlarges the low-res versions of `examples`, which are real images.
    """

    def __init__(self, stage: Stage, config: RunConfig, mesh: Mesh, examples: Records):
        num_classes = stage.config.num_classes
        self._key = jax.random.key(config.eval.seed)
        self._indices = np.arange(len(examples["label"]))
        self._labels = self._indices % num_classes if num_classes else None
        self._low_res, level = None, None
        if stage.augment is not None:
            self._low_res = np.asarray(stage.low_res_from(float_from_uint8(examples["image"])))
            self._labels = examples["label"] if num_classes else None
            level = config.eval.aug_level if stage.augment.has_aug_level else None

        def sample(
            params: Params,
            key: jax.Array,
            indices: jax.Array,
            labels: jax.Array | None,
            low_res: jax.Array | None,
        ) -> jax.Array:
            image = stage.sample(
                params, keys_for(key, indices), label=labels, low_res=low_res, aug_level=level
            )
            return uint8_from_float(image)

        self._sample = jax.jit(sample, out_shardings=mesh_lib.replicated(mesh))

    def __call__(self, params: Params) -> np.ndarray:
        """One picture, uint8 [H, W, C], of samples from `params`."""
        images = self._sample(params, self._key, self._indices, self._labels, self._low_res)
        return pictures.grid(np.asarray(images), columns=GRID_COLUMNS)
