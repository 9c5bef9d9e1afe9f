"""What `sample` is asked for: which stages, on which images, with which labels, how many."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from cascaded_diffusion.commands import config_flags, flag_checks, overrides
from cascaded_diffusion.commands.run_images import check_same_run_classes, define_data_path
from cascaded_diffusion.config.run_checks import cascade_config_from, check_chain
from cascaded_diffusion.config.schema import (
    MAX_PIXELS,
    CascadeConfig,
    RunConfig,
    StageConfig,
    to_dict,
)
from cascaded_diffusion.config.stage_checks import check_level, check_sampler
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import open_images
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.paths import check_local_path
from cascaded_diffusion.runtime.run_data import trained_classes
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder

_LABEL_FILES = (".txt", ".npz", ".npy")


@dataclasses.dataclass(frozen=True)
class LowRes:
    """Images to be enlarged.

    Attributes:
      images: uint8 [n, h, h, C].
      labels: int32 [n]; None where nothing says what they are.
      names: their files' names, one for each; None for those of an `.npz`.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...] | None

    def digest(self) -> str:
        """SHA-256 of the pixels, first 12 digits."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be sampled, checked.

    Attributes:
      config: the cascade, with the number of samples that is wanted.
      folders: the runs of the stages that are run, in order.
      run_configs: their configs.
      first: the place in the cascade of the first of them.
      labels: int32 [m], of the samples in turn; 0 where there are no classes.
      class_names: of the labels that were given by name.
      chosen: whether classes were chosen.
      low_res: what is to be enlarged, if `first` is not 0.
      output: where to write.
      data_path: where the last run's images lie now, if they were moved.
    """

    config: CascadeConfig
    folders: Sequence[RunFolder]
    run_configs: Sequence[RunConfig]
    first: int
    labels: np.ndarray
    class_names: Mapping[int, str]
    chosen: bool
    low_res: LowRes | None
    output: RunFolder
    data_path: str | None

    def identity(self) -> dict[str, object]:
        """All that the samples are a function of besides the stages' checkpoints, for JSON."""
        identity = to_dict(self.config.cascade)
        for key in ("configs", "num_samples", "batch_size"):  # the last two are the store's
            del identity[key]
        identity["labels"] = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()[:12]
        identity["low_res"] = None if self.low_res is None else self.low_res.digest()
        return identity

    def npz_names(self) -> list[str]:
        """The files of samples that are written, one per stage that is run."""
        names = [*self.config.cascade.stages[self.first : -1], "samples"]
        return [f"{name}.npz" for name in names]

    def title(self) -> str:
        """What is made, for people."""
        count, stages = self.config.cascade.num_samples, [c.stage for c in self.run_configs]
        what = "sample" if self.low_res is None else "image"
        what = f"{count} {what}{'s' * (count != 1)}"
        if self.chosen:
            found = sorted(set(self.labels[:count].tolist()))
            names = [f"{i} ({self.class_names[i]})" if i in self.class_names else i for i in found]
            what += f" of class{'es' * (len(found) > 1)} {', '.join(map(str, names[:10]))}"
            what += ", ..." * (len(found) > 10)
        sizes = [f"{stage.resolution} px" for stage in stages]
        if self.low_res is not None:
            what += " enlarged"
            sizes.insert(0, f"{stages[0].low_res_resolution} px")
        section = self.config.cascade
        mode = "truncated" if section.truncated else "non-truncated"
        if self.low_res is not None and section.truncated:
            mode = "non-truncated at the given images"
            mode += ", truncated above" * (len(stages) > 1)
        levels = section.aug_levels[max(0, self.first - 1) :]
        return f"{what}, {' -> '.join(sizes)}, aug_level {levels} {mode}"


def define_inputs(flag_values: flags.FlagValues) -> None:
    """Adds the flags that `read_request` reads."""
    for name, text in (
        ("workdir", "folder that holds the stages' runs; or one run"),
        ("output", "where to write; default: WORKDIR/samples, chosen_classes or enlarged"),
        (
            "low_res",
            "enlarge these: a folder of images, an image, or an .npz (arr_0 uint8 NHWC, arr_1"
            " labels)",
        ),
        (
            "labels",
            "classes of the samples, in turn: numbers or names, as 3,7; or a file of them: .txt"
            " (one per line), .npz, .npy",
        ),
    ):
        flags.DEFINE_string(name, None, text, flag_values=flag_values)
    define_data_path(flag_values)
    flags.DEFINE_integer(
        "per_class",
        None,
        "so many samples of each class, or of each of --labels",
        lower_bound=1,
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "resize_low_res",
        None,
        "cut out the centre square of each image of --low_res and shrink it to so many pixels",
        lower_bound=1,
        flag_values=flag_values,
    )


