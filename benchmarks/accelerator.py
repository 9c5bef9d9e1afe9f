"""How fast training is on the accelerators that are here, for a machine one has for minutes.

    python benchmarks/accelerator.py [--configs=base64,sr64,sr256] [--batch_sizes=64,24,12]
        [--seconds=480] [--torch] [--flags=FLAG ...] [--output=FILE] [--write]

A config may name a variant, as in cifar10_sr32:gpu. For each, in this order: the training step
(compiled with an empty cache, timed, traced), the first one by PyTorch with --torch (or
--torch_python=PY, if another Python has it), the compilation again from the cache, the forward pass
alone, and the first training step again with each of the --flags, which are added to XLA_FLAGS one
by one. Every part is a process with a time limit of its own, which is what is left of --seconds if
that is less, and what a part has found is printed and stored at once: a part that is stopped keeps
what it had. The compilation cache stays in .cache/accelerator, so that another call with other
configs or parts starts sooner; --keep_cache has the first compilation use it, and is then not
called cold.

Without --batch_sizes, a batch is the largest of 8, 12, 16, 24, 32, ... that fits by `plan`'s
estimate; one that does not fit after all is tried again at the next smaller. TFLOP/s count a
multiply-add as two and three forward passes a step, not what is computed again. MFU is their
share of the device's peak for dense bfloat16 products, for devices in `runtime/accelerators.py`.

--small has tiny networks, to try all of it on a CPU. Rows are JSON lines in --output, by default
.cache/accelerator/rows.jsonl; --write makes benchmarks/results/accelerator.md of them.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import machine

from cascaded_diffusion.commands import entry
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime.accelerators import accelerator_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "accelerator"
RESULT = ROOT / "benchmarks" / "results" / "accelerator.md"
# The seconds that a part may take; compiling takes most of them.
LIMITS = {"train": 240, "torch": 200, "cached": 90, "forward": 120}
# With less, no part is begun: starting Python, JAX and the device takes that long.
LEAST_SECS = 20
SHOWN = 14  # of the largest kernels
Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: what it measures of which config."""

    name: str
    config: str
    batch_size: int | None
    flags: str = ""  # of XLA

    def command(self, args: argparse.Namespace) -> list[str]:
        """The command that measures it and prints what it finds as lines of JSON."""
        python, script = sys.executable, "accelerator_part.py"
        if self.name == "torch":
            python, script = args.torch_python or sys.executable, "accelerator_torch.py"
        command = [python, str(ROOT / "benchmarks" / script), f"--config={self.config}"]
        if self.name != "torch":
            command.append(f"--part={self.name}")
        if self.batch_size is not None:
            command.append(f"--batch_size={self.batch_size}")
        return command + ["--small"] * args.small


def lines_of(process: subprocess.Popen[str], limit: float) -> Iterator[str]:
    """What a process prints, line by line, until it ends. Raises TimeoutError after `limit`."""
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + limit
    while True:
        try:
            line = said.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield line


def measure(part: Part, args: argparse.Namespace, limit: float) -> Row:
    """Runs a part. What it printed until it ended or was stopped is its row."""
    row: Row = {"config": part.config, "part": f"{part.name} {part.flags}".strip()}
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla" / part.config)}
    env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {part.flags}".strip()
    if part.flags:
        env["JAX_COMPILATION_CACHE_DIR"] += "_flags"
    env["ACCELERATOR_KEEP_CACHE"] = "1" if args.keep_cache or part.name != "train" else ""
    start = time.monotonic()
    with subprocess.Popen(
        part.command(args), stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
    ) as process:
        try:
            for line in lines_of(process, limit):
                if line.startswith("{"):
                    found = json.loads(line)
                    row.update(found)
                    say(part, found)
            if process.wait() != 0 and "problem" not in row:
                row["problem"] = f"ended with exit code {process.returncode}"
        except TimeoutError:
            process.kill()
            row["problem"] = f"stopped after {limit:.0f} s"
    accelerator = accelerator_of(str(row.get("devices", "")).partition(" x ")[2])
    if part.name == "torch" and accelerator is not None and "tflops" in row:
        row["mfu"] = row["tflops"] * 1e12 / accelerator.peak_flops
    row["wall_secs"] = round(time.monotonic() - start, 1)
    return row


def say(part: Part, found: Row) -> None:
    """Prints what a part has just found."""
    shown = ", ".join(f"{key} {value}" for key, value in found.items() if key != "kernels")
    print(f"{part.config} {part.name} {part.flags}: {shown}", flush=True)


def parts_of(args: argparse.Namespace) -> list[Part]:
    """All parts, the most important first."""
    batches = args.batch_sizes or [None] * len(args.configs)
    runs = list(zip(args.configs, batches, strict=True))
    parts = [Part("train", config, batch) for config, batch in runs]
    if args.torch_python or args.torch:
        parts.insert(1, Part("torch", *runs[0]))
    parts += [Part(name, *run) for run in runs for name in ("cached", "forward")]
    return parts + [Part("train", *runs[0], flags) for flags in args.flags]


