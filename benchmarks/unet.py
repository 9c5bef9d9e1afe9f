"""Our U-Net beside diffusers' `UNet2DModel`: the same network, trained and sampled by both.

    python benchmarks/unet.py --torch_python=PY [--pairs=3] [--rounds=5] [--part=train|sample|both]
        [--write]

PY is the interpreter of an environment with PyTorch and diffusers. The network: 32 px RGB,
64, 128 and 128 channels, two residual blocks a level (three on the way up), attention with
four heads at 16 px and in the middle, scale-shift modulation, 32 groups, swish, strided
convolutions, no classes, no dropout, float32. That both are one function is checked and
printed: diffusers' model takes our weights, name by name and none left over, and must give
our output for the same input; parameters and the FLOPs of a forward pass must be equal within
2 %. What differs is only how it is written: ours has the attention's q, k and v in one product
and the skips' 1x1 convolutions as products, NHWC; theirs three products, NCHW; and ours
computes 3x3 convolutions of 64 channels or more by Winograd's minimal filtering on a CPU, with
a quarter of the multiplications (networks/winograd.py): GFLOP/s count those of the direct sum.

A training step is, on both sides: uint8 images to float, random t, noise, the eps loss, the
gradient, clipping of its global norm, Adam, EMA. Ours is the package's own compiled step and
also computes the metrics that it logs. Sampling is a batch by DDIM, x0 clipped, no guidance:
`Stage.sample`, compiled, against a loop under `torch.inference_mode()`. PyTorch has Adam fused,
and runs eager, eager in channels_last, or compiled: all three are tried beforehand, for either
part, and the fastest (best of three calls) is what ours is compared with. Compiling takes
PyTorch minutes: --no_compile leaves that out, and the result says so. (Compiled in
channels_last a training step takes over fifteen seconds and is left out.)

Each side is a process of its own with as many threads as there are cores; the other sleeps
meanwhile. In each round both are measured, the first in turn; ratios are within a round. As
processes differ by more than rounds, this is done with several pairs of them. Both sides keep
freed memory: ours has malloc do so by itself, PyTorch's is started with what does the same.
With --write the table goes to benchmarks/results/unet.md, with --output=FILE to another file.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import machine
import numpy as np

from cascaded_diffusion.commands import config_flags, entry, jax_setup
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.whole import write_whole

ROOT = pathlib.Path(__file__).resolve().parents[1]
NETWORK = {
    "channels": 64,
    "channel_mults": (1, 2, 2),
    "num_res_blocks": (2, 2, 2),
    "attention_resolutions": (16,),
    "num_heads": 4,
    "dropout_rate": 0.0,
    "patch_size": 1,
    "resample": "conv",
    "scale_shift": True,
    "scale_skips": False,
    "noise_input": "cosine_time",
    "dtype": "float32",
}
SIZE, DDIM_STEPS = 32, 10
TITLES = {"train": "training step", "sample": f"sampling, DDIM, {DDIM_STEPS} steps"}
# Calls of a round.
TIMES = {"train": 3, "sample": 1}
MAX_DIFFERENCE = 1e-3
# What `jax_setup.set_up_jax` asks of malloc.
TUNABLES = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**62}"
MEMORY = (
    "Both sides keep freed memory: ours by itself, PyTorch's process by"
    f" `GLIBC_TUNABLES={TUNABLES}`."
)
# What a thread pool that has just worked may still spin.
REST_SECS = 0.3

# Runs so many calls; returns their seconds.
Runner = Callable[[int], float]


def config_of(batch_size: int) -> RunConfig:
    """Our run config of the network."""
    values = config_flags.load_config_file(ROOT / "configs", "cifar10_base16.py")
    stage = values["stage"]
    stage.update(resolution=SIZE, num_classes=0)
    stage["network"].update(NETWORK)
    stage["diffusion"].update(parameterization="eps", label_dropout_prob=0.0)
    stage["sampler"].update(num_steps=DDIM_STEPS, guidance_scale=1.0)
    values["train"].update(batch_size=batch_size, learning_rate=1e-4, warmup_steps=0)
    values["eval"]["features"] = "rotation"  # nothing is evaluated
    return run_config_from(values)


def our_training(config: RunConfig) -> Runner:
    """The package's training step, compiled, with a state of its own."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.runtime import mesh as mesh_lib
    from cascaded_diffusion.training import step as step_lib

    mesh = mesh_lib.build_mesh(config.mesh)
    stage, train = build_stage(config.stage), config.train
    state = step_lib.init_state(stage, train, mesh)
    image_shape = (SIZE, SIZE, config.stage.channels)
    compiled = step_lib.compile_train_step(stage, train, mesh, state, image_shape)
    shape = (train.batch_size, *image_shape)
    records = mesh_lib.global_batch(
        {
            "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
            "label": np.zeros(train.batch_size, np.int32),
        },
        mesh,
    )

    def run(times: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(times):
            state, metrics = compiled(state, records)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run


def our_sampling(config: RunConfig) -> Runner:
    """`Stage.sample`, compiled."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage

    stage = build_stage(config.stage)
    params = jax.tree.map(jax.numpy.asarray, random_weights(stage))
    keys = jax.random.split(jax.random.key(0), config.train.batch_size)
    sample = jax.jit(lambda params, keys: stage.sample(params, keys))

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(sample(params, keys))
        return time.perf_counter() - start

    return run


def random_weights(stage: Any) -> Any:
    """Parameters none of which is zero, as many fresh ones are: numpy arrays."""
    import jax

    rng = np.random.default_rng(0)

    def values(path: Any, leaf: Any) -> np.ndarray:
        normal = rng.standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) > 1:
            return normal / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return 0.1 * normal + np.float32(path[-1].key == "scale")

    return jax.tree.map_with_path(values, jax.eval_shape(stage.init, jax.random.key(0)))


def our_model(config: RunConfig, folder: pathlib.Path) -> tuple[pathlib.Path, int, int]:
    """A file of weights, an input and the output; the parameters; FLOPs of a forward pass."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.networks.conditioning import cosine_time
    from cascaded_diffusion.networks.flops import count_flops

    stage = build_stage(config.stage)
    params = random_weights(stage)
    inputs = stage.example_inputs(batch_size=1)
    flops = count_flops(stage.network.apply, params, *inputs)
    xt = jax.random.normal(jax.random.key(0), (4, SIZE, SIZE, config.stage.channels))
    logsnr = jax.numpy.linspace(-6.0, 6.0, 4)
    output = jax.jit(stage.network.apply)(params, xt, logsnr, inputs[2])
    flat = {
        "/".join(key.key for key in path): value
        for path, value in jax.tree.leaves_with_path(params)
    }
    path = folder / "weights.npz"
    np.savez(path, **flat, xt=xt, time=cosine_time(logsnr), output=output)
    return path, sum(value.size for value in flat.values()), flops


class Torch:
    """The other side: a process that answers lines with lines."""

    def __init__(self, python: str, batch_size: int, *, no_compile: bool):
        network = json.dumps({**NETWORK, "resolution": SIZE})
        command = [python, str(ROOT / "benchmarks" / "unet_torch.py"), f"--network={network}"]
        command += [f"--batch_size={batch_size}", f"--num_steps={DDIM_STEPS}"]
        command += ["--no_compile"] * no_compile
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "GLIBC_TUNABLES": TUNABLES},
            )
        except OSError as e:
            raise UserError(f"--torch_python={python}: {e.strerror}") from e
        self.about = self._answer()
        if self.about is None or "error" in self.about:
            said = (self.about or {}).get("error", "it ended without a word")
            raise UserError(f"--torch_python={python} cannot import PyTorch and diffusers: {said}")

    def _answer(self) -> dict[str, Any] | None:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Has one of `unet_torch.Side`'s methods run."""
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            raise RuntimeError(f"unet_torch.py ended while it was asked to {do}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def ceiling() -> str:
    """What one large matrix product of XLA's reaches: a convolution can hardly do better."""
    import jax

    n = 2048
    x = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(jax.numpy.dot)
    secs = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        secs.append(time.perf_counter() - start)
    return (
        f"One product of {n} x {n} matrices by XLA: {2 * n**3 / min(secs[1:]) / 1e9:.0f} GFLOP/s."
    )


def same_network(torch: Torch, config: RunConfig) -> list[str]:
    """What tells that both sides have one network, checked."""
    with tempfile.TemporaryDirectory() as folder:
        path, parameters, flops = our_model(config, pathlib.Path(folder))
        difference = torch.ask("check", path=str(path))["difference"]
    assert difference < MAX_DIFFERENCE, difference
    lines = []
    for name, ours in (("parameters", parameters), ("flops", flops)):
        theirs = torch.about[name]
        assert abs(ours / theirs - 1) < 0.02, (name, ours, theirs)
    lines.append(
        f"Parameters: ours {parameters:,}, diffusers {torch.about['parameters']:,}. FLOPs of a"
        f" forward pass of one image (a multiply-add is two): ours {flops:,}, diffusers"
        f" {torch.about['flops']:,}. With the same weights the outputs differ by at most"
        f" {difference:.1e} of their standard deviation."
    )
    return lines


def way_text(name: str, tried: dict[str, Any]) -> str:
    """One of PyTorch's ways, and how it did."""
    if "error" in tried:
        return f"{name} failed ({tried['error']})"
    return f"{name} {tried['secs']:.2f} s (the first call {tried['first']:.0f} s)"


def measure(part: str, ours: Runner, torch: Torch, args: argparse.Namespace) -> dict[str, Any]:
    """One part: images/s of both sides in every round, and what PyTorch's ways did beforehand."""
    compile_secs, times = ours(1), TIMES[part]
    # As in a round, until memory stops growing.
    ours(times)
    ours(times)
    time.sleep(REST_SECS)
    probe = torch.ask("probe", part=part)
    ways = "; ".join(way_text(name, tried) for name, tried in probe["tried"].items())
    ways += "; torch.compile not tried" * args.no_compile
    say(f"{TITLES[part]}: {ways}")
    sides = {
        "ours": lambda: ours(times),
        "diffusers": lambda: torch.ask("run", part=part, times=times)["secs"],
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            time.sleep(REST_SECS)
            rates[name].append(args.batch_size * times / sides[name]())
        last = {name: found[-1] for name, found in rates.items()}
        say(
            f"{TITLES[part]}, round {number + 1}: ours {last['ours']:.2f} images/s, diffusers"
            f" {last['diffusers']:.2f}, ratio {last['ours'] / last['diffusers']:.3f}"
        )
    return {"rates": rates, "chosen": probe["chosen"], "ways": ways, "compile_secs": compile_secs}


def say(text: str) -> None:
    """Progress, on stderr: what a pair of processes prints is its result."""
    print(text, file=sys.stderr, flush=True)


def run_pair(args: argparse.Namespace) -> dict[str, Any]:
    """One process of ours, this one, and one of PyTorch's: all that they measured."""
    torch = Torch(args.torch_python, args.batch_size, no_compile=args.no_compile)
    jax_setup.set_up_jax()
    config = config_of(args.batch_size)
    found = {"notes": [ceiling(), *same_network(torch, config)], "parts": {}, **torch.about}
    say("\n".join(found["notes"]))
    makers = {"train": our_training, "sample": our_sampling}
    for part in parts_of(args):
        found["parts"][part] = measure(part, makers[part](config), torch, args)
    torch.close()
    return found


def parts_of(args: argparse.Namespace) -> list[str]:
    """The parts that are asked for."""
    return [part for part in TITLES if args.part in (part, "both")]


def start_pair(argv: Sequence[str]) -> dict[str, Any]:
    """`run_pair` in processes of their own."""
    command = [sys.executable, __file__, *argv, "--pair"]
    # Ours is to ask malloc by itself.
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)
    if result.returncode:
        sys.exit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"**{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"


def rows_of(part: str, pairs: list[dict[str, Any]]) -> list[str]:
    """A part's rows of the table: one for each pair of processes, and one of all."""
    rows, medians = [], []
    for number, pair in enumerate(pairs, 1):
        found = pair["parts"][part]
        rates = found["rates"]
        middle = {name: statistics.median(values) for name, values in rates.items()}
        per_image = pair["flops"] * (3 if part == "train" else DDIM_STEPS) / 1e9
        ratios = [a / b for a, b in zip(rates["ours"], rates["diffusers"], strict=True)]
        medians.append(statistics.median(ratios))
        rows.append(
            f"| {TITLES[part]}, {number} | {middle['ours']:.2f} | {middle['diffusers']:.2f} |"
            f" {found['chosen']} | {middle['ours'] * per_image:.0f},"
            f" {middle['diffusers'] * per_image:.0f} | {' '.join(f'{x:.2f}' for x in ratios)} |"
            f" {spread(ratios)} |"
        )
    if len(pairs) > 1:
        rows.append(f"| {TITLES[part]}, medians of all | | | | | | {spread(medians)} |")
    return rows


def page(pairs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The result, for people."""
    notes = [*pairs[0]["notes"], MEMORY]
    for part in parts_of(args):
        for number, pair in enumerate(pairs, 1):
            found = pair["parts"][part]
            notes.append(
                f"PyTorch's ways, {TITLES[part]}, {number}, best of three calls beforehand:"
                f" {found['ways']}. Ours: the first call {found['compile_secs']:.0f} s."
            )
    return "\n".join(
        [
            "# Our U-Net beside diffusers'",
            "",
            f"| batch {args.batch_size}, 32 px; pair of processes | ours, images/s |"
            " diffusers, images/s | its fastest way | ours, theirs, GFLOP/s |"
            " ratio in each round | ratio, median (least to most) |",
            "|---|---|---|---|---|---|---|",
            *(row for part in parts_of(args) for row in rows_of(part, pairs)),
            "",
            *(line for note in notes for line in (note, "")),
            f"Images/s are medians of {args.rounds} rounds; {TIMES['train']} steps, or"
            f" {TIMES['sample']} batch of samples, a round and side; float32.",
            f"Measured on: {machine.describe()}; {pairs[0]['library']}.",
            "Command: `python benchmarks/unet.py --torch_python=PY"
            f" --pairs={args.pairs} --rounds={args.rounds} --batch_size={args.batch_size}"
            f" --part={args.part}{' --no_compile' * args.no_compile}`.",
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Measures, prints, and with --write or --output stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch_python")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--part", choices=("train", "sample", "both"), default="both")
    parser.add_argument("--no_compile", action="store_true", help="PyTorch eager only")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--pair", action="store_true", help="one pair, its result as JSON")
    args = parser.parse_args(list(argv)[1:])
    if not args.torch_python:
        raise UserError("--torch_python is missing: a Python that has PyTorch and diffusers")
    for name in ("pairs", "rounds", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected at least 1")
    if args.pair:
        print(json.dumps(run_pair(args)))
        return 0
    text = page([start_pair(argv[1:]) for _ in range(args.pairs)], args)
    print(text)
    if args.write:
        write_whole(ROOT / "benchmarks" / "results" / "unet.md", text.encode())
    if args.output:
        write_whole(args.output, text.encode())
    return 0


if __name__ == "__main__":
    entry.run(main)
