"""One part of `accelerator.py`, measured in this process: lines of JSON, as soon as known."""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import kernel_times
import machine  # noqa: F401, for the package of this tree

from cascaded_diffusion.commands import config_flags, jax_setup
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCHES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Steps of a round, and rounds: long enough for a clock, short enough for a machine by the minute.
ROUND, ROUNDS, TRACED = 5, 4, 5
SMALL = {
    "channels": 8,
    "channel_mults": (1,),
    "num_res_blocks": (1,),
    "attention_resolutions": (),
    "num_heads": 2,
}


def say(**found: object) -> None:
    """Prints what was found; `accelerator.py` stores it."""
    print(json.dumps(found), flush=True)


def config_of(name: str, batch_size: int | None, *, small: bool) -> RunConfig:
    """The config as it is trained, but for the batch and for examples taken one by one."""
    name, colon, variant = name.partition(":")
    values = config_flags.load_config_file(ROOT / "configs", f"{name}.py{colon}{variant}")
    values["train"]["accumulation_steps"] = None
    if small:
        values["stage"]["network"].update(SMALL)
    values["train"]["batch_size"] = batch_size or BATCHES[0]
    return run_config_from(values)


def with_batch(config: RunConfig, batch_size: int) -> RunConfig:
    """The config with another batch."""
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=batch_size)
    )


def placed(config: RunConfig, batch_size: int | None) -> RunConfig:
    """The config on the devices that are here, with the largest batch that fits by estimate."""
    import jax

    from cascaded_diffusion.planning import fit

    devices, memory = jax.device_count(), fit.device_bytes()
    if batch_size is not None:
        return fit.choose_fsdp(config, devices, memory)[0]
    for batch in reversed(BATCHES):
        chosen = fit.choose_fsdp(with_batch(config, batch), devices, memory)[0]
        if batch % devices == 0 and fit.fits(fit.step_memory(chosen, devices).total, memory):
            return chosen
    return fit.choose_fsdp(with_batch(config, devices), devices, memory)[0]


def timed(run: Callable[[], object]) -> float:
    """Median seconds of a call, which returns what has to be waited for."""
    import jax

    jax.block_until_ready([run() for _ in range(2)])
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(ROUND):
            result = run()
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / ROUND)
    return statistics.median(rounds)


def rate(config: RunConfig, secs: float, flops: float) -> dict[str, object]:
    """A time for a batch, as images/s, TFLOP/s and MFU."""
    import jax

    from cascaded_diffusion.runtime.accelerators import accelerator_of

    device = jax.devices()[0].device_kind
    found = {
        "step_ms": 1e3 * secs,
        "images_per_sec": config.train.batch_size / secs,
        "tflops": flops / secs / 1e12,
    }
    accelerator = accelerator_of(device)
    if accelerator is None:
        print(f"{device}: not in the table of peaks, so MFU is left out", file=sys.stderr)
        return found
    return {**found, "mfu": flops / secs / jax.device_count() / accelerator.peak_flops}


def traced(run: Callable[[], object]) -> dict[str, object]:
    """Milliseconds a step by kind of kernel, and of the largest kernels."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run() for _ in range(TRACED)])
        trace = pathlib.Path(folder)
        return {
            "kernels": kernel_times.by_kind(trace, TRACED),
            "largest": kernel_times.largest(trace, TRACED),
        }


class Training:
    """The training step of a config on random images."""

    def __init__(self, config: RunConfig):
        import jax
        import numpy as np

        from cascaded_diffusion.cascade.build import build_stage
        from cascaded_diffusion.runtime import mesh as mesh_lib
        from cascaded_diffusion.training import step as step_lib

        self._lib, self._config = step_lib, config
        self._mesh = mesh_lib.build_mesh(config.mesh)
        self._stage = build_stage(config.stage)
        self._abstract = step_lib.abstract_state(self._stage, config.train, self._mesh)
        self._shapes = step_lib.record_shapes(config)
        rng, batch = np.random.default_rng(0), config.train.batch_size
        records = {
            name.removesuffix("_shape"): rng.integers(0, 256, (batch, *shape), np.uint8)
            for name, shape in self._shapes.items()
            if shape is not None
        }
        records["label"] = np.zeros(batch, np.int32)
        self._records = mesh_lib.global_batch(records, self._mesh)
        self._jax = jax

    def compile(self) -> float:
        """Traces and compiles the step; the seconds."""
        start = time.perf_counter()
        self._compiled = self._lib.compile_train_step(
            self._stage,
            self._config.train,
            self._mesh,
            self._abstract,
            **self._shapes,
        )
        return time.perf_counter() - start

    def start(self) -> None:
        """Makes the first state."""
        self._state = self._lib.init_state(self._stage, self._config.train, self._mesh)

    def step(self) -> object:
        """One step; what it computed besides the state."""
        self._state, metrics = self._compiled(self._state, self._records)
        return metrics

    def flops(self) -> float:
        """Model FLOPs of a step."""
        return self._lib.flops_per_step(self._stage, self._config.train.batch_size)


def train(config: RunConfig) -> None:
    """Compiles and times the training step."""
    from cascaded_diffusion.runtime.monitor import peak_memory

    training = Training(config)
    say(batch_size=config.train.batch_size, compile_secs=round(training.compile(), 1))
    training.start()
    secs = timed(training.step)
    memory = peak_memory()
    peak = {"peak_gb": memory.get("device_peak_gb", memory["host_peak_gb"])}
    say(**rate(config, secs, training.flops()), **peak)
    say(**traced(training.step))


def cached(config: RunConfig) -> None:
    """Compiles the training step again, which the cache holds."""
    training = Training(config)
    say(batch_size=config.train.batch_size, compile_secs=round(training.compile(), 1))


def forward(config: RunConfig) -> None:
    """Compiles and times the forward pass alone, without dropout."""
    import jax

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.networks.flops import count_flops

    stage, batch = build_stage(config.stage), config.train.batch_size
    params = jax.jit(stage.init)(jax.random.key(0))
    inputs = stage.example_inputs(batch_size=batch)
    start = time.perf_counter()
    apply = jax.jit(stage.network.apply).lower(params, *inputs).compile()
    say(batch_size=batch, compile_secs=round(time.perf_counter() - start, 1))
    one = stage.example_inputs(batch_size=1)
    flops = batch * count_flops(stage.network.apply, params, *one)
    say(**rate(config, timed(lambda: apply(params, *inputs)), flops))
    say(**traced(lambda: apply(params, *inputs)))


def main() -> int:
    """Measures one part. Out of memory is a finding: the next smaller batch to try."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--part", choices=("train", "cached", "forward"), required=True)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache and not os.environ.get("ACCELERATOR_KEEP_CACHE"):
        shutil.rmtree(cache, ignore_errors=True)
    jax = jax_setup.set_up_jax()
    kinds = sorted({device.device_kind for device in jax.devices()})
    say(devices=f"{jax.device_count()} x {', '.join(kinds)}")
    config = placed(config_of(args.config, args.batch_size, small=args.small), args.batch_size)
    try:
        {"train": train, "cached": cached, "forward": forward}[args.part](config)
    except (jax.errors.JaxRuntimeError, UserError) as e:
        batch = config.train.batch_size
        smaller = [size for size in BATCHES if size < batch]
        memory = "RESOURCE_EXHAUSTED" in str(e)
        problem = f"out of memory at batch {batch}" if memory else str(e).splitlines()[0]
        say(problem=problem, **({"smaller": smaller[-1]} if memory and smaller else {}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
