import os
import signal

import pytest

from tests.launch.stubs import ROOT, Stubs


@pytest.fixture
def stubs(tmp_path):
    made = Stubs(tmp_path / "stub folder's")
    yield made
    found = [*ROOT.glob("PWNED"), *tmp_path.rglob("PWNED")]
    for path in found:
        path.unlink()
    assert not found, "something was executed that should not have been"


@pytest.fixture
def host(stubs):
    """A machine whose copy is this working tree and whose Python is a stand-in."""
    home = stubs.machine / "cascaded_diffusion"
    (home / "venv/bin").mkdir(parents=True)
    (home / "src").symlink_to(ROOT)
    stubs.add("python", 'printf "says %s\\n" "$*"; exit 7')
    (home / "venv/bin/python").symlink_to(stubs.bin / "python")
    yield stubs
    for pid in home.glob("jobs/*/pid"):
        try:
            os.kill(int(pid.read_text().split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            continue
