"""What drills share: where they write, the tiny run that they break, and the rows they fill."""

import dataclasses
import pathlib
import random
import shutil
import signal
import sys
from collections.abc import Callable, Sequence

from cascaded_diffusion.drilling import faults
from cascaded_diffusion.drilling.children import Child, Ended
from cascaded_diffusion.drilling.faults import Point
from cascaded_diffusion.errors import EXIT_BAD_INPUT
from cascaded_diffusion.runtime.checkpoint import state_digest
from cascaded_diffusion.runtime.run_folder import RunFolder

STEPS, SAVE_EVERY = 150, 25
_FLAGS = {
    "stage.network.channels": 8,
    "stage.network.channel_mults": (1,),
    "stage.network.num_res_blocks": (1,),
    "stage.network.attention_resolutions": (),
    "stage.network.num_heads": 2,
    "stage.network.patch_size": 4,
    "train.train_steps": STEPS,
    "train.batch_size": 8,
    "train.log_every_steps": 1,
    "train.sample_every_steps": None,
    "checkpoint.save_every_steps": SAVE_EVERY,
    "checkpoint.max_to_keep": 3,
}


# The flags of a fresh try, by its number, and the folder below which its files are.
MakeTry = Callable[[int], tuple[Sequence[str], pathlib.Path]]
# Is given how a try has ended, and that folder.
CheckTry = Callable[[Ended, pathlib.Path], None]


@dataclasses.dataclass
class Row:
    """What one kind of fault has done, over all tries."""

    what: str
    tries: int = 0
    silent: int = 0  # ended well with another result
    repairs: int = 0  # the same command did not go on
    redone: int | None = None  # the most steps that were done again
    secs: float | None = None  # the longest time from the fault to the end of the process
    notes: list[str] = dataclasses.field(default_factory=list)

    def needs_repair(self, ended: Ended) -> None:
        """Notes that a process has ended as it should not."""
        self.repairs += 1
        self.notes.append(f"code {ended.code}: {ended.text[-300:]}")

    def expect_refusal(self, ended: Ended, where: object = "") -> None:
        """Notes a process that has not ended by one line about bad input or a full disk."""
        errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
        if ended.code != EXIT_BAD_INPUT or len(errors) != 1 or "Traceback" in ended.text:
            self.needs_repair(ended)
            self.notes[-1] = f"{where} {self.notes[-1]}".strip()

    def took(self, secs: float) -> None:
        """Notes how long a process took to end."""
        self.secs = max(self.secs or 0.0, secs)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished training: every step's loss and gradient norm, and a digest of the last state."""

    curve: dict[int, tuple[str, str]]
    digest: str


def curve_of(folder: RunFolder) -> dict[int, tuple[str, str]]:
    """The losses and gradient norms by step, exact."""
    return {r["step"]: (r["loss"].hex(), r["grad_norm"].hex()) for r in folder.metrics()}


