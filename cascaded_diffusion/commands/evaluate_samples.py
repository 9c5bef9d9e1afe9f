"""`evaluate --workdir=RUN --samples=FILE`: stored samples by a run's own measure, and CAS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from cascaded_diffusion.commands import jax_setup
from cascaded_diffusion.commands.evaluate_files import num_samples
from cascaded_diffusion.commands.evaluate_run import build_run_evaluator
from cascaded_diffusion.commands.run_images import real_splits
from cascaded_diffusion.config.run_checks import check_sample_count, evaluation_mesh
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import load_samples
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.runtime.run_folder import RunFolder

# From this resolution on, CAS is by ResNet-50, as published; below, by a small ResNet.
_LARGE = 64


def evaluate_samples(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    """Stored samples, by a run's own measure: one JSON line. Returns the exit code."""
    stored = load_samples(fv.samples, config.stage)
    count = num_samples(fv, stored)
    check_sample_count(count, config.eval.features, allow_few=fv.allow_few_samples)
    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation import score
    from cascaded_diffusion.runtime.mesh import build_mesh

    splits = real_splits(folder, config, data_path=fv.data_path)
    mesh = build_mesh(evaluation_mesh(config, jax.device_count()))
    with folder.writer_lock("eval"):
        evaluator = build_run_evaluator(fv, config, folder, splits, mesh, ("train",))
        labels = None if stored.labels is None else stored.labels[:count]
        record = score.record_for_samples(
            evaluator,
            fv.samples,
            stored.images[:count],
            labels,
            num_classes=config.stage.num_classes,
        )
    print(json.dumps(record), flush=True)
    return 0


def evaluate_cas(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    """Classification accuracy score of stored samples: one JSON line. Returns the exit code."""
    stage = config.stage
    if stage.num_classes < 2:
        raise UserError(f"--cas: {stage.name!r} has no classes to tell apart")
    stored = load_samples(fv.samples, config.stage)
    labels = stored.labels
    jax = jax_setup.set_up_jax()
    from cascaded_diffusion.evaluation.cas import cas_record
    from cascaded_diffusion.evaluation.features.classifier_extractor import LabelledImages
    from cascaded_diffusion.runtime.mesh import build_mesh

    splits = real_splits(folder, config, data_path=fv.data_path)
    mesh = build_mesh(evaluation_mesh(config, jax.device_count()))
    network = fv.network or ("resnet50" if stage.resolution >= _LARGE else "resnet")
    with folder.writer_lock("eval"):
        record: Mapping[str, Any] = cas_record(
            LabelledImages(stored.images, labels.astype("int32")),
            splits["train"].whole(stage.resolution),
            splits["val"].whole(stage.resolution),
            num_classes=stage.num_classes,
            network=network,
            epochs=fv.epochs,
            seed=config.eval.seed,
            flip=config.data.random_flip,
            mesh=mesh,
        )
        record = {
            **record,
            "samples": fv.samples,
            "samples_digest": stored.digest(),
            "data": f"{config.data.name}:{config.data.train_split}:{config.data.eval_split}",
        }
        append_line(folder.cas_path, record)
    print(json.dumps(record), flush=True)
    return 0
