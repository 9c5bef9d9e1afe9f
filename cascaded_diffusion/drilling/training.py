"""Drills of a training: kills, signals, damage, a full disk, two writers, a bad step."""

import dataclasses
import pathlib
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cascaded_diffusion.cascade.stage import NoisedBatch, Stage
from cascaded_diffusion.commands import jax_setup
from cascaded_diffusion.commands.interrupts import EXIT_INTERRUPTED
from cascaded_diffusion.drilling import faults
from cascaded_diffusion.drilling.bench import (
    SAVE_EVERY,
    STEPS,
    Bench,
    CheckTry,
    MakeTry,
    Result,
    Row,
    curve_of,
)
from cascaded_diffusion.drilling.children import Ended
from cascaded_diffusion.errors import EXIT_TRY_AGAIN
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime import manifest
from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.training.recorder import GridSampler, Recorder
from cascaded_diffusion.training.step import TrainState


def undisturbed(bench: Bench) -> tuple[Result, float, list[faults.Point]]:
    """The result of a run that nothing disturbs, its seconds, and the points that it passes."""
    seen = bench.root / "points"
    for name in ("warm", "undisturbed"):  # the first compiles
        folder = bench.folder(name)
        ended = bench.start("main", bench.flags(folder), root=folder.path, seen=seen).wait()
        if ended.code != 0:
            raise RuntimeError(f"an undisturbed training failed:\n{ended.text}")
    return bench.result(folder), ended.secs, faults.read_points(seen)


def random_kills(bench: Bench, expected: Result, secs: float, kills: int, deadline: float) -> Row:
    """SIGKILL at random moments of as many runs as it takes."""
    row, number = Row("SIGKILL at random moments"), 0
    while row.tries < kills and time.monotonic() < deadline:
        number += 1
        folder = bench.folder(f"random_{number}")
        while True:
            child = bench.train(folder)
            if row.tries < kills and time.monotonic() < deadline:
                ended = child.wait(bench.rng.uniform(0.0, secs))
                if ended.code == -signal.SIGKILL:
                    row.tries += 1
                    bench.note_redone(row, folder)
                    continue
            bench.check_ended(row, child, folder, expected)
            break
        bench.say(f"{row.tries} of {kills} kills, {number} runs")
        shutil.rmtree(folder.path)
    return row


def _tries(bench: Bench, row: Row, expected: Result, name: str) -> tuple[MakeTry, CheckTry]:
    """Trainings in folders of a name, and the comparison of what they have come to."""

    def make(number: int) -> tuple[list[str], pathlib.Path]:
        folder = bench.folder(f"{name}_{number}")
        return bench.flags(folder), folder.path

    def check(ended: Ended, root: pathlib.Path) -> None:
        bench.check_ended(row, ended, RunFolder(root), expected)

    return make, check


def kills_at_points(bench: Bench, expected: Result, points: list[faults.Point]) -> Row:
    """SIGKILL at every point, one run after the other as long as its points can be reached."""
    row = Row("SIGKILL at every point where a file appears")
    make, check = _tries(bench, row, expected, "points")

    def after_kill(root: pathlib.Path) -> None:
        bench.note_redone(row, RunFolder(root))

    bench.kill_at_points(row, "main", points, make, check, after_kill)
    return row


def signals(bench: Bench, expected: Result, secs: float, number: int, tries: int) -> Row:
    """A signal at random moments, compilation and saves among them."""
    row = Row(f"{signal.Signals(number).name} at random moments")
    folder = bench.folder(f"signal_{number}")
    while row.tries < tries:
        child = bench.train(folder)
        time.sleep(bench.rng.uniform(0.1, secs))
        start = time.monotonic()
        child.signal(number)
        ended = child.wait()
        row.took(time.monotonic() - start)
        row.tries += 1
        if ended.code == 0:
            bench.check_ended(row, child, folder, expected)
            shutil.rmtree(folder.path)
        elif ended.code not in (EXIT_TRY_AGAIN, EXIT_INTERRUPTED, -number):
            row.needs_repair(ended)
    bench.check_finish(row, folder, expected)
    return row


def signalled_phases(bench: Bench, expected: Result) -> list[Row]:
    """SIGTERM while a training starts, compiles, steps, saves and makes its sample grid."""
    at = bench.root / "signalled"
    phases: dict[str, tuple[object, str]] = {
        "the start": (jax_setup, "set_up_jax"),
        "compilation": (step_lib, "compile_train_step"),
        "a step": (Recorder, "add"),
        "a save": (CheckpointWriter, "save"),
        "the sample grid": (GridSampler, "__call__"),
    }
    rows = []
    for number, (phase, (owner, name)) in enumerate(phases.items()):
        row = Row(f"SIGTERM in {phase}", tries=1)
        folder = bench.folder(f"phase_{number}")
        argv = [*bench.flags(folder), f"--config.train.sample_every_steps={SAVE_EVERY}"]
        install = partial(faults.signal_in, owner, name, signal.SIGTERM, at)
        ended = bench.start("main", argv, also=install).wait()
        row.took(time.monotonic() - float(at.read_text() if at.exists() else "nan"))
        at.unlink(missing_ok=True)
        if ended.code != EXIT_TRY_AGAIN:
            row.needs_repair(ended)
        bench.check_ended(row, bench.start("main", argv), folder, expected)
        shutil.rmtree(folder.path)
        rows.append(row)
    return rows


