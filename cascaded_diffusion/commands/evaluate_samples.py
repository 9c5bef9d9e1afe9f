"""The modes of `evaluate` that measure stored samples, and what they share with the others."""

import contextlib
import json
import sys
from collections.abc import Mapping

from absl import flags

import cascaded_diffusion as library
from cascaded_diffusion.commands import jax_setup
from cascaded_diffusion.commands.cluster_flags import join_cluster
from cascaded_diffusion.commands.flag_checks import require
from cascaded_diffusion.commands.inception_flags import inception_loader
from cascaded_diffusion.commands.run_images import real_splits
from cascaded_diffusion.config.run_checks import check_sample_count
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import (
    StoredImages,
    load_samples,
    open_images,
)
from cascaded_diffusion.runtime.run_folder import RunFolder


def open_evaluation(
    fv: flags.FlagValues, folder: RunFolder, config: RunConfig, num_samples: int
) -> "library.Evaluation":  # importing it imports JAX
    """Checks the number of samples, sets up JAX and opens what a run is evaluated with."""
    check_sample_count(num_samples, config.eval.features, allow_few=fv.allow_few_samples)
    jax_setup.set_up_jax(join_cluster(fv, config, "workdir"))
    splits = real_splits(folder, config, data_path=fv.data_path)
    return library.Evaluation(splits, fv.allow_few_samples, inception_loader(fv))


def print_record(record: Mapping[str, object]) -> int:
    """Prints a record as one JSON line. Returns the exit code."""
    print(json.dumps(record), flush=True)
    return 0


def _count(fv: flags.FlagValues, samples: StoredImages) -> int:
    """The number of samples that are to be measured."""
    count = samples.count(fv.num_samples)
    if count < len(samples):
        print(f"samples: the first {count} are measured", file=sys.stderr, flush=True)
    return count


def samples_mode(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    """Stored samples, measured as a run's own are. Returns the exit code."""
    require(fv, "samples")
    samples = load_samples(fv.samples, config.stage)
    count = _count(fv, samples)
    evaluation = open_evaluation(fv, folder, config, count)
    return print_record(library.measure_samples(folder, evaluation, samples, num_samples=count))


def files_mode(fv: flags.FlagValues) -> int:
    """Stored samples against --reference, without a run. Returns the exit code.

    On stdout there is one JSON line; progress and notes go to stderr.
    """
    with contextlib.redirect_stdout(sys.stderr):
        require(fv, "samples", "reference")
        samples = open_images(fv.samples, flag="samples")
        count = _count(fv, samples)
        check_sample_count(count, "inception", allow_few=fv.allow_few_samples)
        jax_setup.set_up_jax()
        record = library.measure_files(
            samples,
            fv.reference,
            num_samples=count,
            resize=fv.resize,
            allow_few_samples=fv.allow_few_samples,
            inception=inception_loader(fv),
        )
    return print_record(record)


def cas_mode(fv: flags.FlagValues, folder: RunFolder, config: RunConfig) -> int:
    """The classification accuracy score of stored samples. Returns the exit code."""
    require(fv, "samples")
    if config.stage.num_classes < 2:
        raise UserError(f"`evaluate cas`: {config.stage.name!r} has no classes to tell apart")
    samples = load_samples(fv.samples, config.stage)
    jax_setup.set_up_jax()
    splits = real_splits(folder, config, data_path=fv.data_path)
    settings = dict(network=fv.network, epochs=fv.epochs)
    return print_record(library.classification_accuracy(folder, splits, samples, **settings))
