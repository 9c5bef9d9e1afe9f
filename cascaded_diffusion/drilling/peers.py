"""Drills of two processes that train together on this machine."""

import signal
import socket
import time

from cascaded_diffusion.drilling.bench import Bench, Result, Row, curve_of
from cascaded_diffusion.drilling.children import Child, Ended
from cascaded_diffusion.runtime.run_folder import RunFolder

_PEER_TIMEOUT = 10.0


def _address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def _start(bench: Bench, folder: RunFolder) -> list[Child]:
    flags = [*bench.flags(folder), f"--coordinator={_address()}", "--num_processes=2"]
    flags += [f"--peer_timeout_secs={_PEER_TIMEOUT:g}"]
    return [bench.start("main", [*flags, f"--process_id={i}"]) for i in range(2)]


def _wait(children: list[Child]) -> list[Ended]:
    return [child.wait(120.0) for child in children]


def lost_peers(bench: Bench) -> list[Row]:
    """One of two processes is killed, stopped or asked to end; then both are run again."""
    whole = bench.folder("together")
    ended = _wait(_start(bench, whole))
    if any(e.code for e in ended):
        raise RuntimeError(f"an undisturbed training of two failed:\n{ended[0].text}")
    expected = bench.result(whole)
    rows = []
    for what, number, target in (
        ("of two processes, the first is killed", signal.SIGKILL, 0),
        ("of two processes, the second is killed", signal.SIGKILL, 1),
        ("of two processes, the second is stopped", signal.SIGSTOP, 1),
        ("of two processes, the second gets SIGTERM", signal.SIGTERM, 1),
    ):
        row = Row(what)
        rows.append(_lost(bench, row, number, target, expected))
        bench.say(what)
    return rows


def _lost(bench: Bench, row: Row, number: int, target: int, expected: Result) -> Row:
    folder = bench.folder(row.what.replace(" ", "_").replace(",", ""))
    children = _start(bench, folder)
    if not children[0].wait_for(lambda: len(curve_of(folder)) > 30):
        row.repairs += 1
        row.notes.append(children[0].text()[-300:])
    start = time.monotonic()
    children[target].signal(number)
    survivor = children[1 - target].wait(120.0)
    row.took(time.monotonic() - start)
    row.tries += 1
    said = [line for line in survivor.text.splitlines() if line.startswith("error: ")]
    wanted = 0 if number == signal.SIGTERM else 1
    if survivor.code != 75 or len(said) != wanted or "***" in survivor.text:
        row.silent += 1
        row.notes.append(f"code {survivor.code}: {survivor.text[-300:]}")
    if number != signal.SIGTERM:
        children[target].signal(signal.SIGKILL)
    children[target].wait(60.0)
    bench.note_redone(row, folder)
    ended = _wait(_start(bench, folder))
    if any(e.code for e in ended):
        row.repairs += 1
        row.notes.append(f"codes {[e.code for e in ended]}: {ended[0].text[-300:]}")
    elif bench.result(folder) != expected:
        row.silent += 1
        row.notes.append("not what two undisturbed processes give")
    return row
