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

_HOMES = {
    "Batch": "types",
    "Cascade": "cascade.cascade",
    "CascadeConfig": "config.schema",
    "Conditioning": "types",
    "Evaluation": "evaluation.evaluator",
    "FeatureExtractor": "evaluation.features.extractor",
    "FeatureStatistics": "evaluation.metrics.frechet",
    "Features": "evaluation.features.extractor",
    "Measurement": "evaluation.measure",
    "Prediction": "types",
    "RunConfig": "config.schema",
    "RunFolder": "runtime.run_folder",
    "Stage": "cascade.stage",
    "UserError": "errors",
    "bits_per_dim": "evaluation.jobs",
    "build_stage": "cascade.build",
    "cascade_config_from": "config.run_checks",
    "classification_accuracy": "evaluation.cas",
    "final_numbers": "evaluation.jobs",
    "frechet_distance": "evaluation.metrics.frechet",
    "load_inception": "evaluation.features.inception_extractor",
    "load_splits": "data.sources",
    "measure_files": "evaluation.file_scores",
    "measure_reference": "evaluation.reference",
    "measure_samples": "evaluation.jobs",
    "prepare_splits": "data.write_prepared",
    "run_config_from": "config.run_checks",
    "sample_cascade": "evaluation.samples.cascade_samples",
    "score_checkpoints": "evaluation.jobs",
    "sweep_settings": "evaluation.jobs",
    "verify_splits": "data.write_prepared",
    "write_file_reference": "evaluation.file_scores",
    "write_references": "evaluation.jobs",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
