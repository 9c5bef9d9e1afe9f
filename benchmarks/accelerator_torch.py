"""The PyTorch side of `accelerator.py`: diffusers' U-Net of a config's size, trained on a GPU.

Needs PyTorch and diffusers, and of ours only the config, read without JAX. The network is that
of `unet_torch.build_model`, with the config's dropout, classes and output channels. A step:
uint8 images to float, random t, noise, the eps loss, backward, clipping, fused Adam, EMA by
`_foreach_lerp_`, under bfloat16 autocast, in channels_last, with `torch.compile`. The learned
variance's loss, which ours has besides, is left out.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import unet_torch as twin
from unet_torch import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROUND, ROUNDS = 5, 4
SMALL = {"channels": 32, "channel_mults": (1, 2), "num_res_blocks": (1, 1)}


def say(**found: object) -> None:
    """Prints what was found; `accelerator.py` stores it."""
    print(json.dumps(found), flush=True)


def network_of(name: str, *, small: bool) -> tuple[dict, dict]:
    """The stage and the network of a config, as `unet_torch.build_model` takes it."""
    sys.path += [str(ROOT / "configs"), str(ROOT)]  # at the end: configs/ has a base64, too
    from sections import config_of

    name, _, variant = name.partition(":")
    stage = config_of(name, variant or None).to_dict()["stage"]
    network = {**stage["network"], **(SMALL if small else {})}
    learned = stage["diffusion"]["variance"] == "learned"
    network.update(
        resolution=stage["resolution"],
        out_channels=3 * (1 + learned),
        num_classes=stage["num_classes"],
    )
    return stage, network


def make_step(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None
) -> Callable:
    """One optimizer step on a device."""
    params = list(model.parameters())
    ema = [p.detach().clone() for p in params]
    device = images.device
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=device.type == "cuda")
    forward = torch.compile(model)
    extra = {} if labels is None else {"class_labels": labels}

    def step() -> None:
        x0 = images.float() / 127.5 - 1
        alpha, sigma, time_input = levels_at(torch.rand(len(x0), device=device))
        eps = torch.randn_like(x0)
        with torch.autocast(device.type, torch.bfloat16):
            noised = alpha * x0 + sigma * eps
            output = forward(noised, time_input.flatten(), return_dict=False, **extra)[0]
        torch.nn.functional.mse_loss(output[:, :3].float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - 0.9999)

    return step


def levels_at(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`unet_torch.levels_at` on the device of `t`."""
    with torch.device(t.device):
        return twin.levels_at(t)


def main() -> None:
    """Measures the training step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    stage, network = network_of(args.config, small=args.small)
    if stage["kind"] != "base":
        say(problem="the PyTorch side has base models only")
        return
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    batch, size = args.batch_size or 8, network["resolution"]
    say(devices=f"1 x {name}", batch_size=batch, torch=torch.__version__)
    flops = 3 * batch * twin.count_flops(twin.build_model({**network, "num_classes": 0}), size)
    model = twin.build_model(network).to(device, memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, 3, size, size), device=device).byte()
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long, device=device) if network["num_classes"] else None
    step = make_step(model, images, labels)
    wait = torch.cuda.synchronize if cuda else lambda: None
    start = time.perf_counter()
    step()
    wait()
    way = "torch.compile, bf16 autocast, channels_last, fused Adam"
    say(compile_secs=round(time.perf_counter() - start, 1), way=way)
    for _ in range(3):
        step()
    rounds = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(ROUND):
            step()
        wait()
        rounds.append((time.perf_counter() - start) / ROUND)
    secs = statistics.median(rounds)
    found = {"step_ms": 1e3 * secs, "images_per_sec": batch / secs, "tflops": flops / secs / 1e12}
    peak = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}
    say(**found, **peak, parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
