"""Estimates what a stage's network costs from its config, within some tens of percent.

The estimate serves to refuse absurd sizes before anything is built. `plan` counts exactly, by
tracing the network.
"""

import dataclasses

from cascaded_diffusion.config.schema import StageConfig


@dataclasses.dataclass
class StageCost:
    """The cost of one image in one forward pass."""

    parameters: int = 0
    flops: int = 0  # of convolutions and matrix products; a multiply-add counts as two
    kept_values: int = 0  # for the backward pass, without rematerialization

    def _linear(self, inputs: int, outputs: int, places: int) -> None:
        self.parameters += inputs * outputs
        self.flops += 2 * inputs * outputs * places

    def _conv(self, inputs: int, outputs: int, size: int, kernel: int = 3) -> None:
        self._linear(kernel**2 * inputs, outputs, size**2)
        self.kept_values += outputs * size**2

    def _res_block(self, inputs: int, outputs: int, size: int, embedding: int) -> None:
        self._conv(inputs, outputs, size)
        self._conv(outputs, outputs, size)
        self._conv(inputs, outputs, size, kernel=1)
        self._linear(embedding, 2 * outputs, 1)
        self.kept_values += 2 * (inputs + outputs) * size**2  # norms

    def _attention(self, channels: int, size: int, num_heads: int) -> None:
        self._conv(channels, 3 * channels, size, kernel=1)
        self._conv(channels, channels, size, kernel=1)
        self.flops += 4 * channels * size**4
        self.kept_values += 2 * channels * size**2 + num_heads * size**4


def stage_cost(stage: StageConfig) -> StageCost:
    """Estimates the cost of a stage whose values are each within their bounds."""
    network, cost = stage.network, StageCost()
    efficient = network.name == "efficient_unet"
    embedding = 4 * network.channels
    cost._linear(stage.num_classes + 1, embedding, 0)
    cost._linear(network.channels + embedding, embedding, 1 + stage.has_aug_level)
    image = stage.channels * network.patch_size**2
    size = stage.resolution // network.patch_size
    width = min(network.channels, network.widths[0])
    cost._conv(image * (1 if stage.low_res_resolution is None else 2), width, size)
    cost._conv(width, image * (1 if stage.diffusion.variance == "fixed" else 2), size)
    levels = list(zip(network.widths, network.num_res_blocks, strict=True))
    resamples = network.resample != "pool"
    for way in (levels, levels[::-1]):
        down = way is levels
        for level, (features, count) in enumerate(way):
            if down and (level > 0 or efficient):
                size //= 2
                if resamples:
                    cost._conv(width, width, size)
            # On the way up, a block also takes a skip connection from the way down.
            for _ in range(count + (not down and not efficient)):
                joined = features * (not down and not efficient)
                cost._res_block(width + joined, features, size, embedding)
                width = features
                if size in network.attention_resolutions and not efficient:
                    cost._attention(width, size, network.heads_of(width))
            if efficient and size in network.attention_resolutions:
                cost._attention(width, size, network.heads_of(width))
            if not down and (level + 1 < len(levels) or efficient):
                size *= 2
                if resamples:
                    cost._conv(width, width, size)
        if down and not efficient:
            cost._attention(width, size, network.heads_of(width))
            cost._res_block(width, width, size, embedding)
            cost._res_block(width, width, size, embedding)
    return cost
