"""Benchmarks are run by hand, so a name that has moved would be noticed late."""

import ast
import importlib
import pathlib
import shutil
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_the_package_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.module.partition(".")[0] in ("cascaded_diffusion", "tests"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")


def test_benchmarks_measure_the_package_that_lies_beside_them(tmp_path):
    for folder in ("benchmarks", "cascaded_diffusion"):
        (tmp_path / folder).mkdir()
    shutil.copy(FOLDER / "machine.py", tmp_path / "benchmarks")
    (tmp_path / "cascaded_diffusion" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "speed.py").write_text(
        "import machine\nimport cascaded_diffusion\nprint(cascaded_diffusion.__file__)\n"
    )
    command = [sys.executable, str(tmp_path / "benchmarks" / "speed.py")]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == str(tmp_path / "cascaded_diffusion" / "__init__.py")
