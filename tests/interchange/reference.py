"""The U-Nets of guided-diffusion and diffusers, and their chains, by NumPy alone.

Nothing of the package is used. Tensors have their own code bases' names and shapes; images are
[N, C, H, W] float64.
"""

import dataclasses
import math

import numpy as np


class Tensors(dict):
    """Tensors by name; those that are asked for the first time are drawn."""

    def __init__(self, seed=0):
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def __call__(self, name, *shape, near=0.0):
        if name not in self:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 10
            drawn = near + self._rng.standard_normal(shape) / math.sqrt(fan_in)
            self[name] = drawn.astype(np.float32)
        assert self[name].shape == shape, (name, self[name].shape, shape)
        return self[name].astype(np.float64)


def swish(x):
    return x / (1 + np.exp(-x))


def conv(t, name, x, outputs, size=3, stride=1, padding=None):
    weight = t(f"{name}.weight", outputs, x.shape[1], size, size)
    padding = (size // 2,) * 2 if padding is None else padding
    x = np.pad(x, ((0, 0), (0, 0), padding, padding))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    y = np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], weight, optimize=True)
    return y + t(f"{name}.bias", outputs)[:, None, None]


def linear(t, name, x, outputs):
    return x @ t(f"{name}.weight", outputs, x.shape[1]).T + t(f"{name}.bias", outputs)


