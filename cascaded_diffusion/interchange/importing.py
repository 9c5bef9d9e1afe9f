"""Makes a run folder of weights that were trained elsewhere."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import RunConfig, StageConfig, ema_name
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record, write_json
from cascaded_diffusion.files.locks import held_lock
from cascaded_diffusion.files.whole import sha256_of
from cascaded_diffusion.interchange.names import (
    Family,
    Translated,
    number_of_parameters,
    translations,
)
from cascaded_diffusion.interchange.published import Published, looks_like
from cascaded_diffusion.interchange.weights_files import (
    OWN_KINDS,
    kind_of,
    read_weights,
    with_usual_names,
)
from cascaded_diffusion.networks.classifier import flatten_params, unflatten_params
from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
from cascaded_diffusion.runtime.run_folder import IMPORTED, RunFolder
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.types import Params

_FLAG = "FILE"
_FILE_BYTES = 1 << 22  # of a checkpoint's files; with larger ones a save holds more in memory
_SHOWN, _MAX_NAME = 5, 100  # names of tensors in an error, and characters of one
_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Inputs of a stage that no published network has. Their last layer begins at zero, so that the
# network computes what it did; the first one does not, or neither would ever learn.
_ZERO_AT_FIRST = "aug_level/Dense_1/"


def params_from(
    tensors: Mapping[str, np.ndarray], family: Family, stage: StageConfig
) -> dict[str, np.ndarray]:
    """A stage's parameters by path, float32, from tensors by their names.

    Parameters that the family does not have are left out: those of `aug_level`, and the row of
    the "dropped" label, which is zero.

    Raises UserError, which names the first tensors that are missing, superfluous or of another
    shape, or have values that are not finite.
    """
    shapes = build_stage(stage).shapes()[0]
    wanted = [_with_known_rows(t, stage, tensors) for t in translations(family, stage, shapes)]
    _check_names(tensors, wanted, stage)
    params = {}
    for translated in wanted:
        theirs = [tensors[name] for name in translated.names]
        for name, x in zip(translated.names, theirs, strict=True):
            if tuple(x.shape) != translated.their_shape:
                raise UserError(
                    f"tensor {name} is {tuple(x.shape)}, expected {translated.their_shape} for"
                    f" stage {stage.name!r}{_meant(tensors)}"
                )
            if str(x.dtype) not in _DTYPES:
                expected = ", ".join(_DTYPES)
                raise UserError(f"tensor {name} is of {x.dtype}, expected one of {expected}")
            with np.errstate(over="ignore"):
                finite = np.isfinite(x.astype(np.float32, copy=False)).all()
            if not finite:
                raise UserError(f"tensor {name} has values that are not finite")
        params[translated.path] = translated.to_ours(theirs)
    if stage.num_classes and len(params["label/embedding"]) < shapes["label"]["embedding"].shape[0]:
        table = params["label/embedding"]
        params["label/embedding"] = np.concatenate([table, np.zeros_like(table[:1])])
    return params


def _with_known_rows(
    translated: Translated, stage: StageConfig, tensors: Mapping[str, np.ndarray]
) -> Translated:
    """The classes alone, unless the table there has a row for the "dropped" label as ours does."""
    if translated.path != "label/embedding":
        return translated
    rows, size = translated.shape
    found = tensors.get(translated.names[0])
    if found is None or found.shape[:1] != (rows,):
        rows = stage.num_classes
    return dataclasses.replace(translated, shape=(rows, size))


def _check_names(
    tensors: Mapping[str, np.ndarray], wanted: Sequence[Translated], stage: StageConfig
) -> None:
    names = [name for translated in wanted for name in translated.names]
    missing = [name for name in names if name not in tensors]
    surplus = sorted(tensors.keys() - set(names))
    kind = kind_of(tensors)
    if len(missing) > len(names) / 2 and kind not in OWN_KINDS:
        raise UserError(f"it is {kind}, not the U-Net of stage {stage.name!r}")
    problems = [
        f"{len(found)} tensors {what}: {', '.join(x[:_MAX_NAME] for x in found[:_SHOWN])}"
        + (" ..." if len(found) > _SHOWN else "")
        for found, what in ((missing, "are missing"), (surplus, "have no place"))
        if found
    ]
    if problems:
        raise UserError(f"{'; '.join(problems)}, in stage {stage.name!r}{_meant(tensors)}")


def _meant(tensors: Mapping[str, np.ndarray]) -> str:
    flags = looks_like(number_of_parameters(dict(tensors)))
    return "" if flags is None else f"; it has as many parameters as {flags}"


def import_weights(
    path: str | os.PathLike[str],
    config: RunConfig,
    family: Family,
    folder: RunFolder,
    *,
    published: Published | None = None,
) -> Record:
    """Writes a run folder whose step 0 has the weights of a file, and returns what it says of them.

    The run can be sampled, evaluated and trained further like any other: its parameters and all
    its averages are the weights, and its first checkpoint is chosen as the best. The folder
    appears whole or not at all.

    Args:
      path: a `.pt` file of tensors, a `.safetensors`, or a folder of diffusers.
      config: the run's. Its stage's network is what the weights are of; if it has conditioning
        augmentation by noise, the input of its level begins without any effect.
      family: how the tensors are named and laid out.
      folder: of the run; it must not exist.
      published: what the file should be; another digest is recorded and said.

    Raises UserError if a run is there, or the file is no such network's.
    """
    path = pathlib.Path(path)
    target = folder.path.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--workdir={folder.path}: there is something already; name a new folder")
    tensors = with_usual_names(read_weights(path, _FLAG))
    try:
        params = params_from(tensors, family, config.stage)
    except UserError as e:
        raise UserError(f"{_FLAG}={path}: {e}") from e
    about = {
        "file": path.name,
        "source": family.name,
        "parameters": number_of_parameters(tensors),
        "dtypes": sorted({str(x.dtype) for x in tensors.values()}),
    }
    if path.is_file():
        about["sha256"] = sha256_of(path)
    if published is not None:
        about["published"] = published.url
        about["as_published"] = None if published.sha256 is None else _same(published, about)
    _write_run(folder, target, config, params, about)
    return about


def _same(published: Published, about: Record) -> bool:
    return published.sha256 == about.get("sha256")


def _remove_unfinished(target: pathlib.Path) -> None:
    """Removes what killed imports have left; one that is alive holds its folder."""
    for left in target.parent.glob(f".{target.name}.importing.*"):
        with contextlib.suppress(UserError), held_lock(left, "train", "workdir"):
            shutil.rmtree(left, ignore_errors=True)


def _write_run(
    folder: RunFolder,
    target: pathlib.Path,
    config: RunConfig,
    params: Mapping[str, np.ndarray],
    about: Record,
) -> None:
    _remove_unfinished(target)
    unfinished = target.with_name(f".{target.name}.importing.{os.getpid()}")
    made = RunFolder(unfinished)
    made.check_writable()
    with made.writer_lock("train"):
        made.write_config(config)
        checkpoints = CheckpointWriter(made, config.checkpoint, file_bytes=_FILE_BYTES)
        try:
            checkpoints.save(0, _state(config, params))
            checkpoints.wait(0)
        finally:
            checkpoints.close()
        write_json(made.path / "imported.json", about)
        chosen = {"step": 0, "ema_decay": config.eval.ema_decays[0], "metric": IMPORTED}
        write_json(made.best_path, {**chosen, "value": None})
    try:
        os.replace(unfinished, target)  # also where an empty folder is
    except OSError as e:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"--workdir={folder.path}: something has appeared there meanwhile ({e.strerror}); name"
            " a new folder"
        ) from e


class _Uncopied(np.ndarray):
    """An array that a save need not copy, since nothing changes it: Orbax copies all others."""

    def __deepcopy__(self, memo: object) -> "_Uncopied":
        return self


def _state(config: RunConfig, given: Mapping[str, np.ndarray]) -> step_lib.TrainState:
    """A first state with these parameters, and those that no file has as they begin."""
    stage = build_stage(config.stage)
    shapes = step_lib.state_shapes(stage, config.train)
    flat = flatten_params(shapes.params)
    new = flat.keys() - given.keys()
    params = dict(given)
    params_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    if new:
        fresh = flatten_params(jax.device_get(_only(stage.init(params_key), new)))
        params.update(
            {k: np.zeros_like(v) if k.startswith(_ZERO_AT_FIRST) else v for k, v in fresh.items()}
        )
    tree = unflatten_params({path: params[path].view(_Uncopied) for path in flat})
    return step_lib.TrainState(
        step=np.zeros((), np.int32),
        params=tree,
        ema_params={ema_name(d): tree for d in config.train.ema_decays},
        # Before the first step, Adam's moments and its count are zero.
        opt_state=jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype).view(_Uncopied), shapes.opt_state
        ),
        key=run_key,
    )


def _only(params: Params, paths: set[str]) -> Params:
    return unflatten_params({k: v for k, v in flatten_params(params).items() if k in paths})
