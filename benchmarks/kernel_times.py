"""What a profiler trace says of the time a device spends, by kind of kernel."""

import collections
import pathlib
import re

from jax.profiler import ProfileData

# In this order: the first that matches an operation or kernel names its kind.
KINDS = {
    "collectives": r"nccl|all-reduce|all-gather|reduce-scatter|all-to-all|collective",
    "convolutions and products": (
        r"conv(?!ert)|gemm|xmma|cutlass|cublas|nvjet|wgrad|dgrad|fprop|(?:^|_)dot|ynn_fusion"
        r"|attention|fmha|flash|sdpa|softmax_fusion"
    ),
    "reductions": r"reduce(?!_precision)|norm",
    "transposes and copies": r"transpose|copy|memcpy|memset|concatenate|(?<!dynamic-)slice",
    "elementwise": r"fusion|loop|add|multiply|divide|select|convert|broadcast|rng|iota|while|call",
}


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))
    return next(found, "rest")


def device_events(trace: pathlib.Path) -> list[tuple[str, float]]:
    """Name and nanoseconds of every operation that a device executed.

    `trace` is a folder that `jax.profiler.trace` wrote. On a GPU these are the kernels of its
    streams, on a TPU and on a CPU XLA's operations. On a CPU those of several threads overlap.
    """
    files = sorted(trace.rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{trace}: holds no profiler trace")
    events = []
    for plane in ProfileData.from_file(str(files[-1])).planes:
        device = re.search(r"/device:(GPU|TPU)", plane.name)
        for line in plane.lines:
            if device is None:
                events += [
                    (event.name, event.duration_ns)
                    for event in line.events
                    if plane.name == "/host:CPU" and "hlo_op" in dict(event.stats)
                ]
            elif line.name.startswith("Stream") or line.name == "XLA Ops":
                for event in line.events:
                    category = dict(event.stats).get("hlo_category")
                    events.append((str(category or event.name), event.duration_ns))
    return events


def by_kind(trace: pathlib.Path, steps: int) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel, the largest first."""
    total: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in device_events(trace):
        total[kind_of(name)] += nanoseconds
    return {kind: round(ns / 1e6 / steps, 3) for kind, ns in total.most_common()}


def largest(trace: pathlib.Path, steps: int, count: int = 40) -> dict[str, float]:
    """Milliseconds of a step by kernel, numbers at the end of names left out."""
    total: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in device_events(trace):
        total[re.sub(r"[._\d]+$", "", name)[:80]] += nanoseconds
    return {name: round(ns / 1e6 / steps, 3) for name, ns in total.most_common(count)}
