"""The benchmarks are scripts; their tests import them by name."""

import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    # A script may import what lies beside the configs; later tests must not find it.
    for config in (ROOT / "configs").glob("*.py"):
        module = sys.modules.get(config.stem)
        if module is not None and module.__file__ == str(config):
            del sys.modules[config.stem]
