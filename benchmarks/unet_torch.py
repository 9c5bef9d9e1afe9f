"""The diffusers side of `unet.py`: needs PyTorch and diffusers, nothing of ours.

Answers on stdout, a line of JSON each, what is asked on stdin, and sleeps in between.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

# diffusers imports torchvision where it is installed, and one built for another PyTorch
# breaks that import. The U-Net needs none.
sys.modules["torchvision"] = None

try:
    import numpy as np
    import torch
    from diffusers import UNet2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
except Exception as e:  # a broken installation raises whatever it likes
    print(json.dumps({"error": " ".join(f"{type(e).__name__}: {e}".split())}), flush=True)
    sys.exit(1)

CHANNELS_LAST, COMPILED = "channels_last", "torch.compile"
# name -> what is done to the model. Compiled for channels_last took two minutes to
# compile, and on two cores its second training step had not ended after fifteen seconds: it is
# not among them.
WAYS = {
    "eager": (),
    "eager, channels_last": (CHANNELS_LAST,),
    "torch.compile": (COMPILED,),
}
COSINE_OFFSET = 0.008
PROBES = 3
# Part of a block in ours -> in diffusers.
PARTS = {
    "norm0": "norm1",
    "conv0": "conv1",
    "scale_shift": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
    "norm": "group_norm",
    "out": "to_out.0",
    "conv": "conv",
}
TOP = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "noise_level/Dense_0": "time_embedding.linear_1",
    "noise_level/Dense_1": "time_embedding.linear_2",
}

Call = Callable[[], None]


def build_model(network: dict[str, Any]) -> UNet2DModel:
    """The twin of our network.

    Diffusers fixes the width of a head, ours their number: they are equal at the last level.
    """
    widths = [network["channels"] * mult for mult in network["channel_mults"]]
    sizes = [network["resolution"] >> level for level in range(len(widths))]
    attends = [size in network["attention_resolutions"] for size in sizes]
    return UNet2DModel(
        sample_size=network["resolution"],
        in_channels=3,
        out_channels=network.get("out_channels", 3),
        num_class_embeds=network.get("num_classes") or None,
        flip_sin_to_cos=False,
        freq_shift=0,
        block_out_channels=widths,
        layers_per_block=network["num_res_blocks"][0],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=widths[-1] // network["num_heads"],
        # Without it the middle's attention would have no norm.
        attn_norm_num_groups=32,
        norm_num_groups=32,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        dropout=network["dropout_rate"],
    )


def block_name(name: str, levels: int) -> str:
    """`up1_block0_attention` and its like, in diffusers' words."""
    if name == "middle_attention":
        return "mid_block.attentions.0"
    if name.startswith("middle_block"):
        return f"mid_block.resnets.{name[-1]}"
    way, level, kind, index, attention = re.fullmatch(
        r"(down|up)(\d)_(block|resample)(\d?)(_attention)?", name
    ).groups()
    number = int(level) if way == "down" else levels - 1 - int(level)
    if kind == "resample":  # theirs ends a level, ours begins the next on the way down
        number -= way == "down"
        return f"{way}_blocks.{number}.{way}samplers.0"
    return f"{way}_blocks.{number}.{'attentions' if attention else 'resnets'}.{index}"


def state_dict_from(ours: dict[str, np.ndarray], levels: int) -> dict[str, torch.Tensor]:
    """Our parameters, by path, under diffusers' names and in its layouts."""
    found = {}
    for path, value in ours.items():
        module, _, kind = path.rpartition("/")
        leaf = "bias" if kind == "bias" else "weight"
        if value.ndim > 1:  # [..., in, out] -> [out, in, ...]
            value = np.moveaxis(value, (-1, -2), (0, 1))
        if module in TOP:
            found[f"{TOP[module]}.{leaf}"] = value
            continue
        block, _, part = module.partition("/")
        prefix = block_name(block, levels)
        if part == "qkv":
            for name, third in zip("qkv", np.split(value, 3), strict=True):
                found[f"{prefix}.to_{name}.{leaf}"] = third
        else:
            if part == "skip" and leaf == "weight":  # a 1x1 convolution there
                value = value[..., None, None]
            found[f"{prefix}.{PARTS[part]}.{leaf}"] = value
    return {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in found.items()}


def count_flops(model: UNet2DModel, size: int) -> int:
    """Of one forward pass of one image."""
    image = torch.zeros(1, 3, size, size)
    # Fused attention is not counted, so it is taken apart.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image, torch.zeros(1))
    return counter.get_total_flops()