def read_request(fv: flags.FlagValues, argv: Sequence[str]) -> Request:
    """Reads and checks all that the command line says. Writes nothing.

    Raises:
      UserError: something does not go together, or is not there.
    """
    flag_checks.check_paths(fv, "workdir", "output", "low_res", "data_path")
    enlarging = fv.low_res is not None
    if enlarging and fv.per_class is not None:
        raise UserError(
            f"--per_class={fv.per_class}: expected none with --low_res, of which every image is"
            " enlarged once"
        )
    if fv.resize_low_res is not None and not enlarging:
        raise UserError(f"--resize_low_res={fv.resize_low_res}: --low_res is missing")
    _refuse_number(argv, "low_res" if enlarging else "per_class" if fv.per_class else None)
    config, folders = _cascade(fv, argv)
    section = config.cascade
    configs = [None if folder is None else folder.read_config() for folder in folders]
    if None not in configs:
        check_chain(section, [c.stage for c in configs])
    last = configs[-1]
    first, low_res = 0, None
    if enlarging:
        low_res = _read_low_res(fv, [c.stage for c in configs if c is not None], last)
        size = low_res.images.shape[1]
        first = next(
            i for i, c in enumerate(configs) if c is not None and c.stage.low_res_resolution == size
        )
    for folder in folders[first:]:
        folder.chosen()
    check_same_run_classes(folders[first:])
    labels, class_names = _labels(fv, folders[-1], last, low_res)
    count = section.num_samples
    if low_res is not None:
        count = len(low_res.images)
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
    request = Request(
        config=dataclasses.replace(config, cascade=dataclasses.replace(section, num_samples=count)),
        folders=folders[first:],
        run_configs=configs[first:],
        first=first,
        labels=labels,
        class_names=class_names,
        chosen=chosen,
        low_res=low_res,
        output=RunFolder(fv.output or pathlib.Path(fv.workdir, name), flag="output"),
        data_path=fv.data_path,
    )
    if enlarging:
        _check_apart(pathlib.Path(fv.low_res), request)
    return request


def _check_apart(low_res: pathlib.Path, request: Request) -> None:
    """Raises UserError if what is given would be overwritten, or grow by what is made of it."""
    given, output = low_res.resolve(), request.output.path.resolve()
    written = [output / name for name in request.npz_names()]
    if given in written or (given.is_dir() and output.is_relative_to(given)):
        raise UserError(
            f"--output={request.output.path}: the images of --low_res={low_res} are there; choose"
            " another folder"
        )


def _refuse_number(argv: Sequence[str], flag: str | None) -> None:
    for arg in overrides.overrides_in(argv):
        if flag is not None and "cascade.num_samples" in arg:
            raise UserError(f"{arg}: expected none with --{flag}, which says how many")


def _cascade(
    fv: flags.FlagValues, argv: Sequence[str]
) -> tuple[CascadeConfig, list[RunFolder | None]]:
    """The cascade and its stages' runs; None for a stage whose run is not known."""
    alone = RunFolder(fv.workdir)
    if fv["config"].value is not None or not alone.exists():
        runs = CascadeFolder(fv.workdir)
        config = config_flags.cascade_config(fv, argv, runs)
        return config, list(runs.stage_folders(config.cascade))
    run = alone.read_config()
    stage, settings = run.stage, run.eval
    is_base = stage.kind == "base"
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
    # A cascade of this stage, on top of one that is not known.
    below = [] if is_base else ["given"]
    num_stages = len(below) + 1
    values = {
        "cascade": {
            "stages": [*below, stage.name],
            "configs": [*below, stage.name],
            "aug_levels": [settings.aug_level] * len(below),
            "truncated": False,
            "samplers": [to_dict(stage.sampler)] * num_stages,
            "num_samples": settings.num_samples,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
        },
        "mesh": {"data": -1, "fsdp": 1},
    }
    config = cascade_config_from(overrides.with_overrides(values, argv))
    section = config.cascade
    check_sampler(f"cascade.samplers[{num_stages - 1}]", section.samplers[-1], stage)
    if not is_base:
        check_level("cascade.aug_levels[0]", section.aug_levels[0], stage)
    return config, [*(None for _ in below), alone]