def run_all(args: argparse.Namespace, about: Row) -> list[Row]:
    """Measures the parts while time is left, and stores each row as it is finished."""
    end, rows, batches = time.monotonic() + args.seconds, [], {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a") as file:

        def store(row: Row) -> None:
            rows.append(row)
            file.write(json.dumps({**row, **about}) + "\n")
            file.flush()
            os.fsync(file.fileno())

        for part in parts_of(args):
            # The others take the batch that the training step was found to fit with.
            part = dataclasses.replace(part, batch_size=batches.get(part.config, part.batch_size))
            while True:
                left = end - time.monotonic()
                if left < LEAST_SECS:
                    row = {"config": part.config, "part": part.name, "problem": "no time left"}
                    say(part, row)
                    store(row)
                    break
                row = measure(part, args, min(left, LIMITS[part.name]))
                store(row)
                if "batch_size" in row:
                    batches[part.config] = row["batch_size"]
                if not row.get("smaller"):
                    break
                part = dataclasses.replace(part, batch_size=row["smaller"])
    return rows


COLUMNS = {
    "batch_size": "batch",
    "compile_secs": "trace + compile, s",
    "step_ms": "a step, ms",
    "images_per_sec": "images/s",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "peak_gb": "peak, GB",
    "kernels": "kernels by kind, ms a step",
    "problem": "",
}


def cell(key: str, value: object) -> str:
    """A value as the table has it."""
    if value is None:
        return ""
    if key == "mfu":
        return f"**{100 * value:.1f} %**"
    if key == "kernels":
        return ", ".join(f"{kind} {ms:.1f}" for kind, ms in value.items())
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as a table, without columns that nothing is in."""
    used = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = ["| | " + " | ".join(COLUMNS[key] for key in used) + " |"]
    lines.append("|---" * (len(used) + 1) + "|")
    for row in rows:
        cells = (cell(key, row.get(key)) for key in used)
        lines.append(f"| {row['config']}, {row['part']} | " + " | ".join(cells) + " |")
    trained = {row["config"]: row.get("images_per_sec") for row in rows if row["part"] == "train"}
    for row in rows:
        ours = trained.get(row["config"])
        if row["part"] == "torch" and row.get("images_per_sec") and ours:
            ratio = ours / row["images_per_sec"]
            lines += ["", f"{row['config']}: {ratio:.2f} times PyTorch's images/s ({row['way']})."]
    for row in rows:
        if largest := list(row.get("largest", {}).items())[:SHOWN]:
            lines += ["", f"| {row['config']}, {row['part']}: kernel | ms a step |", "|---|---|"]
            lines += [f"| `{name}` | {ms:.2f} |" for name, ms in largest]
    return lines


def main(argv: Sequence[str]) -> int:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default="base64,sr64,sr256", type=lambda x: x.split(","))
    parser.add_argument("--batch_sizes", type=lambda x: [int(n) for n in x.split(",")])
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--torch", action="store_true", help="beside PyTorch of this Python")
    parser.add_argument("--torch_python", help="beside PyTorch of another Python")
    parser.add_argument("--flags", action="append", default=[], help="of XLA, to be tried")
    parser.add_argument("--keep_cache", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    parser.add_argument("--output", type=pathlib.Path, default=CACHE / "rows.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(list(argv)[1:])
    for name in args.configs:
        file = f"configs/{name.partition(':')[0]}.py"
        if not (ROOT / file).is_file():
            raise UserError(f"--configs: there is no {file}")
    if args.batch_sizes and len(args.batch_sizes) != len(args.configs):
        raise UserError(
            f"--batch_sizes: {len(args.batch_sizes)} numbers for {len(args.configs)} --configs"
        )
    if args.batch_sizes and min(args.batch_sizes) < 1:
        raise UserError(f"--batch_sizes={min(args.batch_sizes)}: expected at least 1")
    if args.seconds < LEAST_SECS:
        raise UserError(f"--seconds={args.seconds:g}: expected at least {LEAST_SECS}")
    command = " ".join(["python benchmarks/accelerator.py", *argv[1:]])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"machine": machine.describe(), "command": command, "at": now}
    rows = run_all(args, about)
    devices = next((str(row["devices"]) for row in rows if "devices" in row), "no device")
    text = [
        "# Training on accelerators",
        "",
        *table(rows),
        "",
        "TFLOP/s count a multiply-add as two and three forward passes a step; MFU is their share"
        " of the device's peak for dense bfloat16 products. `cached` is the compilation from the"
        " cache. Kernels are of a traced step.",
        "",
        f"Measured on: {devices}; {about['machine']}; {now}.",
        f"Command: `{command}`.",
        "",
    ]
    print("\n".join(text))
    if args.write:
        write_whole(RESULT, "\n".join(text).encode())
    return 0


if __name__ == "__main__":
    entry.run(main)
