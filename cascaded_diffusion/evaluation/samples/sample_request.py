"""A request for samples: the stages, images, labels and number of samples."""

import dataclasses
import hashlib
import tokenize
from collections.abc import Mapping, Sequence

import numpy as np

from cascaded_diffusion.config.schema import CascadeConfig, RunConfig, StageConfig, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, check_labels
from cascaded_diffusion.evaluation.settings import chain_of
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.paths import check_local_path
from cascaded_diffusion.runtime.run_data import trained_classes
from cascaded_diffusion.runtime.run_folder import RunFolder

_NESTED = (SyntaxError, tokenize.TokenError, MemoryError, RecursionError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The samples to make."""

    workdir: str  # the folder of the runs, or the run, for messages
    config: CascadeConfig  # with the number of samples
    folders: Sequence[RunFolder]  # the runs of the stages to run, in order
    stages: Sequence[StageConfig]  # these stages
    first: int  # the place in the cascade of the first of them
    labels: np.ndarray  # int32 [m], of the samples in turn; 0 for a model without classes
    class_names: Mapping[int, str]  # of the labels that were given by name
    chosen: bool  # whether classes were chosen
    low_res: StoredImages | None  # the images to enlarge, uint8 [n, h, h, C], if `first` is not 0
    output: RunFolder
    png_paths: Sequence[str]  # files to write below `png/`, one per sample or none

    def identity(self) -> dict[str, object]:
        """All that the samples depend on besides the stages' checkpoints, for JSON."""
        identity = to_dict(self.config.cascade)
        for key in ("configs", "num_samples", "batch_size"):  # the store has the last two
            del identity[key]
        identity["labels"] = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()[:12]
        identity["low_res"] = None if self.low_res is None else self.low_res.digest(labels=False)
        return identity

    def npz_names(self) -> list[str]:
        """The files of samples that are written, one per stage that is run."""
        names = [*self.config.cascade.stages[self.first : -1], "samples"]
        return [f"{name}.npz" for name in names]

    def title(self) -> str:
        """A description for people."""
        section = self.config.cascade
        count, what = section.num_samples, "sample" if self.low_res is None else "image"
        what = f"{count} {what}{'s' * (count != 1)}"
        if self.chosen:
            found = sorted(set(self.labels[:count].tolist()))
            names = [f"{i} ({self.class_names[i]})" if i in self.class_names else i for i in found]
            what += f" of class{'es' * (len(found) > 1)} {', '.join(map(str, names[:10]))}"
            what += ", ..." * (len(found) > 10)
        sizes = [f"{stage.resolution} px" for stage in self.stages]
        mode = "truncated" if section.truncated else "non-truncated"
        if self.low_res is not None:
            what += " enlarged"
            sizes.insert(0, f"{self.stages[0].low_res_resolution} px")
            if section.truncated:
                mode = "non-truncated at the given images"
                mode += ", truncated above" * (len(self.stages) > 1)
        levels = section.aug_levels[max(0, self.first - 1) :]
        return f"{what}, {' -> '.join(sizes)}, aug_level {levels} {mode}"


def stage_as_cascade(run: RunConfig) -> dict[str, object]:
    """The config values of a cascade of one run's stage, for `cascade_config_from`.

    A super-resolution stage stands on top of one that is not known, "given", whose images are.
    """
    is_base = run.stage.kind == "base"
    section = to_dict(chain_of([run] if is_base else [run, run]))
    if not is_base:
        section["stages"][0] = section["configs"][0] = "given"
    return {"cascade": section, "mesh": {"data": -1, "fsdp": 1}}


def read_labels(
    text: str, folder: RunFolder, num_classes: int
) -> tuple[np.ndarray, dict[int, str]]:
    """The labels that `--labels` lists, int32 [m], and the names of those given by name.

    `text` is numbers or names between commas, or the path of a .txt, .npz or .npy file. The run
    in `folder` knows the names of its classes. Raises UserError if the text or file is not
    understood, or an item is no class.
    """
    is_array = text.lower().endswith((".npz", ".npy"))
    items = _array(text) if is_array else _items(text)
    names = {name: i for i, name in enumerate(trained_classes(folder) or ())}
    if not names and any(isinstance(item, str) for item in items):
        raise UserError(
            f"--labels={text}: the run in {folder.path} does not say what its classes are called;"
            " give numbers"
        )
    for item in items:
        if isinstance(item, str) and item not in names:
            known = ", ".join(list(names)[:10]) + ", ..." * (len(names) > 10)
            raise UserError(f"--labels={text}: no class is called {item!r}; there are: {known}")
        if isinstance(item, int) and not is_array and names.get(str(item), item) != item:
            raise UserError(
                f"--labels={text}: {item} may mean the class called {str(item)!r}, which is number"
                f" {names[str(item)]}, or class number {item}; give the numbers as a .npy file"
            )
    labels = np.asarray([names.get(item, item) for item in items])
    check_labels(labels, num_classes, f"--labels={text}")
    named = {names[item]: item for item in items if isinstance(item, str)}
    return labels.astype(np.int32), named


def _items(text: str) -> list[int | str]:
    if not text.lower().endswith(".txt"):
        items = text.split(",")
    else:
        try:
            items = _existing(text).read_text().rstrip().splitlines()
        except (OSError, ValueError) as e:
            raise UserError(f"--labels={text}: cannot be read as text ({e})") from e
    items = [item.strip() for item in items]
    if not items or "" in items:
        raise UserError(f"--labels={text}: expected classes, by numbers or names")
    return [_number_or_name(item) for item in items]


def _number_or_name(item: str) -> int | str:
    digits = item.removeprefix("-")
    # `int` would refuse thousands of digits; no class has that many.
    return int(item) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else item


def _existing(text: str) -> AnyPath:
    path = check_local_path(text, "--labels")
    if not path.is_file():
        raise UserError(f"--labels={text}: no such file")
    return path


def _array(text: str) -> list[int | str]:
    path = _existing(text)
    try:
        if path.suffix.lower() == ".npz":
            arrays = read_arrays(path, ("arr_0", "arr_1"))
            labels = arrays["arr_1" if "arr_1" in arrays else "arr_0"]
        else:
            # Mapped, an array that the file is too short for is an error, and takes no memory.
            labels = np.load(path, mmap_mode="r", allow_pickle=False)
    # A damaged header raises some of these, one with thousands of brackets the last ones.
    except (OSError, ValueError, EOFError, OverflowError, KeyError, TypeError, *_NESTED) as e:
        raise UserError(
            f"--labels={path}: cannot be read, expected an array of labels, in an .npz as arr_1 (or"
            f" arr_0) ({e})"
        ) from e
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        found = f"{labels.dtype} {labels.shape}"
        raise UserError(f"--labels={path}: {found}, expected a list of integers")
    return labels.tolist()
