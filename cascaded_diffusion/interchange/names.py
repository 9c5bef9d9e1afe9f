r"""How other code bases name and lay out the parameters of our U-Net.

A parameter of ours lies in theirs as

    conv     [h, w, I, O]   ->  [O, I, h, w]
    matrix   [I, O]         ->  [O, I], with trailing ones if it is a 1x1 convolution there
    vector, table           ->  the same

and besides, in two places:

    qkv      our outputs are ordered [3, heads, channels]; so are guided-diffusion's with its "new
             attention order", else they are [heads, 3, channels]; diffusers has three matrices
    noise    our sinusoids are [sin, cos]; theirs, but for diffusers' option, [cos, sin]
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from cascaded_diffusion.config.schema import StageConfig
from cascaded_diffusion.networks.classifier import flatten_params
from cascaded_diffusion.types import Params

# The parts of our residual and attention blocks, as each code base calls them.
_GUIDED_RES = {
    **{"norm0": "in_layers.0", "conv0": "in_layers.2"},
    **{"shift": "emb_layers.1", "scale_shift": "emb_layers.1"},
    **{"norm1": "out_layers.0", "conv1": "out_layers.3", "skip": "skip_connection"},
}
_DIFFUSERS_RES = {
    **{"norm0": "norm1", "conv0": "conv1", "shift": "time_emb_proj", "norm1": "norm2"},
    **{"conv1": "conv2", "skip": "conv_shortcut"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A code base whose U-Net ours can be.

    `qkv_by_head` and `cos_first` say how qkv and the sinusoids are ordered, see above.
    """

    name: str
    parts: dict[str, str]
    qkv: tuple[str, ...]
    ones: dict[str, int]  # trailing ones of a matrix that is a convolution there, by our part
    qkv_by_head: bool = False
    cos_first: bool = True

    def blocks(self, stage: StageConfig) -> dict[str, str]:
        """Their prefixes of our blocks, by name."""
        make = _diffusers_blocks if self.name == "diffusers" else _guided_blocks
        return make(stage)


GUIDED_DIFFUSION = Family(
    name="guided_diffusion",
    parts={
        **_GUIDED_RES,
        **{"norm": "norm", "out": "proj_out", "down_conv": "op", "up_conv": "conv"},
        **{"Dense_0": "0", "Dense_1": "2"},
    },
    qkv=("qkv",),
    ones={"skip": 2, "qkv": 1, "out": 1},
)
DIFFUSERS = Family(
    name="diffusers",
    parts={
        **_DIFFUSERS_RES,
        **{"norm": "group_norm", "out": "to_out.0", "down_conv": "conv", "up_conv": "conv"},
        **{"Dense_0": "linear_1", "Dense_1": "linear_2"},
    },
    qkv=("to_q", "to_k", "to_v"),
    ones={"skip": 2},
)


def _guided_blocks(stage: StageConfig) -> dict[str, str]:
    blocks = {
        **{"noise_level": "time_embed", "label": "label_emb", "conv_in": "input_blocks.0.0"},
        **{"middle_block0": "middle_block.0", "middle_attention": "middle_block.1"},
        **{"middle_block1": "middle_block.2", "norm_out": "out.0", "conv_out": "out.2"},
    }
    levels, number = list(enumerate(stage.network.num_res_blocks)), 1
    for level, count in levels:
        if level:
            blocks[f"down{level}_resample"] = f"input_blocks.{number}.0"
            number += 1
        for i in range(count):
            blocks[f"down{level}_block{i}"] = f"input_blocks.{number}.0"
            blocks[f"down{level}_block{i}_attention"] = f"input_blocks.{number}.1"
            number += 1
    number = 0
    for level, count in reversed(levels):
        for i in range(count + 1):
            blocks[f"up{level}_block{i}"] = f"output_blocks.{number}.0"
            blocks[f"up{level}_block{i}_attention"] = f"output_blocks.{number}.1"
            if level and i == count:
                place = 1 + stage.attends(level)
                blocks[f"up{level}_resample"] = f"output_blocks.{number}.{place}"
            number += 1
    return blocks


