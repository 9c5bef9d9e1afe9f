"""What the compiler for NVIDIA GPUs makes of a training step. Needs no GPU.

    PY benchmarks/gpu_program.py [--config=base64] [--batch_size=64] [--blocks=1] [--write]

PY is the Python of an environment with `jax[cuda13]` and this project. XLA compiles the step for
an H100 that is only described to it, without trying kernels out. Of the compiled program are
counted the kernels and the bytes that they read and write, by kind: a byte of a feature map that
is read again in another kernel counts again. What is not a product or a convolution takes about
as long as its bytes take at the memory's bandwidth. --blocks replaces the number of residual
blocks of every level, which compiles sooner. --without has one thing computed as elsewhere that a
GPU computes in its own way: `parts`, skips in parts; `order`, gradients in their parameters' order,
and `memory`, written before they are used; `slope`, swish's slope twice; `pairs`, two sums in one.
With --write the table is appended to benchmarks/results/gpu_program.md. Where XLA finds no way to
compute a product without trying, XLA_FLAGS=--xla_gpu_enable_triton_gemm=false has cuBLAS do it.
"""

import argparse
import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import machine

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no GPU to check against
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}"

from cascaded_diffusion.commands import config_flags, entry
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.accelerators import ACCELERATORS

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu_program.md"
# The H100 SXM, as its maker describes it and CUDA reports it.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
# What --without takes away: a function, and what stands in for it.
OWN_WAYS: dict[str, tuple[str, Callable]] = {
    "parts": ("layers.for_platform", lambda *, default, **_: default),
    "order": ("kernels.layouts.in_order", lambda grads, shardings: grads),
    "memory": ("kernels.layouts.in_memory", lambda values: values),
    "slope": ("kernels.norms.in_memory", lambda values: values),
    "pairs": ("kernels.sums.for_platform", lambda *, default, **_: default),
}
# The first that matches names the kind.
KINDS = {
    "convolutions": "__cudnn.conv",
    "attention": "fmha",
    "products": "gemm|matmul|dot",
    "transposes": "transpose",
    "copies": "copy|concatenate|slice",
    "reductions": "reduce",
    "elementwise": "",
}


@contextlib.contextmanager
def without(name: str | None) -> Iterator[None]:
    """In the context, nothing or one thing is computed as elsewhere than on a GPU."""
    if name is None:
        yield
        return
    function, elsewhere = OWN_WAYS[name]
    with mock.patch(f"cascaded_diffusion.networks.{function}", elsewhere):
        yield


def program(config: str, batch_size: int, blocks: int | None) -> tuple[str, float]:
    """The compiled step's text, and the seconds of compilation."""
    import jax
    from jax.experimental import topologies

    from cascaded_diffusion.cascade.build import build_stage
    from cascaded_diffusion.networks.kernels.platforms import traced_for
    from cascaded_diffusion.runtime import mesh as mesh_lib
    from cascaded_diffusion.training import step

    jax.config.update("jax_enable_compilation_cache", False)
    values = config_flags.load_config_file(ROOT / "configs", f"{config}.py")
    network = values["stage"]["network"]
    if blocks is not None:
        network["num_res_blocks"] = (blocks,) * len(network["channel_mults"])
    values["train"].update(batch_size=batch_size, accumulation_steps=None)
    run = run_config_from(values)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
    except NotImplementedError as e:
        raise UserError(f"{sys.executable} has no jax[cuda13]: {e}") from e
    one = dataclasses.replace(run.mesh, data=1, fsdp=1, tensor=1)
    mesh = mesh_lib.build_mesh(one, list(topology.devices))
    stage = build_stage(run.stage)
    start = time.monotonic()
    with traced_for("gpu"):
        state = step.abstract_state(stage, run.train, mesh)
        shapes = step.record_shapes(run)
        compiled = step.compile_train_step(stage, run.train, mesh, state, **shapes)
    return compiled.as_text(), time.monotonic() - start


def _size(dims: str) -> int:
    """The number of elements of dimensions such as "64,8,8"."""
    return math.prod(int(n) for n in dims.split(",") if n)


