"""The benchmarks are scripts; their tests import them by name."""

import pathlib

import pytest


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    folder = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
