"""A request for samples: the stages, images, labels and number of samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from cascaded_diffusion.config.schema import CascadeConfig, RunConfig, to_dict
from cascaded_diffusion.runtime.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class LowRes:
    """Images to be enlarged.

    Attributes:
      images: uint8 [n, h, h, C].
      labels: int [n]; None if nothing says what they are.
      png_names: the names of the PNG files of their enlargements; None for numbers.
    """

    images: np.ndarray
    labels: np.ndarray | None
    png_names: Sequence[str] | None

    def digest(self) -> str:
        """SHA-256 of the pixels, first 12 digits."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The samples to make.

    Attributes:
      workdir: the folder of the runs, or the run, for messages.
      config: the cascade, with the number of samples.
      folders: the runs of the stages to run, in order.
      run_configs: their configs.
      first: the place in the cascade of the first of them.
      labels: int32 [m], of the samples in turn; 0 for a model without classes.
      output: where to write.
      class_names: of the labels that were given by name.
      chosen: whether classes were chosen.
      low_res: the images to enlarge if `first` is not 0.
      png: whether to write every image as a PNG file as well.
    """

    workdir: str
    config: CascadeConfig
    folders: Sequence[RunFolder]
    run_configs: Sequence[RunConfig]
    first: int
    labels: np.ndarray
    output: RunFolder
    class_names: Mapping[int, str] = dataclasses.field(default_factory=dict)
    chosen: bool = False
    low_res: LowRes | None = None
    png: bool = False

    def identity(self) -> dict[str, object]:
        """All that the samples depend on besides the stages' checkpoints, for JSON."""
        identity = to_dict(self.config.cascade)
        for key in ("configs", "num_samples", "batch_size"):  # the store has the last two
            del identity[key]
        identity["labels"] = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()[:12]
        identity["low_res"] = None if self.low_res is None else self.low_res.digest()
        return identity

    def npz_names(self) -> list[str]:
        """The files of samples that are written, one per stage that is run."""
        names = [*self.config.cascade.stages[self.first : -1], "samples"]
        return [f"{name}.npz" for name in names]

    def png_paths(self) -> list[str]:
        """The PNG files that are written below `png/` if `png` is set, one per sample."""
        if self.low_res is not None and self.low_res.png_names is not None:
            return list(self.low_res.png_names)
        return [f"{i:06d}.png" for i in range(self.config.cascade.num_samples)]

    def title(self) -> str:
        """A description for people."""
        section, stages = self.config.cascade, [c.stage for c in self.run_configs]
        count, what = section.num_samples, "sample" if self.low_res is None else "image"
        what = f"{count} {what}{'s' * (count != 1)}"
        if self.chosen:
            found = sorted(set(self.labels[:count].tolist()))
            names = [f"{i} ({self.class_names[i]})" if i in self.class_names else i for i in found]
            what += f" of class{'es' * (len(found) > 1)} {', '.join(map(str, names[:10]))}"
            what += ", ..." * (len(found) > 10)
        sizes = [f"{stage.resolution} px" for stage in stages]
        mode = "truncated" if section.truncated else "non-truncated"
        if self.low_res is not None:
            what += " enlarged"
            sizes.insert(0, f"{stages[0].low_res_resolution} px")
            if section.truncated:
                mode = "non-truncated at the given images"
                mode += ", truncated above" * (len(stages) > 1)
        levels = section.aug_levels[max(0, self.first - 1) :]
        return f"{what}, {' -> '.join(sizes)}, aug_level {levels} {mode}"


def stage_as_cascade(run: RunConfig) -> dict[str, object]:
    """The config values of a cascade of one run's stage, for `cascade_config_from`.

    A super-resolution stage stands on top of one that is not known, "given", whose images are.
    """
    below = [] if run.stage.kind == "base" else ["given"]
    names = [*below, run.stage.name]
    return {
        "cascade": {
            "stages": names,
            "configs": names,
            "aug_levels": [run.eval.aug_level] * len(below),
            "truncated": False,
            "samplers": [to_dict(run.stage.sampler)] * len(names),
            "num_samples": run.eval.num_samples,
            "batch_size": run.eval.batch_size,
            "seed": run.eval.seed,
        },
        "mesh": {"data": -1, "fsdp": 1},
    }
