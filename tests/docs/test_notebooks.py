"""The notebooks of the docs run, in a shortened form."""

import os
import runpy

import matplotlib.pyplot as plt
import pytest

from tests.one_layer import in_place_of_the_unet
from tests.tiny import ROOT

FOLDER = ROOT / "docs" / "notebooks"
# Those that need another's runs come after it.
ORDER = ("quickstart", "conditioning_augmentation", "your_photos", "measuring_samples")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a notebook at the repository's root; returns how many pictures it showed."""
    shown = []
    settings = {"NOTEBOOK_VARIANT": ":smoke", "NOTEBOOK_STEPS": "10"}
    with pytest.MonkeyPatch.context() as patch, in_place_of_the_unet():
        patch.chdir(ROOT)
        patch.setenv("NOTEBOOK_RUNS", str(tmp_path_factory.mktemp("notebooks")))
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(plt, "show", lambda: shown.append(plt.gcf().axes) or plt.close("all"))

        def run(name):
            before = len(shown)
            runpy.run_path(str(FOLDER / f"{name}.py"))
            assert all(axes for axes in shown)
            return len(shown) - before

        yield run


def test_every_notebook_is_run():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(ORDER)


def test_notebooks_run_and_show_pictures(run, capsys):
    assert [run(name) for name in ORDER] == [5, 4, 2, 2]
    assert os.environ["NOTEBOOK_VARIANT"] == ":smoke"


def test_cells_are_those_of_the_percent_format():
    for path in FOLDER.glob("*.py"):
        lines = path.read_text().splitlines()
        assert lines[0] == "# %% [markdown]", path
        assert lines[1].startswith("# # "), path
        kind = ""
        for line in lines:
            kind = line if line.startswith("# %%") else kind
            if kind == "# %% [markdown]":
                assert line.startswith("#") or not line, f"{path}: {line}"
