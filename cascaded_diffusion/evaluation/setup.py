"""The set-up of every evaluation of a run: the device mesh, the lock and the evaluator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
from jax.sharding import Mesh

from cascaded_diffusion.config.run_checks import evaluation_mesh
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig
from cascaded_diffusion.evaluation.evaluator import Evaluator, build_evaluator, build_extractor
from cascaded_diffusion.evaluation.features.extractor import FeatureExtractor
from cascaded_diffusion.evaluation.samples.real_images import RealSplit
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.runtime.run_folder import RunFolder

# (resize=, mesh=) -> FID's extractor.
InceptionLoader = Callable[..., FeatureExtractor]
# A run's real images by role: "train" and "val".
Splits = Mapping[str, RealSplit]


def default_mesh(settings: RunConfig | CascadeConfig) -> Mesh:
    """The mesh that samples are made on unless the caller has one.

    Raises:
      UserError: a batch cannot be split over the devices.
    """
    return build_mesh(evaluation_mesh(settings, jax.device_count()))


@contextlib.contextmanager
def run_evaluator(
    folder: RunFolder,
    config: RunConfig,
    splits: Splits,
    roles: Sequence[str],
    inception: InceptionLoader,
    mesh: Mesh,
) -> Iterator[Evaluator]:
    """Holds a run's lock and yields its evaluator, with the references of the given roles.

    Raises:
      UserError: another process evaluates the run.
    """
    with folder.writer_lock("eval"):
        extractor = build_extractor(
            config,
            folder,
            splits["train"],
            splits["val"],
            mesh,
            load_inception=partial(inception, mesh=mesh),
            say=partial(print, flush=True),
        )
        yield build_evaluator(config, folder, extractor, {role: splits[role] for role in roles})
