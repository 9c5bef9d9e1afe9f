"""Drills of what comes before and after training: preparing data, scoring, sampling."""

import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial

from cascaded_diffusion.drilling import faults
from cascaded_diffusion.drilling.bench import Bench, Row
from cascaded_diffusion.drilling.children import Ended
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import sha256_of, sha256_of_arrays
from cascaded_diffusion.runtime.run_folder import RunFolder

_SCORE = ("step", "ema_decay", "metric", "value")


def _killed_everywhere(
    bench: Bench,
    row: Row,
    binary: str,
    make: Callable[[str], tuple[Sequence[str], pathlib.Path]],
    outcome: Callable[[pathlib.Path], object],
) -> list[Row]:
    """Runs a binary undisturbed, then killed at every point that it has passed, then without space.

    `make` gives the flags of a fresh try of a name, and the folder below which its files are.
    """
    argv, root = make("undisturbed")
    seen = bench.root / f"points_{binary}"
    ended = bench.start(binary, argv, root=root, seen=seen).wait()
    if ended.code != 0:
        raise RuntimeError(f"an undisturbed {binary} failed:\n{ended.text}")
    expected = outcome(root)
    full = Row(f"{binary}, no space left where a file appears")

    def check(row: Row, ended: Ended, root: pathlib.Path) -> None:
        if ended.code != 0:
            row.needs_repair(ended)
        elif outcome(root) != expected:
            row.silent += 1
            row.notes.append(f"{root} is not what an undisturbed {binary} gives")

    points = faults.read_points(seen)
    for each, run in ((row, bench.kill_at_points), (full, bench.fill_disk_at_points)):
        made = f"{run.__name__}_"
        run(each, binary, points, lambda n, made=made: make(f"{made}{n}"), partial(check, each))
    return [row, full]


def prepared_shards(bench: Bench) -> list[Row]:
    """`prepare` is killed at every point, and run again."""

    def make(name: str) -> tuple[list[str], pathlib.Path]:
        root = bench.root / f"prepared_{name}"
        root.mkdir()
        return [*bench.config_flags, f"--config.data.prepared_dir={root}", "--workers=1"], root

    def outcome(root: pathlib.Path) -> dict[str, str]:
        files = (p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        return {p.relative_to(root).as_posix(): sha256_of(p) for p in files}

    row = Row("prepare, killed at every point where a file appears")
    return _killed_everywhere(bench, row, "prepare", make, outcome)


def scores(bench: Bench) -> list[Row]:
    """`evaluate` and `sample` are killed at every point, and run again."""
    trained = bench.folder("undisturbed")
    first = bench.copy(trained, "scored")
    ended = bench.start("evaluate", [f"--workdir={first.path}"]).wait()
    if ended.code != 0:
        raise RuntimeError(f"an undisturbed evaluate failed:\n{ended.text}")

    def unscored(name: str) -> tuple[list[str], pathlib.Path]:
        # The classifier and the statistics of real images take most of the time, once.
        folder = bench.copy(first, f"scores_{name}")
        for path in (folder.results_path, folder.best_path, folder.early_stop_path):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder.samples, ignore_errors=True)
        return [f"--workdir={folder.path}"], folder.path

    def records(root: pathlib.Path) -> list[list[object]]:
        folder = RunFolder(root)
        best = json.loads(folder.best_path.read_text())
        found = [*read_lines(folder.results_path), best]
        return [[record[key] for key in _SCORE] for record in found]

    def unsampled(name: str) -> tuple[list[str], pathlib.Path]:
        folder = bench.copy(first, f"samples_{name}")
        return [f"--workdir={folder.path}", "--per_class=1"], folder.path

    def samples(root: pathlib.Path) -> str:
        (path,) = root.rglob("samples.npz")
        return sha256_of_arrays(read_arrays(path))

    return [
        *_killed_everywhere(
            bench, Row("evaluate, killed at every such point"), "evaluate", unscored, records
        ),
        *_killed_everywhere(
            bench, Row("sample, killed at every such point"), "sample", unsampled, samples
        ),
    ]
