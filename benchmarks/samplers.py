r"""What each sampler makes of so many steps, where the right answer is known.

    python benchmarks/samplers.py

The data are Gaussian, 16 pixels x0 ~ N(m, diag(s^2)) with means from -0.5 to 0.5 and
stds s from 0.1 to 0.9, so that the best denoiser is a formula and no network is
involved: what is left is the error of the sampler. For every grid, sampler and number
of steps it prints the root mean square over the pixels of

    (1)  the error of the mean, in units of s
    (2)  the error of the std, relative to s

and for the samplers without noise that of

    (3)  x - (m + s xT), the end of the exact flow from the same noise xT, and the order
         at which it falls when the steps are doubled, log2 of the ratio. The last step,
         which returns the denoised image, is part of it.

(1) and (2) include the errors of a finite number of samples, given below the table;
(3) has none. `--write` stores the tables in benchmarks/results/samplers.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib

import machine
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = (4, 8, 16, 32, 64, 128)
GRIDS = ("uniform", "quadratic", "logsnr")
STDS = np.linspace(0.1, 0.9, 16)
MEANS = 0.5 * np.cos(np.pi * np.arange(16) * 7 / 15)
OFFSET = 0.008  # of the cosine schedule
SAMPLERS = {
    "ancestral, small": {"name": "ancestral", "variance": "small"},
    "ancestral, between (0.5)": {
        "name": "ancestral",
        "variance": "interpolated",
        "variance_interpolation": 0.5,
    },
    "ancestral, large": {"name": "ancestral", "variance": "large"},
    "DDIM, eta 1": {"name": "ddim", "eta": 1.0},
    "DDIM, eta 0.5": {"name": "ddim", "eta": 0.5},
    "DDIM, eta 0": {"name": "ddim", "eta": 0.0},
    "DPM-Solver++(2M)": {"name": "dpmpp_2m"},
    "Heun": {"name": "heun"},
}
WITHOUT_NOISE = ("DDIM, eta 0", "DPM-Solver++(2M)", "Heun")


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


@functools.cache
def errors(sampler: str, num_steps: int, grid: str, num_samples: int) -> tuple[float, float, float]:
    """Eq. (1), (2) and (3) of one sampler."""
    import jax
    import jax.numpy as jnp

    from cascaded_diffusion.diffusion import gaussian, grids, samplers, schedules
    from cascaded_diffusion.types import Prediction

    means, variances = jnp.float32(MEANS[:, None, None]), jnp.float32(STDS[:, None, None] ** 2)

    def denoise(xt: jax.Array, logsnr: jax.Array) -> Prediction:
        alpha, sigma = gaussian.alpha_sigma_from_logsnr(gaussian.broadcast_right(logsnr, xt))
        whitened = (xt - alpha * means) / (alpha**2 * variances + sigma**2)
        return Prediction(x0=means + alpha * variances * whitened, eps=sigma * whitened)

    schedule = schedules.make_cosine_schedule(offset=OFFSET)
    times = grids.time_grid(grid, num_steps, schedule=schedule, discrete_timesteps=None)
    step = samplers.make_step(**SAMPLERS[sampler])

    @jax.jit
    def run(xt: jax.Array, keys: jax.Array) -> jax.Array:
        return samplers.sample(denoise, xt, keys, schedule=schedule, step=step, times=times)

    noise_keys, keys = (jax.random.split(jax.random.key(seed), num_samples) for seed in (0, 1))
    noise = samplers.normal_per_image(noise_keys, (16, 1, 1))
    x, noise = (np.asarray(v, np.float64).reshape(-1, 16) for v in (run(noise, keys), noise))
    return (
        rms((x.mean(0) - MEANS) / STDS),
        rms(x.std(0) / STDS - 1),
        rms(x - (MEANS + STDS * noise)),
    )


def main() -> None:
    """Runs every sampler in every number of steps and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_samples", type=int, default=16384)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()

    def order(pair: tuple[tuple[float, ...], tuple[float, ...]]) -> str:
        return f" ({np.log2(pair[0][2] / pair[1][2]):.1f})"

    def table(grid: str, names: tuple[str, ...], cell: str) -> list[str]:
        rows = [f"| sampler | {' | '.join(map(str, STEPS))} |", "|---" * (len(STEPS) + 1) + "|"]
        for name in names:
            found = [errors(name, n, grid, args.num_samples) for n in STEPS]
            orders = ["", *map(order, itertools.pairwise(found))]
            cells = [
                cell.format(mean=100 * f[0], std=100 * f[1], flow=f[2], order=order)
                for f, order in zip(found, orders, strict=True)
            ]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        return rows

    lines = ["# Samplers on Gaussian data, by number of steps", ""]
    for grid in GRIDS:
        lines += [
            f"## Grid: {grid}",
            "",
            "Error of the mean / of the std, both in % of the std:",
            "",
            *table(grid, tuple(SAMPLERS), "{mean:.1f} / {std:.1f}"),
            "",
            "Error against the exact flow (and the order, from the column before):",
            "",
            *table(grid, WITHOUT_NOISE, "{flow:.4f}{order}"),
            "",
        ]
    lines += [
        f"Optimal denoiser, 16 pixels of stds 0.1 to 0.9, cosine schedule with offset {OFFSET}."
        f" Heun evaluates the denoiser twice a step. {args.num_samples} samples: a perfect sampler"
        f" would show about {100 / args.num_samples**0.5:.1f} /"
        f" {100 / (2 * args.num_samples) ** 0.5:.1f}.",
        f"Measured on: {machine.describe()}.",
        "Command: `python benchmarks/samplers.py --write`.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        path = ROOT / "benchmarks" / "results" / "samplers.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