Damage = Callable[[pathlib.Path], object]


def damages(bench: Bench, flips: int) -> list[Row]:
    """Damage to the newest checkpoint: which one a run would resume from, and what it says."""
    whole = bench.folder("undisturbed")
    newest, *_ = sorted(manifest.finished_steps(whole), reverse=True)
    before = sorted(manifest.finished_steps(whole))[-2]

    def files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
        return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)

    def one_of(checkpoint: pathlib.Path) -> pathlib.Path:
        return bench.rng.choice(files(checkpoint))

    def flip(checkpoint: pathlib.Path) -> None:
        path = one_of(checkpoint)
        data = bytearray(path.read_bytes())
        data[bench.rng.randrange(len(data))] ^= 1 << bench.rng.randrange(8)
        path.write_bytes(data)

    def cut(checkpoint: pathlib.Path) -> None:
        path = one_of(checkpoint)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def emptied(checkpoint: pathlib.Path) -> None:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()

    kinds: list[tuple[str, int, Damage]] = [
        ("a bit of the newest checkpoint flipped", flips, flip),
        ("a file of it cut in half", 5, cut),
        ("a file of it removed", 5, lambda checkpoint: one_of(checkpoint).unlink()),
        ("its folder emptied", 1, emptied),
        ("a stray folder 999 beside it", 1, lambda c: shutil.copytree(c, c.with_name("999"))),
    ]
    rows = []
    for what, tries, damage in kinds:
        row = Row(what)
        for _ in range(tries):
            folder = bench.copy(whole, "damaged")
            damage(folder.checkpoints / str(newest))
            said: list[str] = []
            found = manifest.newest_intact(folder, start_over=False, say=said.append)
            row.tries += 1
            wanted = newest if what.startswith("a stray") else before
            if found != wanted or len(said) != 1:
                row.silent += 1
                row.notes.append(f"resumes from {found}, and says {said}")
            shutil.rmtree(folder.path)
        rows.append(row)
    return rows


def resumes_after_damage(bench: Bench, expected: Result) -> Row:
    """A whole training after a bit flipped in its newest checkpoint."""
    row, folder = Row("a run that goes on after such damage"), bench.folder("repaired")
    child = bench.train(folder)
    half = STEPS // 2 // SAVE_EVERY * SAVE_EVERY
    child.wait_for(lambda: (folder.checkpoints / str(half)).exists())
    child.signal(signal.SIGTERM)
    child.wait()
    newest = max(manifest.finished_steps(folder))
    data = next(p for p in (folder.checkpoints / str(newest)).rglob("d/*") if p.is_file())
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    row.tries += 1
    bench.note_redone(row, folder)
    bench.check_finish(row, folder, expected)
    return row


def full_disk(bench: Bench, expected: Result) -> Row:
    """Files may not grow beyond a size, as on a full disk; then they may again."""
    row, folder = Row("no room: files end at a limit"), bench.folder("full")
    # What the process prints goes to a file, too, which must have room.
    for limit in (12_000, 25_000, 40_000):

        def lower(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        child = bench.start("main", bench.flags(folder), also=lower)
        start = time.monotonic()
        ended = child.wait()
        row.tries += 1
        row.took(time.monotonic() - start)
        row.expect_refusal(ended)
    bench.check_finish(row, folder, expected)
    return row


def full_at_points(bench: Bench, expected: Result, points: list[faults.Point]) -> Row:
    """There is no space left at every point where a file appears, one after the other."""
    row = Row("no space left where a file appears")
    make, check = _tries(bench, row, expected, "full")
    bench.fill_disk_at_points(row, "main", points, make, check)
    return row


def two_writers(bench: Bench, expected: Result) -> Row:
    """A second trainer on the same folder is refused and disturbs nothing."""
    row, folder = Row("a second trainer on the same folder"), bench.folder("writers")
    first = bench.train(folder)
    first.wait_for(lambda: bool(curve_of(folder)))
    start = time.monotonic()
    ended = bench.train(folder).wait()
    row.took(time.monotonic() - start)
    row.tries += 1
    if ended.code != 2 or "another train process" not in ended.text:
        row.silent += 1
        row.notes.append(f"code {ended.code}: {ended.text[-300:]}")
    bench.check_ended(row, first, folder, expected)
    return row


def bad_step(bench: Bench) -> Row:
    """A step that is not finite changes nothing and is recorded; the run goes on."""
    row, folder, at = Row("a step whose loss is not finite"), bench.folder("bad_step"), 40

    def poison() -> None:
        drawn = step_lib.noised_batch

        def poisoned(
            stage: Stage, state: TrainState, records: dict[str, jax.Array]
        ) -> tuple[NoisedBatch, jax.Array]:
            batch, key = drawn(stage, state, records)
            factor = jnp.where(state.step == at - 1, jnp.inf, 1.0)
            return dataclasses.replace(batch, x0=batch.x0 * factor), key

        step_lib.noised_batch = poisoned

    ended = bench.start("main", bench.flags(folder), also=poison).wait()
    row.tries += 1
    steps = [line["step"] for line in read_lines(folder.nonfinite_log)]
    if ended.code != 0:
        row.needs_repair(ended)
    elif steps != [at] or "is not finite and was skipped" not in ended.text:
        row.silent += 1
        row.notes.append(f"recorded {steps}, expected {[at]}")
    return row