def _diffusers_blocks(stage: StageConfig) -> dict[str, str]:
    blocks = {
        **{"noise_level": "time_embedding", "label": "class_embedding", "conv_in": "conv_in"},
        **{"middle_block0": "mid_block.resnets.0", "middle_attention": "mid_block.attentions.0"},
        **{"middle_block1": "mid_block.resnets.1"},
        **{"norm_out": "conv_norm_out", "conv_out": "conv_out"},
    }
    levels = list(enumerate(stage.network.num_res_blocks))
    for level, count in levels:
        down, up = f"down_blocks.{level}", f"up_blocks.{len(levels) - 1 - level}"
        if level:
            blocks[f"down{level}_resample"] = f"down_blocks.{level - 1}.downsamplers.0"
            blocks[f"up{level}_resample"] = f"{up}.upsamplers.0"
        for way, theirs, blocks_there in (("down", down, count), ("up", up, count + 1)):
            for i in range(blocks_there):
                blocks[f"{way}{level}_block{i}"] = f"{theirs}.resnets.{i}"
                blocks[f"{way}{level}_block{i}_attention"] = f"{theirs}.attentions.{i}"
    return blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translated:
    """A parameter of ours, and the tensors that it is there."""

    path: str  # ours, as `flatten_params` has it
    shape: tuple[int, ...]  # ours
    names: tuple[str, ...]  # theirs; of qkv there may be three
    layout: Literal["conv", "matrix", "same"]
    ones: int = 0
    heads: int | None = None  # outputs are ordered by head there
    swapped: bool = False  # the halves of the inputs are swapped there

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of each tensor there."""
        if self.layout == "conv":
            h, w, inputs, outputs = self.shape
            return outputs, inputs, h, w
        if self.layout == "matrix":
            inputs, outputs = self.shape
            return outputs // len(self.names), inputs, *(1,) * self.ones
        first, *rest = self.shape
        return first // len(self.names), *rest

    def to_ours(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Our parameter, float32, from tensors of `their_shape`; a view of them if possible."""
        x = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        if self.layout == "matrix":
            x = x.reshape(x.shape[:2])
        if self.heads is not None:  # [heads, 3, channels, ...] -> [3, heads, channels, ...]
            x = _swapped_axes(x, (self.heads, 3))
        if self.swapped:
            x = np.roll(x, x.shape[1] // 2, axis=1)
        if self.layout == "conv":
            x = x.transpose(2, 3, 1, 0)
        elif self.layout == "matrix":
            x = x.T
        return x.astype(np.float32, copy=False)

    def to_theirs(self, ours: np.ndarray) -> list[np.ndarray]:
        """The inverse of `to_ours`."""
        x = np.asarray(ours)
        if self.layout == "conv":
            x = x.transpose(3, 2, 0, 1)
        elif self.layout == "matrix":
            x = x.T
        if self.swapped:
            x = np.roll(x, x.shape[1] // 2, axis=1)
        if self.heads is not None:
            x = _swapped_axes(x, (3, self.heads))
        parts = np.split(x, len(self.names))
        return [np.ascontiguousarray(part).reshape(self.their_shape) for part in parts]


def _swapped_axes(x: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    """[a * b * c, ...] -> [b * a * c, ...]."""
    a, b = axes
    split = x.reshape(a, b, x.shape[0] // (a * b), *x.shape[1:])
    return split.swapaxes(0, 1).reshape(x.shape)


def translations(family: Family, stage: StageConfig, shapes: Params) -> Iterator[Translated]:
    """Each parameter of a stage's U-Net, of these shapes, as the family has it.

    Left out are parameters that no other code base has: those of `aug_level`.
    """
    blocks = family.blocks(stage)
    for path, leaf in flatten_params(shapes).items():
        block, *parts, kind = path.split("/")
        if block == "aug_level":
            continue
        part = parts[0] if parts else ""
        if block.endswith("resample") and part == "conv":
            part = "down_conv" if block.startswith("down") else "up_conv"
        names = family.qkv if part == "qkv" else ((family.parts[part],) if part else ("",))
        suffix = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, "bias")
        dims = len(leaf.shape)
        is_qkv = part == "qkv" and family.qkv_by_head
        yield Translated(
            path=path,
            shape=tuple(leaf.shape),
            names=tuple(".".join(filter(None, (blocks[block], n, suffix))) for n in names),
            layout={4: "conv", 2: "matrix"}[dims] if kind == "kernel" else "same",
            ones=family.ones.get(part, 0) if kind == "kernel" else 0,
            heads=stage.network.heads_of(leaf.shape[-1] // 3) if is_qkv else None,
            swapped=family.cos_first and block == "noise_level" and path.endswith("Dense_0/kernel"),
        )


def number_of_parameters(tensors: dict[str, np.ndarray]) -> int:
    """How many numbers the tensors have."""
    return sum(math.prod(x.shape) for x in tensors.values())
