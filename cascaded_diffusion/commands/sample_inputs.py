"""The flags of `sample`, and the request that they make up."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import flags

from cascaded_diffusion.commands import run_images
from cascaded_diffusion.commands.config_flags import cascade_config
from cascaded_diffusion.commands.flag_checks import check_paths
from cascaded_diffusion.commands.low_res_images import read_low_res
from cascaded_diffusion.commands.overrides import overrides_in, with_overrides
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain
from cascaded_diffusion.config.schema import CascadeConfig, RunConfig
from cascaded_diffusion.config.stage_checks import check_level, check_sampler
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.sample_request import (
    SampleRequest,
    read_labels,
    stage_as_cascade,
)
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, check_labels
from cascaded_diffusion.files.bucket import BucketPath, path_of
from cascaded_diffusion.files.paths import check_local_path
from cascaded_diffusion.files.whole import files_below
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder


def define_inputs(fv: flags.FlagValues) -> None:
    """Adds the flags that `read_request` reads."""
    texts = {
        "workdir": "folder that holds the stages' runs; or one run",
        "output": "where to write; default: WORKDIR/samples, chosen_classes or enlarged",
        "low_res": "enlarge these: a folder of images, an image, or an .npz (arr_0 uint8 NHWC,"
        " arr_1 labels)",
        "labels": "classes of the samples, in turn: numbers or names, as 3,7; or a file of them:"
        " .txt (one per line), .npz, .npy",
    }
    for name, text in texts.items():
        flags.DEFINE_string(name, None, text, flag_values=fv)
    numbers = {
        "per_class": "so many samples of each class, or of each of --labels",
        "resize_low_res": "cut out the centre square of each image of --low_res and shrink it to so"
        " many pixels",
    }
    for name, text in numbers.items():
        flags.DEFINE_integer(name, None, text, lower_bound=1, flag_values=fv)
    png = "write every image as a PNG file too, below OUTPUT/png"
    flags.DEFINE_bool("png", False, png, flag_values=fv)
    run_images.define_data_path(fv)


def read_request(fv: flags.FlagValues, argv: Sequence[str]) -> SampleRequest:
    """Reads and checks everything that the command line says. Writes nothing.

    Raises UserError if flags do not go together, or something is missing.
    """
    check_paths(fv, "workdir", "output", "data_path")
    if fv.low_res is not None:
        check_local_path(fv.low_res, "--low_res")
    enlarging = fv.low_res is not None
    if enlarging and fv.per_class is not None:
        raise UserError(
            f"--per_class={fv.per_class}: expected none with --low_res, of which every image is"
            " enlarged once"
        )
    if fv.resize_low_res is not None and not enlarging:
        raise UserError(f"--resize_low_res={fv.resize_low_res}: --low_res is missing")
    counted_by = "low_res" if enlarging else "per_class" if fv.per_class else None
    for arg in overrides_in(argv):
        if counted_by is not None and "cascade.num_samples" in arg:
            raise UserError(f"{arg}: expected none with --{counted_by}, which says how many")
    config, folders = _cascade(fv, argv)
    section = config.cascade
    configs = [None if folder is None else folder.read_config() for folder in folders]
    if None not in configs:
        check_chain(section, [c.stage for c in configs])
    count, first, low_res, png_names = section.num_samples, 0, None, None
    if enlarging:
        sizes = [None if c is None else c.stage.low_res_resolution for c in configs]
        low_res, png_names = read_low_res(fv, [s for s in sizes if s is not None], configs[-1])
        first, count = sizes.index(low_res.images.shape[1]), len(low_res.images)
    for folder in folders[first:]:
        folder.chosen()
    run_images.check_same_run_classes(folders[first:])
    labels, class_names = _labels(fv, folders[-1], configs[-1], low_res)
    if fv.per_class is not None:
        labels = np.asarray(list(dict.fromkeys(labels.tolist())), np.int32)
        count = fv.per_class * len(labels)
    if fv.labels is not None and len(labels) > count:
        more = "" if enlarging else "; raise --config.cascade.num_samples"
        raise UserError(
            f"--labels={fv.labels}: {len(labels)} labels for {count}"
            f" {'images' if enlarging else 'samples'}, expected at most as many{more}"
        )
    chosen = fv.labels is not None or fv.per_class is not None
    name = "enlarged" if enlarging else "chosen_classes" if chosen else "samples"
    request = SampleRequest(
        workdir=fv.workdir,
        config=dataclasses.replace(config, cascade=dataclasses.replace(section, num_samples=count)),
        folders=folders[first:],
        stages=[c.stage for c in configs[first:]],
        first=first,
        labels=labels,
        class_names=class_names,
        chosen=chosen,
        low_res=low_res,
        output=RunFolder(fv.output or path_of(fv.workdir) / name, flag="output"),
        png_paths=(png_names or [f"{i:06d}.png" for i in range(count)]) if fv.png else [],
    )
    _check_output(request)
    return request


def _check_output(request: SampleRequest) -> None:
    """Raises UserError if the output cannot be written, or images that are there are in its way."""
    output = request.output.path
    if request.low_res is not None:
        given = path_of(request.low_res.path).resolve()
        written = [output.resolve() / name for name in request.npz_names()]
        inside = given.is_dir() and output.resolve().is_relative_to(given)
        pictures = request.png_paths and given.is_relative_to(output.resolve() / "png")
        if given in written or inside or pictures:
            raise UserError(
                f"--output={output}: the images of --low_res={request.low_res.path} are there;"
                " choose another folder"
            )
    request.output.check_writable()
    folder = output / "png"
    found = set(files_below(folder))
    # The same files are those of the same command, run again.
    # In a bucket some of them may be missing, since they appear one by one.
    wanted = set(request.png_paths)
    partly = isinstance(output, BucketPath)
    if found - wanted or (found and found != wanted and not partly):
        raise UserError(
            f"--output={output}: {folder} has the images of other samples; move it, or choose"
            " another --output"
        )


def _cascade(
    fv: flags.FlagValues, argv: Sequence[str]
) -> tuple[CascadeConfig, list[RunFolder | None]]:
    """The cascade and its stages' runs; None for a stage whose run is not known."""
    alone = RunFolder(fv.workdir)
    if fv["config"].value is not None or not alone.exists():
        runs = CascadeFolder(fv.workdir)
        config = cascade_config(fv, argv, runs)
        return config, list(runs.stage_folders(config.cascade))
    run = alone.read_config()
    stage, is_base = run.stage, run.stage.kind == "base"
    if is_base and fv.low_res is not None:
        raise UserError(
            f"--low_res={fv.low_res}: {stage.name!r} in {fv.workdir} is a base model, expected a"
            " super-resolution stage's run, or a folder of a cascade's runs with --config"
        )
    if not is_base and fv.low_res is None:
        raise UserError(
            f"--workdir={fv.workdir}: {stage.name!r} there enlarges images: give them by --low_res,"
            " or the folder of a cascade's runs"
        )
    config = cascade_config_from(with_overrides(stage_as_cascade(run), argv))
    section = config.cascade
    check_sampler(f"cascade.samplers[{len(section.stages) - 1}]", section.samplers[-1], stage)
    if is_base:
        return config, [alone]
    check_level("cascade.aug_levels[0]", section.aug_levels[0], stage)
    return config, [None, alone]


def _labels(
    fv: flags.FlagValues, folder: RunFolder, run: RunConfig, low_res: StoredImages | None
) -> tuple[np.ndarray, dict[int, str]]:
    """The labels, in turn, and the names of those that were given by name."""
    num_classes = run.stage.num_classes
    if not num_classes:
        for name in ("labels", "per_class"):
            if (given := fv[name].value) is not None:
                raise UserError(f"--{name}={given}: {run.stage.name!r} was trained without classes")
        return np.zeros(1, np.int32), {}
    if fv.labels is not None:
        return read_labels(fv.labels, folder, num_classes)
    if low_res is None:
        return np.arange(num_classes, dtype=np.int32), {}
    if low_res.labels is None:
        raise UserError(
            f"--low_res={fv.low_res}: {run.stage.name!r} was trained with {num_classes} classes and"
            " the images have no labels; give theirs by --labels (numbers, names, or a file with"
            " one for each image)"
        )
    check_labels(low_res.labels, num_classes, f"--low_res={fv.low_res}: arr_1")
    return low_res.labels.astype(np.int32), {}