def group_norm(t, name, x, eps=1e-5):
    n, c = x.shape[:2]
    groups = x.reshape(n, 32, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(
        groups.var(-1, keepdims=True) + eps
    )
    weight, bias = t(f"{name}.weight", c, near=1.0), t(f"{name}.bias", c)
    return normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def twice(x):
    return x.repeat(2, axis=2).repeat(2, axis=3)


def half(x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


def bilinear(x, size):
    """Half-pixel centres, edges repeated."""
    for axis in (2, 3):
        old = x.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        x = np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight
    return x


def timestep_embedding(steps, size, cos_first=True, freq_shift=0):
    frequencies = np.exp(-math.log(10_000) * np.arange(size // 2) / (size // 2 - freq_shift))
    angles = np.asarray(steps, np.float64)[:, None] * frequencies
    parts = [np.cos(angles), np.sin(angles)]
    return np.concatenate(parts if cos_first else parts[::-1], axis=1)


def attend(q, k, v):
    """[N, heads, channels, places] each."""
    weights = np.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(q.shape[2])
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    return np.einsum("nhts,nhcs->nhct", weights / weights.sum(-1, keepdims=True), v)


@dataclasses.dataclass
class Guided:
    """UNetModel and SuperResModel; `attention` has the sizes of feature maps."""

    size: int
    channels: int
    mults: tuple
    blocks: int = 1
    attention: tuple = ()
    heads: int | None = None
    head_channels: int | None = None
    new_order: bool = False
    updown: bool = True
    scale_shift: bool = True
    outputs: int = 6
    classes: int | None = None

    def _res(self, t, name, x, emb, outputs, resample=None):
        h = swish(group_norm(t, f"{name}.in_layers.0", x))
        if resample is not None:
            h, x = resample(h), resample(x)
        h = conv(t, f"{name}.in_layers.2", h, outputs)
        told = linear(t, f"{name}.emb_layers.1", swish(emb), outputs * (1 + self.scale_shift))
        told = told[:, :, None, None]
        if self.scale_shift:
            scale, shift = np.split(told, 2, axis=1)
            h = group_norm(t, f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = group_norm(t, f"{name}.out_layers.0", h + told)
        h = conv(t, f"{name}.out_layers.3", swish(h), outputs)
        if x.shape[1] != outputs:
            x = conv(t, f"{name}.skip_connection", x, outputs, size=1)
        return x + h

    def _attention(self, t, name, x):
        n, c = x.shape[:2]
        heads = self.heads or c // self.head_channels
        h = group_norm(t, f"{name}.norm", x).reshape(n, c, -1)

        def conv1d(name, h, outputs):
            weight = t(f"{name}.weight", outputs, h.shape[1], 1)[..., 0]
            return np.einsum("oc,nct->not", weight, h) + t(f"{name}.bias", outputs)[:, None]

        qkv = conv1d(f"{name}.qkv", h, 3 * c)
        if self.new_order:
            q, k, v = qkv.reshape(n, 3, heads, c // heads, -1).swapaxes(0, 1)
        else:
            q, k, v = qkv.reshape(n, heads, 3, c // heads, -1).transpose(2, 0, 1, 3, 4)
        h = conv1d(f"{name}.proj_out", attend(q, k, v).reshape(n, c, -1), c)
        return x + h.reshape(x.shape)

    def __call__(self, t, x, steps, labels=None, low_res=None):
        if low_res is not None:
            x = np.concatenate([x, bilinear(low_res, x.shape[2])], axis=1)
        wide = 4 * self.channels
        emb = linear(t, "time_embed.0", timestep_embedding(steps, self.channels), wide)
        emb = linear(t, "time_embed.2", swish(emb), wide)
        if labels is not None:
            emb = emb + t("label_emb.weight", self.classes, wide)[labels]
        widths = [int(self.channels * mult) for mult in self.mults]
        h = conv(t, "input_blocks.0.0", x, widths[0])
        skips, number = [h], 1
        for level, width in enumerate(widths):
            for _ in range(self.blocks):
                h = self._res(t, f"input_blocks.{number}.0", h, emb, width)
                if h.shape[2] in self.attention:
                    h = self._attention(t, f"input_blocks.{number}.1", h)
                skips.append(h)
                number += 1
            if level + 1 < len(widths):
                name = f"input_blocks.{number}.0"
                if self.updown:
                    h = self._res(t, name, h, emb, width, half)
                else:
                    h = conv(t, f"{name}.op", h, width, stride=2)
                skips.append(h)
                number += 1
        h = self._res(t, "middle_block.0", h, emb, h.shape[1])
        h = self._attention(t, "middle_block.1", h)
        h = self._res(t, "middle_block.2", h, emb, h.shape[1])
        number = 0
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.blocks + 1):
                name, place = f"output_blocks.{number}", 1
                h = self._res(t, f"{name}.0", np.concatenate([h, skips.pop()], axis=1), emb, width)
                if h.shape[2] in self.attention:
                    h = self._attention(t, f"{name}.1", h)
                    place = 2
                if level and i == self.blocks:
                    if self.updown:
                        h = self._res(t, f"{name}.{place}", h, emb, width, twice)
                    else:
                        h = conv(t, f"{name}.{place}.conv", twice(h), width)
                number += 1
        return conv(t, "out.2", swish(group_norm(t, "out.0", h)), self.outputs)


@dataclasses.dataclass
class Diffusers:
    """UNet2DModel."""

    size: int
    widths: tuple
    blocks: int = 1
    attention: tuple = ()  # sizes of feature maps
    head_channels: int = 8
    flip_sin_to_cos: bool = True
    outputs: int = 3
    classes: int | None = None
    freq_shift: int = 0
    norm_eps: float = 1e-5
    downsample_padding: int = 1

    def _norm(self, t, name, x):
        return group_norm(t, name, x, self.norm_eps)

    def _res(self, t, name, x, emb, outputs):
        h = conv(t, f"{name}.conv1", swish(self._norm(t, f"{name}.norm1", x)), outputs)
        told = linear(t, f"{name}.time_emb_proj", swish(emb), outputs)
        h = self._norm(t, f"{name}.norm2", h + told[:, :, None, None])
        h = conv(t, f"{name}.conv2", swish(h), outputs)
        if x.shape[1] != outputs:
            x = conv(t, f"{name}.conv_shortcut", x, outputs, size=1)
        return x + h

    def _attention(self, t, name, x):
        n, c, height, width = x.shape
        h = self._norm(t, f"{name}.group_norm", x).reshape(n, c, -1).swapaxes(1, 2).reshape(-1, c)

        def projected(part):
            y = linear(t, f"{name}.{part}", h, c).reshape(n, height * width, -1, self.head_channels)
            return y.transpose(0, 2, 3, 1)

        y = attend(*map(projected, ("to_q", "to_k", "to_v"))).transpose(0, 3, 1, 2)
        y = linear(t, f"{name}.to_out.0", y.reshape(-1, c), c).reshape(n, height * width, c)
        return x + y.swapaxes(1, 2).reshape(x.shape)

    def __call__(self, t, x, steps, labels=None, low_res=None):
        assert low_res is None
        wide = 4 * self.widths[0]
        emb = timestep_embedding(steps, self.widths[0], self.flip_sin_to_cos, self.freq_shift)
        emb = linear(t, "time_embedding.linear_1", emb, wide)
        emb = linear(t, "time_embedding.linear_2", swish(emb), wide)
        if labels is not None:
            emb = emb + t("class_embedding.weight", self.classes, wide)[labels]
        h = conv(t, "conv_in", x, self.widths[0])
        skips, last = [h], len(self.widths) - 1
        for level, width in enumerate(self.widths):
            name = f"down_blocks.{level}"
            for i in range(self.blocks):
                h = self._res(t, f"{name}.resnets.{i}", h, emb, width)
                if h.shape[2] in self.attention:
                    h = self._attention(t, f"{name}.attentions.{i}", h)
                skips.append(h)
            if level < last:
                # Without padding, its layer adds a pixel at the bottom and right by itself.
                padding = (1, 1) if self.downsample_padding else (0, 1)
                name = f"{name}.downsamplers.0.conv"
                h = conv(t, name, h, width, stride=2, padding=padding)
                skips.append(h)
        h = self._res(t, "mid_block.resnets.0", h, emb, h.shape[1])
        h = self._attention(t, "mid_block.attentions.0", h)
        h = self._res(t, "mid_block.resnets.1", h, emb, h.shape[1])
        for place, width in enumerate(reversed(self.widths)):
            name = f"up_blocks.{place}"
            for i in range(self.blocks + 1):
                joined = np.concatenate([h, skips.pop()], axis=1)
                h = self._res(t, f"{name}.resnets.{i}", joined, emb, width)
                if h.shape[2] in self.attention:
                    h = self._attention(t, f"{name}.attentions.{i}", h)
            if place < last:
                h = conv(t, f"{name}.upsamplers.0.conv", twice(h), width)
        return conv(t, "conv_out", swish(self._norm(t, "conv_norm_out", h)), self.outputs)


def linear_betas(num_steps):
    return np.linspace(1e-4, 0.02, num_steps) * 1000 / num_steps


def cosine_betas(num_steps):
    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [(i / num_steps, (i + 1) / num_steps) for i in range(num_steps)]
    return np.array([min(1 - alpha_bar(b) / alpha_bar(a), 0.999) for a, b in steps])


def respaced_chain(network, betas, used, x, noises, *, learned, ddim=False):
    """A chain over the steps `used`, ascending, from x; `network(x, step)` predicts the noise.

    The betas are those between the steps used. `noises` has one for each step of the chain.
    """
    kept = np.cumprod(1 - betas)[used]
    before = np.append(1.0, kept[:-1])
    betas = 1 - kept / before
    posterior = betas * (1 - before) / (1 - kept)
    for noise, i in zip(noises, reversed(range(len(used))), strict=True):
        output = network(x, used[i])
        eps, told = np.split(output, 2, axis=1) if learned else (output, None)
        x0 = np.sqrt(1 / kept[i]) * x - np.sqrt(1 / kept[i] - 1) * eps
        x0 = np.clip(x0, -1, 1)
        if ddim:
            eps = (np.sqrt(1 / kept[i]) * x - x0) / np.sqrt(1 / kept[i] - 1)
            x = np.sqrt(before[i]) * x0 + np.sqrt(1 - before[i]) * eps
            continue
        mean = betas[i] * np.sqrt(before[i]) / (1 - kept[i]) * x0
        mean = mean + (1 - before[i]) * np.sqrt(1 - betas[i]) / (1 - kept[i]) * x
        clipped = posterior[max(i, 1)]
        fraction = (told + 1) / 2
        log_variance = fraction * np.log(betas[i]) + (1 - fraction) * np.log(clipped)
        x = mean + (i > 0) * np.exp(0.5 * log_variance) * noise
    return x