def _read_low_res(fv: flags.FlagValues, stages: Sequence[StageConfig], last: RunConfig) -> LowRes:
    from cascaded_diffusion.data.given_images import fitted, read_given_images

    path, resize_to, channels = fv.low_res, fv.resize_low_res, last.stage.channels
    sizes = [s.low_res_resolution for s in stages if s.low_res_resolution is not None]
    if not sizes:
        raise UserError(
            f"--low_res={path}: the cascade is a base model alone, which enlarges nothing"
        )
    if resize_to is not None and resize_to not in sizes:
        raise UserError(
            f"--resize_low_res={resize_to}: expected {' or '.join(map(str, sizes))}, the sizes that"
            " the cascade enlarges"
        )
    if channels not in (1, 3):
        raise UserError(
            f"--low_res={path}: the model's images have {channels} channels, not 1 or 3"
        )
    if path.endswith(".npz"):
        stored = open_images(path, flag="low_res", at_least=1)
        if stored.images.shape[-1] != channels:
            raise UserError(
                f"--low_res={path}: arr_0 is {tuple(stored.images.shape)}, expected {channels}"
                f" channel{'s' * (channels != 1)}"
            )
        images = [
            fitted(x, sizes=sizes, resize_to=resize_to, name=f"image {i}", flag=f"--low_res={path}")
            for i, x in enumerate(stored.images)
        ]
        return LowRes(np.stack(images), stored.labels, None)
    given = read_given_images(
        path,
        channels=channels,
        sizes=sizes,
        resize_to=resize_to,
        max_pixels=last.data.max_pixels or MAX_PIXELS,
        flag="low_res",
    )
    rest = f" ({given.passed_over})" if given.passed_over else ""
    for note in (f"low_res: {len(given.images)} images{rest}", *given.notes):
        print(note, file=sys.stderr, flush=True)
    return LowRes(given.images, None, given.names)


def _labels(
    fv: flags.FlagValues, folder: RunFolder, run: RunConfig, low_res: LowRes | None
) -> tuple[np.ndarray, dict[int, str]]:
    """The labels, in turn, and the names of those that were given by name."""
    num_classes = run.stage.num_classes
    if not num_classes:
        for name in ("labels", "per_class"):
            if fv[name].value is not None:
                raise UserError(
                    f"--{name}={fv[name].value}: {run.stage.name!r} was trained without classes"
                )
        return np.zeros(1, np.int32), {}
    if fv.labels is not None:
        items = _label_items(fv.labels)
        names = dict[str, int]()
        if any(isinstance(item, str) for item in items):
            names = {name: i for i, name in enumerate(_class_names(fv.labels, folder))}
        labels, named = [], {}
        for item in items:
            if isinstance(item, str):
                if item not in names:
                    known = ", ".join(list(names)[:10]) + ", ..." * (len(names) > 10)
                    raise UserError(
                        f"--labels={fv.labels}: no class is called {item!r}; there are: {known}"
                    )
                named[names[item]] = item
            labels.append(names[item] if isinstance(item, str) else item)
        return _in_range(np.asarray(labels), num_classes, f"--labels={fv.labels}"), named
    if low_res is None:
        return np.arange(num_classes, dtype=np.int32), {}
    if low_res.labels is None:
        raise UserError(
            f"--low_res={fv.low_res}: {run.stage.name!r} was trained with {num_classes} classes and"
            " the images have no labels; give theirs by --labels (numbers, names, or a file with"
            " one for each image)"
        )
    return _in_range(low_res.labels, num_classes, f"--low_res={fv.low_res}: arr_1"), {}


def _in_range(labels: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        raise UserError(f"{name}: label {bad[0]} is out of range, expected 0 to {num_classes - 1}")
    return labels.astype(np.int32)


def _label_items(text: str) -> list[int | str]:
    """What `--labels` lists: numbers, and names of classes."""
    if not text.lower().endswith(_LABEL_FILES):
        items = text.split(",")
    else:
        path = check_local_path(text, "--labels")
        if not path.is_file():
            raise UserError(f"--labels={text}: no such file")
        if path.suffix.lower() != ".txt":
            return _array_of_labels(path)
        try:
            items = path.read_text().splitlines()
        except (OSError, ValueError) as e:
            raise UserError(f"--labels={text}: cannot be read as text ({e})") from e
        while items and not items[-1].strip():
            items.pop()
    items = [item.strip() for item in items]
    if not items or "" in items:
        raise UserError(f"--labels={text}: expected classes, by numbers or names")
    return [_number_or_name(item) for item in items]


def _number_or_name(item: str) -> int | str:
    digits = item.removeprefix("-")
    # More digits than any class has would be refused by `int`.
    return int(item) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else item


def _array_of_labels(path: pathlib.Path) -> list[int | str]:
    try:
        if path.suffix.lower() == ".npz":
            arrays = read_arrays(path, ("arr_0", "arr_1"))
            labels = arrays["arr_1" if "arr_1" in arrays else "arr_0"]
        else:
            # Mapped, an array that the file is too short for is an error, and no memory.
            labels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError, KeyError) as e:
        raise UserError(
            f"--labels={path}: cannot be read, expected an array of labels, in an .npz as arr_1 (or"
            f" arr_0) ({e})"
        ) from e
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        raise UserError(
            f"--labels={path}: {labels.dtype} {labels.shape}, expected a list of integers"
        )
    return labels.tolist()


def _class_names(labels: str, folder: RunFolder) -> Sequence[str]:
    """The names of a run's classes, in order of label."""
    names = trained_classes(folder)
    if not names:
        raise UserError(
            f"--labels={labels}: the run in {folder.path} does not say what its classes are called;"
            " give numbers"
        )
    return names