def bytes_of(shape: str) -> int:
    """The bytes of an HLO shape, or of all arrays of a tuple's."""
    return sum(
        BYTES.get(dtype, 4) * _size(dims) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def kernels(text: str) -> Iterator[tuple[str, str, int]]:
    """Name, result's shape and bytes read and written of every kernel of a compiled program."""
    entry_computation = text[text.index("\nENTRY ") :]
    shapes: dict[str, str] = {}
    for line in entry_computation.splitlines():
        found = re.match(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)", line)
        if found is None:
            continue
        name, shape, operation, operands, rest = found.groups()
        shapes[name] = shape
        if operation in NO_KERNEL:
            continue
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        read = sum(bytes_of(shapes.get(x, "")) for x in re.findall(r"%([\w.-]+)", operands))
        yield target[1] if target else name, shape, read + bytes_of(shape)


def counted(text: str) -> dict[str, tuple[int, int]]:
    """Kernels and bytes by kind."""
    numbers: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for name, _, size in kernels(text):
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
        numbers[kind] += 1
        moved[kind] += size
    return {kind: (numbers[kind], moved[kind]) for kind in KINDS if numbers[kind]}


def wide_maps(text: str) -> int:
    """Bytes of float32 feature maps [B, H, W, C] that kernels write where bfloat16 would do."""
    return sum(
        bytes_of(f"f32[{dims}]")
        for _, shape, _ in kernels(text)
        for dims in re.findall(r"f32\[(\d+,\d+,\d+,\d+)\]", shape)
        if int(dims.split(",")[1]) >= 8 and int(dims.split(",")[3]) >= 32
    )


def serial_sums(text: str) -> int:
    """Reductions of feature maps inside of kernels for something else: a thread per result."""
    bodies = dict(re.findall(r"^%(\S+) \(.*\) -> .* \{\n((?:  .*\n)+)\}", text, re.M))
    found = 0
    for name, kind, body in re.findall(r"%(\S+) = .* fusion\(.*kind=(\w+), calls=%([\w.-]+)", text):
        if "reduce" in name or kind == "kCustom":
            continue
        dims = dict(re.findall(r"%(\S+) = \w+\[([\d,]+)\]", bodies.get(body, "")))
        sums = re.findall(r"= \w+\[([\d,]+)\]\S* reduce\(%([\w.-]+)", bodies.get(body, ""))
        sizes = ((_size(dims.get(of, "")), _size(result)) for result, of in sums)
        found += sum(size >= 48 * result and size > 1e5 for size, result in sizes)
    return found


def main(argv: Sequence[str]) -> int:
    """Compiles, counts, prints, and with --write stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="base64")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--without", choices=tuple(OWN_WAYS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--save", type=pathlib.Path, help="a file for the program's text")
    args = parser.parse_args(list(argv)[1:])
    if not (ROOT / "configs" / f"{args.config}.py").is_file():
        raise UserError(f"--config={args.config}: there is no configs/{args.config}.py")
    given = os.environ["XLA_FLAGS"].removeprefix("--xla_gpu_autotune_level=0").strip()
    flags = f"XLA_FLAGS={shlex.quote(given)} " if given else ""
    with without(args.without):
        text, secs = program(args.config, args.batch_size, args.blocks)
    if args.save:
        args.save.write_text(text)
    found = counted(text)
    bandwidth = ACCELERATORS["h100"].memory_bandwidth
    rows = [*found.items(), ("all", tuple(map(sum, zip(*found.values(), strict=True))))]
    blocks = "" if args.blocks is None else f", {args.blocks} residual blocks a level"
    less = "" if args.without is None else f", without {args.without}"
    lines = [
        f"## {args.config}, batch {args.batch_size}{blocks}{less}",
        "",
        "| | kernels | GB read and written | ms at the memory's bandwidth |",
        "|---|---|---|---|",
        *(
            f"| {kind} | {number:,} | {size / 1e9:.2f} | {1e3 * size / bandwidth:.1f} |"
            for kind, (number, size) in rows
        ),
        "",
        f"Float32 feature maps written: {wide_maps(text) / 1e9:.2f} GB. Sums over feature maps that"
        f" one thread adds up: {serial_sums(text)}. Traced and compiled in {secs:.0f} s, without"
        f" autotuning, on: {machine.describe()}.",
        f"Command: `{flags}python benchmarks/gpu_program.py {' '.join(argv[1:])}`.",
        "",
    ]
    print("\n".join(lines))
    if args.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        title = "" if RESULT.exists() else "# Training steps as compiled for an H100\n\n"
        with RESULT.open("a") as file:
            file.write(title + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    entry.run(main)