def levels_at(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(alpha, sigma, the network's time in 0..1000), of the cosine schedule, [B, 1, 1, 1] each."""
    t = t.view(-1, 1, 1, 1)

    def f(t: torch.Tensor) -> torch.Tensor:
        return torch.cos(math.pi / 2 * (t + COSINE_OFFSET) / (1 + COSINE_OFFSET)) ** 2

    alpha2 = (f(t) / f(torch.zeros(()))).clamp(1e-8, 1 - 1e-8)
    alpha, sigma = alpha2.sqrt(), (1 - alpha2).sqrt()
    return alpha, sigma, 1000 * torch.atan2(sigma, alpha) / (math.pi / 2)


def make_train_step(model: UNet2DModel, forward: Callable, images: torch.Tensor) -> Call:
    """One optimizer step: eps loss, clipping, Adam, EMA."""
    params = list(model.parameters())
    ema = [p.detach().clone() for p in params]
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)

    def step() -> None:
        x0 = images.float() / 127.5 - 1
        alpha, sigma, time_input = levels_at(torch.rand(len(x0)))
        eps = torch.randn_like(x0)
        output = forward(alpha * x0 + sigma * eps, time_input.flatten(), return_dict=False)[0]
        torch.nn.functional.mse_loss(output, eps).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - 0.999)

    return step


def make_sampler(forward: Callable, like: torch.Tensor, num_steps: int) -> Call:
    """One batch by deterministic DDIM with x0 clipped."""
    times = torch.linspace(1, 0, num_steps + 1)

    @torch.inference_mode()
    def sample() -> None:
        xt = torch.randn_like(like, dtype=torch.float32)
        for t, s in itertools.pairwise(times):
            alpha, sigma, time_input = levels_at(t.expand(len(xt)))
            alpha_s, sigma_s, _ = levels_at(s.expand(len(xt)))
            eps = forward(xt, time_input.flatten(), return_dict=False)[0]
            x0 = ((xt - sigma * eps) / alpha).clamp(-1, 1)
            xt = x0 if s == 0 else alpha_s * x0 + sigma_s * (xt - alpha * x0) / sigma
        assert torch.isfinite(xt).all()

    return sample


def timed(call: Call, times: int) -> float:
    """Seconds of `times` calls."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


class Side:
    """What can be asked of this side."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._network = args, json.loads(args.network)
        self._model = build_model(self._network)
        self._calls: dict[str, Call] = {}

    def hello(self) -> dict[str, Any]:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers")]
        return {
            "library": f"{', '.join(versions)}, {torch.get_num_threads()} threads",
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "flops": count_flops(self._model, self._network["resolution"]),
        }

    def check(self, path: str) -> dict[str, Any]:
        """Takes our weights; how far the outputs for one input are apart, in their deviations."""
        with np.load(path) as file:
            arrays = dict(file)
        xt, time_input, expected = (arrays.pop(name) for name in ("xt", "time", "output"))
        levels = len(self._network["channel_mults"])
        self._model.load_state_dict(state_dict_from(arrays, levels), strict=True)
        with torch.inference_mode():
            xt = torch.from_numpy(xt).permute(0, 3, 1, 2)
            found = self._model(xt, 1000 * torch.from_numpy(time_input)).sample
        found = found.permute(0, 2, 3, 1).numpy()
        return {"difference": float(np.abs(found - expected).max() / expected.std())}

    def probe(self, part: str) -> dict[str, Any]:
        """Tries every way and keeps the fastest: seconds of its best call, and of its first."""
        size = self._network["resolution"]
        tried, calls = {}, {}
        for name, changes in WAYS.items():
            if COMPILED in changes and self._args.no_compile:
                continue
            images = torch.randint(0, 256, (self._args.batch_size, 3, size, size)).byte()
            model = copy.deepcopy(self._model)
            if CHANNELS_LAST in changes:
                model = model.to(memory_format=torch.channels_last)
                images = images.to(memory_format=torch.channels_last)
            forward = torch.compile(model) if COMPILED in changes else model
            if part == "train":
                call = make_train_step(model, forward, images)
            else:
                call = make_sampler(forward, images, self._args.num_steps)
            try:
                first = timed(call, 1)
            except Exception as e:  # a compiler that is missing, and much else
                tried[name] = {"error": f"{type(e).__name__}: {e}".splitlines()[0]}
                continue
            calls[name] = call
            tried[name] = {"first": first, "secs": math.inf}
        for _ in range(PROBES):  # in turn: a slow spell meets all of them
            for name, call in calls.items():
                tried[name]["secs"] = min(tried[name]["secs"], timed(call, 1))
        chosen = min(calls, key=lambda name: tried[name]["secs"])
        self._calls[part] = calls[chosen]
        return {"tried": tried, "chosen": chosen}

    def run(self, part: str, times: int) -> dict[str, Any]:
        return {"secs": timed(self._calls[part], times)}


def main() -> None:
    """Answers until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", help="JSON: our network's section, and the resolution")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--num_steps", type=int)
    parser.add_argument("--no_compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    say = functools.partial(print, flush=True)
    side = Side(args)
    say(json.dumps(side.hello()))
    for line in sys.stdin:
        request = json.loads(line)
        say(json.dumps(getattr(side, request.pop("do"))(**request)))


if __name__ == "__main__":
    main()
