"""A diffusers `UNet2DModel` trained for some seconds: the peer of `run.py --table=peer`.

Needs PyTorch, diffusers and NumPy, nothing of ours. Everything is as in diffusers' own script for
unconditional images (examples/unconditional_image_generation/train_unconditional.py) with its
default values: DDPM's 1,000 steps with linear betas, the squared error of eps, AdamW with 1e-4,
betas 0.95 and 0.999 and a weight decay of 1e-6, a warm-up of 500 steps, batches of 16, flips,
clipping at 1, an EMA with the power of 3/4. The learning rate's cosine, over 100 epochs there, ends
with the time here. Samples are those of the EMA.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time

# diffusers imports torchvision where it is installed, and one built for another PyTorch breaks
# that import. The U-Net needs none.
sys.modules["torchvision"] = None

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.optimization import get_cosine_schedule_with_warmup  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402

BATCH, WARMUP = 16, 500
RATE_STEPS = 5


def build(size: int, widths: list[int]) -> UNet2DModel:
    """The script's network, or one of other widths; the second level from below attends."""
    attends = [i == len(widths) - 2 for i in range(len(widths))]
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
    )


def train(
    model: UNet2DModel, images: torch.Tensor, seconds: float, device: str
) -> tuple[EMAModel, int]:
    """Trains for some seconds; returns the average and the number of steps."""
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    ema = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
        model_cls=UNet2DModel, model_config=model.config,
    )  # fmt: skip
    lr_schedule, start, step, total = None, time.monotonic(), 0, 0
    while (gone := time.monotonic() - start) < seconds:
        if step == RATE_STEPS:  # the cosine needs to know how many steps there will be
            total = max(step + 1, int(step * seconds / gone))
            lr_schedule = get_cosine_schedule_with_warmup(
                optimizer, min(WARMUP, total // 10), total
            )
        clean = images[torch.randint(len(images), (BATCH,))].to(device).float() / 127.5 - 1
        mirrored = (torch.rand(BATCH, device=device) < 0.5)[:, None, None, None]
        clean = torch.where(mirrored, clean.flip(-1), clean)
        noise = torch.randn_like(clean)
        times = torch.randint(1000, (BATCH,), device=device)
        output = model(schedule.add_noise(clean, noise, times), times).sample
        torch.nn.functional.mse_loss(output, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if lr_schedule is not None:
            lr_schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        step += 1
    return ema, step


@torch.no_grad()
def sample(model: UNet2DModel, count: int, steps: int, size: int, device: str) -> np.ndarray:
    """Images uint8 [n, H, W, 3]: DDPM's own chain of 1,000 steps, or DDIM with fewer."""
    kind = DDPMScheduler if steps == 1000 else DDIMScheduler
    schedule, made = kind(num_train_timesteps=1000, beta_schedule="linear"), []
    schedule.set_timesteps(steps)
    for start in range(0, count, 100):
        x = torch.randn(min(100, count - start), 3, size, size, device=device)
        for t in schedule.timesteps:
            x = schedule.step(model(x, t).sample, t, x).prev_sample
        pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        made.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(made)


def main() -> None:
    """Trains, samples, and writes both down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help=".npz with arr_0 uint8 [n, H, W, 3]")
    parser.add_argument("--output", required=True, help=".npz for arr_0, the samples")
    parser.add_argument("--widths", required=True, type=lambda x: [int(w) for w in x.split(",")])
    parser.add_argument("--seconds", required=True, type=float)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--num_samples", required=True, type=int)
    parser.add_argument("--num_steps", required=True, type=int)
    flags = parser.parse_args()
    torch.manual_seed(flags.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.from_numpy(np.load(flags.images)["arr_0"]).permute(0, 3, 1, 2)
    model = build(images.shape[-1], flags.widths).to(device)
    ema, steps = train(model, images, flags.seconds, device)
    ema.copy_to(model.parameters())
    made = sample(model.eval(), flags.num_samples, flags.num_steps, images.shape[-1], device)
    np.savez(flags.output, arr_0=made)
    params = sum(math.prod(p.shape) for p in model.parameters())
    print(json.dumps({"steps": steps, "params": params, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
