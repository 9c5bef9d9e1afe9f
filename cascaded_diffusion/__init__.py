"""Cascaded diffusion models (Ho et al., 2021) in JAX.

The public names, loaded when they are first used: importing the package is quick
and touches no device.
"""

import sys

if sys.argv[:1] == ["-m"] and any("cascaded_diffusion." in arg for arg in sys.orig_argv):
    # `python -m cascaded_diffusion.main` begins here. Ctrl-C is answered from now on.
    from cascaded_diffusion.commands.interrupts import INTERRUPTS

    INTERRUPTS.install()

import importlib
from typing import Any

_PUBLIC = {
    "CascadeConfig": "config.schema",
    "Conditioning": "types",
    "Evaluation": "evaluation.evaluator",
    "Prediction": "types",
    "RunConfig": "config.schema",
    "RunFolder": "runtime.run_folder",
    "Sampler": "cascade.sampler",
    "Stage": "cascade.stage",
    "TrainedCascade": "library.trained_cascade",
    "UserError": "errors",
    "build_stage": "cascade.build",
    "final_numbers": "evaluation.jobs",
    "load_cascade": "library.trained_cascade",
    "load_config": "library.configs",
    "measure_files": "evaluation.file_scores",
    "prepare_splits": "data.write_prepared",
    "sample_chain": "cascade.sampler",
    "score_checkpoints": "evaluation.jobs",
    "sweep_settings": "evaluation.jobs",
    "train": "library.train_arrays",
}
# What only the binaries call, likewise loaded when it is first used.
_FOR_BINARIES = {
    "bits_per_dim": "evaluation.jobs",
    "classification_accuracy": "evaluation.cas",
    "load_inception": "evaluation.features.inception_extractor",
    "measure_samples": "evaluation.jobs",
    "sample_cascade": "evaluation.samples.cascade_samples",
    "write_file_reference": "evaluation.file_scores",
    "write_references": "evaluation.jobs",
}
_HOMES = {**_PUBLIC, **_FOR_BINARIES}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
