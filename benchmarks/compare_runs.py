"""How far apart the losses and gradient norms of two runs are.

    python benchmarks/compare_runs.py RUN RUN --loss=1e-4 --grad_norm=1e-3

compares every step that both logged; the exit code is 1 if one is further apart, relatively.
"""

import argparse
import json
import math
import pathlib
import sys

KEYS = ("loss", "grad_norm")


def logged(run: pathlib.Path) -> dict[int, dict[str, float]]:
    """The metrics of a run by step; a step that was taken twice counts as it was last."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record for record in records if "loss" in record}


def main() -> int:
    """Compares and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, type=pathlib.Path)
    for key in KEYS:
        parser.add_argument(f"--{key}", type=float, required=True)
    args = parser.parse_args()
    a, b = map(logged, args.runs)
    steps = sorted(a.keys() & b.keys())
    if not steps:
        print("no step in common")
        return 1
    good, found = True, []
    for key in KEYS:
        apart = [abs(a[s][key] - b[s][key]) / abs(a[s][key]) for s in steps]
        # NaN is larger than nothing: it must not pass.
        good &= all(math.isfinite(x) and x <= getattr(args, key) for x in apart)
        found.append(f"{key} at most {max(apart):.1e} apart (allowed {getattr(args, key):.0e})")
    print(f"{len(steps)} steps, {', '.join(found)}: {'good' if good else 'NOT GOOD'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
