"""RUN/data.json: which images a run is trained on, so that it resumes with the same ones."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

from cascaded_diffusion.config.class_names import class_difference
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_json, read_record, write_json
from cascaded_diffusion.runtime.run_folder import RunFolder

_SAME_IMAGES = "bring those images back, or choose another --workdir"


class SplitFacts(Protocol):
    """The facts that identify a split of a data set; `data.records.Source` has them."""

    identity: str  # what the images are, wherever they lie
    # A digest of the files' times of modification; "" where `identity` has the contents.
    times: str
    class_names: tuple[str, ...]  # in order of label

    def content_sample(self) -> str:
        """A digest of the contents of some images; "" where `identity` has the contents."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The images that a run is trained on, or is to be scored against."""

    splits: Mapping[str, SplitFacts]
    path: str | None = None  # absolute; None for data that has none
    path_as_given: str | None = None  # the same as the user wrote it
    given_anew: bool = False  # the user has named the path of images that were moved or touched


def check_run_data(folder: RunFolder, data: RunData, *, say: Callable[[str], None] = print) -> None:
    """Raises UserError unless images are those that the run began with.

    Class names are compared, and for each split the identity (names and sizes of the files) and
    the times of modification. If the images have moved or are given anew, times may differ; the
    contents of up to 256 images are compared instead, and `say` is told.
    """
    if not folder.data_path.exists():
        return
    stored = read_record(
        folder.data_path,
        {"splits": dict, "class_names": list},
        otherwise="of another version of this program",
        remedy="remove it to resume without comparing the images",
    )
    run, where = f"the run in {folder.path}", data.path or "FOLDER"
    moved = data.given_anew or stored.get("path") != data.path
    names = tuple(stored["class_names"])
    for split, now in data.splits.items():
        before = stored["splits"].get(split)
        if differ := class_difference(run, names, f"split {split!r}", now.class_names):
            raise UserError(f"config.data: {differ}; {_SAME_IMAGES}")
        if not isinstance(before, dict):
            continue  # a split that the run does not use
        if now.identity != before.get("identity"):
            raise UserError(
                f"config.data: split {split!r} is {now.identity!r}, but {run} was started with"
                f" {before.get('identity')!r}; {_SAME_IMAGES}"
            )
        if now.times == before.get("times"):
            continue
        files = f"files of split {split!r}"
        if not moved:
            raise UserError(
                f"config.data: {files} in {where} were modified since {run} began, though their"
                f" names and sizes are the same; {_SAME_IMAGES}; if they are the same, copied or"
                f" touched, add --data_path={where}, by which their contents are compared"
            )
        if now.content_sample() != before.get("content_sample"):
            raise UserError(
                f"config.data: {files} in {where} have other contents than those that {run} was"
                f" started with, though their names and sizes are the same; {_SAME_IMAGES}"
            )
        say(
            f"data: {files} have other times of modification than when the run began; names,"
            " sizes and the contents of up to 256 of them are the same"
        )


def write_run_data(folder: RunFolder, data: RunData) -> None:
    """Stores which images a run is trained on, for `check_run_data`."""
    first = next(iter(data.splits.values()))
    facts = {
        "path": data.path,
        "path_as_given": data.path_as_given,
        "class_names": list(first.class_names),
        "splits": {
            name: {
                "identity": split.identity,
                "times": split.times,
                "content_sample": split.content_sample(),
            }
            for name, split in data.splits.items()
        },
    }
    write_json(folder.data_path, facts)


def trained_classes(folder: RunFolder) -> tuple[str, ...] | None:
    """The class names of the images that a run is trained on; None if they are not known."""
    if not folder.data_path.exists():
        return None
    stored = read_json(folder.data_path, remedy="remove it to do without it")
    names = stored.get("class_names") if isinstance(stored, dict) else None
    return tuple(names) if isinstance(names, list) else None