class Bench:
    """A folder for runs of one config, and the result of one that nothing has disturbed."""

    def __init__(self, root: pathlib.Path, config: str, *, seed: int, say: Callable[[str], None]):
        self.root, self.say = root, say
        self.rng = random.Random(seed)
        self._config, self._count = config, 0

    def folder(self, name: str) -> RunFolder:
        """A run folder."""
        return RunFolder(self.root / name)

    def copy(self, folder: RunFolder, name: str) -> RunFolder:
        """A copy of a run folder."""
        return RunFolder(shutil.copytree(folder.path, self.root / name))

    @property
    def config_flags(self) -> list[str]:
        """The config, as flags."""
        given = [f"--config.{key}={value}" for key, value in _FLAGS.items()]
        return [f"--config={self._config}", *given]

    def flags(self, folder: RunFolder) -> list[str]:
        """The flags of `main` for a run."""
        return [*self.config_flags, f"--workdir={folder.path}"]

    def start(
        self,
        binary: str,
        argv: Sequence[str],
        *,
        root: pathlib.Path | None = None,
        kill_at: Point | None = None,
        full_at: Point | None = None,
        seen: pathlib.Path | None = None,
        also: Callable[[], None] | None = None,
    ) -> Child:
        """Starts a binary; faults are those of files below `root`."""
        self._count += 1
        log = self.root / "logs" / f"{self._count:04d}_{binary}.log"
        log.parent.mkdir(parents=True, exist_ok=True)

        def prepare() -> None:
            if root is not None:
                faults.install(root, kill_at=kill_at, full_at=full_at, seen=seen)
            if also is not None:
                also()

        return Child(binary, argv, log, prepare)

    def train(self, folder: RunFolder) -> Child:
        """Starts a training without faults."""
        return self.start("main", self.flags(folder))

    def kill_at_points(
        self,
        row: Row,
        binary: str,
        points: Sequence[Point],
        make: MakeTry,
        check: CheckTry,
        after_kill: Callable[[pathlib.Path], None] = lambda root: None,
    ) -> None:
        """Kills a binary at every point, in one folder as long as points can be reached there.

        `make` gives the flags of a fresh try, by its number, and the folder below which its files
        are. `check` is given the end of each try that went to its end.
        """
        left, number = list(points), 0
        while left:
            number += 1
            (argv, root), reached = make(number), 0
            while left:
                ended = self.start(binary, argv, root=root, kill_at=left[0]).wait()
                if ended.code != -signal.SIGKILL:
                    break
                row.tries, reached = row.tries + 1, reached + 1
                after_kill(root)
                left.pop(0)
            else:
                ended = self.start(binary, argv).wait()
            if left and not reached:  # not even by a try of its own
                row.notes.append(f"not reached: {left.pop(0)}")
            check(ended, root)
            shutil.rmtree(root)
            self.say(f"{binary}: {row.tries} of {len(points)} points")

    def fill_disk_at_points(
        self,
        row: Row,
        binary: str,
        points: Sequence[Point],
        make: MakeTry,
        check: CheckTry,
    ) -> None:
        """Has no space left at each point before an operation, one after the other in one folder.

        Each time one line must say so, and at the end the same command go on. Points that cannot be
        reached any more, since what they write is there, are left out.
        """
        argv, root = make(0)
        for point in points:
            if point.side != "before" or point.operation == "rmtree":
                continue
            ended = self.start(binary, argv, root=root, full_at=point).wait()
            if ended.code == 0:
                continue
            row.tries += 1
            row.took(ended.secs)
            row.expect_refusal(ended, point)
        check(self.start(binary, argv).wait(), root)
        shutil.rmtree(root)

    def digest(self, folder: RunFolder, steps: int = STEPS) -> str:
        """`state_digest` of the last checkpoint, by a process that may touch a device."""
        path = self.root / "digest"
        path.unlink(missing_ok=True)

        def write() -> None:
            path.write_text(state_digest(folder, steps))
            sys.exit(0)

        ended = self.start("main", [], also=write).wait()
        if ended.code != 0:
            return f"cannot be read: {ended.text[-300:]}"
        return path.read_text()

    def result(self, folder: RunFolder, steps: int = STEPS) -> Result:
        """What a training has come to."""
        return Result(curve_of(folder), self.digest(folder, steps))

    def check_finish(self, row: Row, folder: RunFolder, expected: Result) -> None:
        """Runs the same command to its end, and compares the result."""
        self.check_ended(row, self.train(folder), folder, expected)

    def check_ended(
        self, row: Row, child: Child | Ended, folder: RunFolder, expected: Result
    ) -> None:
        """Compares the result of a training that goes to its end, or has gone there."""
        steps = max(expected.curve)
        ended = child if isinstance(child, Ended) else child.wait()
        if ended.code != 0:
            row.needs_repair(ended)
        elif self.result(folder, steps) != expected:
            row.silent += 1
            row.notes.append(f"{folder.path} is not what an undisturbed run gives")

    def note_redone(self, row: Row, folder: RunFolder) -> None:
        """Notes how many steps a run repeats that goes on from here."""
        logged = max((r["step"] for r in folder.metrics()), default=0)
        saved = max(
            (int(p.parent.name) for p in folder.checkpoints.glob("*/manifest.json")), default=0
        )
        row.redone = max(row.redone or 0, logged - saved)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| fault | tries | silent errors | repairs | steps redone | s to end |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        redone = "" if row.redone is None else str(row.redone)
        secs = "" if row.secs is None else f"{row.secs:.1f}"
        cells = (row.what, row.tries, row.silent, row.repairs, redone, secs)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
