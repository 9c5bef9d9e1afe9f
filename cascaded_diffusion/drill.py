"""Breaks tiny runs on purpose, again and again, and shows what comes of it.

    python -m cascaded_diffusion.drill [--minutes=5]

Trainings are killed at random moments and at every point where a file appears, their checkpoints
are damaged, their disk is full, a second trainer comes; `prepare`, `evaluate` and `sample` are
killed as well, and of two processes one is lost. Each is then run again by the same command, and
must give what an undisturbed run gives, to the last bit.

The table says for each kind of fault how often it was tried, how many errors were silent (another
result, and nothing said), how often the same command did not go on by itself, how many steps were
done again at most, and how long a process took at most to end. --output=FILE.json stores it.

What is left of the minutes goes to kills at random moments; --kills=200 makes so many instead.
--short leaves out all but kills and damage to checkpoints. Exit code 1 if there was a silent error
or a repair.
"""

import dataclasses
import os
import pathlib
import platform
import signal
import tempfile
import time
from collections.abc import Sequence

from absl import flags

from cascaded_diffusion.commands import config_flags, entry
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import write_json
from cascaded_diffusion.files.paths import check_local_path

_CONFIG = "mnist_base16.py:smoke"
_MAX_KILLS = 100_000


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; raises UserError for bad input."""
    fv = flags.FlagValues()
    config_flags.define_config(fv, argv, "of the stage; default: configs/mnist_base16.py:smoke")
    text = "how long it takes, about"
    flags.DEFINE_float("minutes", 5.0, text, lower_bound=0.1, upper_bound=1e4, flag_values=fv)
    text = "SIGKILLs at random moments, instead of as many as there is time for"
    flags.DEFINE_integer("kills", None, text, lower_bound=0, upper_bound=_MAX_KILLS, flag_values=fv)
    flags.DEFINE_integer("seed", 0, "of the moments", lower_bound=0, flag_values=fv)
    flags.DEFINE_bool("short", False, "kills and damage to checkpoints alone", flag_values=fv)
    flags.DEFINE_string("output", None, "a JSON file of what was found", flag_values=fv)
    text = "keep the runs in this folder, which must be new"
    flags.DEFINE_string("workdir", None, text, flag_values=fv)
    config_flags.parse(fv, argv, __doc__)
    if not hasattr(os, "fork") or not pathlib.Path("/proc/self/fd").exists():
        raise UserError(f"drill runs on Linux alone, not on {platform.system()}")
    config = config_flags.config_argument(argv)
    if config is None:
        config = str(config_flags.shipped_configs(_CONFIG) / _CONFIG)
    with tempfile.TemporaryDirectory(prefix="drill-") as temporary:
        root = pathlib.Path(temporary)
        if fv.workdir is not None:
            root = check_local_path(fv.workdir, "--workdir").absolute()
            if root.exists():
                raise UserError(f"--workdir={fv.workdir}: is there already; name a new folder")
            root.mkdir(parents=True)
        path, *variant = config.partition(":")
        try:
            return _drill(fv, root, "".join([os.path.abspath(path), *variant]))
        finally:
            from cascaded_diffusion.drilling.children import kill_all

            kill_all()


def _drill(fv: flags.FlagValues, root: pathlib.Path, config: str) -> int:
    # JAX is imported here, but only the processes that are forked touch a device.
    from cascaded_diffusion.drilling import others, peers, training
    from cascaded_diffusion.drilling.bench import Bench, Row, table

    start = time.monotonic()
    bench = Bench(root, config, seed=fv.seed, say=lambda text: print(text, flush=True))
    expected, secs, points = training.undisturbed(bench)
    bench.say(
        f"an undisturbed training takes {secs:.1f} s, passes {len(points)} points and ends as"
        f" {expected.digest[:16]}"
    )
    rows: list[Row] = [training.kills_at_points(bench, expected, points)]
    rows += training.damages(bench, flips=50)
    rows.append(training.resumes_after_damage(bench, expected))
    rows += training.signalled_phases(bench, expected)
    if not fv.short:
        rows.append(training.signals(bench, expected, secs, signal.SIGTERM, tries=10))
        rows.append(training.signals(bench, expected, secs, signal.SIGINT, tries=5))
        rows.append(training.full_disk(bench, expected))
        rows.append(training.full_at_points(bench, expected, points))
        rows.append(training.two_writers(bench, expected))
        rows.append(training.bad_step(bench))
        rows += peers.lost_peers(bench)
        rows += others.prepared_shards(bench)
        rows += others.scores(bench)
    kills, end = fv.kills, float("inf")
    if kills is None:
        kills, end = _MAX_KILLS, start + 60 * fv.minutes
    rows.insert(0, training.random_kills(bench, expected, secs, kills, end))
    bench.say(f"\n{table(rows)}\n")
    for row in rows:
        for note in row.notes:
            bench.say(f"{row.what}: {note}")
    bad = sum(row.silent + row.repairs for row in rows)
    summary = {
        "kills": sum(row.tries for row in rows if "kill" in row.what.lower()),
        "silent_errors": sum(row.silent for row in rows),
        "repairs": sum(row.repairs for row in rows),
        "state_sha256": expected.digest,
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    bench.say(", ".join(f"{key} {value}" for key, value in summary.items()))
    if fv.output is not None:
        found = [dataclasses.asdict(row) for row in rows]
        write_json(pathlib.Path(fv.output), {**summary, "rows": found})
    return 1 if bad else 0


if __name__ == "__main__":
    entry.run(main)
