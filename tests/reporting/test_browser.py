"""The pages in a real browser, where one is installed (Debian's `chromium`)."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.reporting.page import element, page, slider
from cascaded_diffusion.runtime import pictures
from tests.reporting.test_serve import served_by

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")


def shown(url, profile):
    """The page's elements after ten seconds of its own time, in which its scripts have run."""
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
        *("--disable-dev-shm-usage", "--virtual-time-budget=10000", "--dump-dom", url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def images(tmp_path):
    files = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        pictures.save_png(path, np.full((8, 8, 3), 80 * i, np.uint8))
        files.append((f"picture {i}", path))
    return files


def test_a_slider_shows_one_picture_at_a_time(images, tmp_path):
    text = page("pictures", [element("h2", "pictures"), slider("step", images)])
    write_whole(tmp_path / "page.html", text.encode())
    found = shown(f"file://{tmp_path}/page.html", tmp_path / "profile")
    assert re.search(r'<input type="range"[^>]* max="2"', found)
    figures = re.findall(r"<figure[^>]*>", found)
    assert [("hidden" in figure) for figure in figures] == [False, True, True]


def test_an_open_page_follows_its_runs(images, tmp_path):
    calls = []

    def build():
        calls.append(1)
        if len(calls) == 1:  # a run goes on once the page was read
            (tmp_path / "metrics.jsonl").write_text("{}\n")
        about = element("p", f"written {len(calls)} times")
        return page("runs", [element("h2", "runs"), about, slider("step", images)])

    with served_by(tmp_path, build) as (host, port):
        found = shown(f"http://{host}:{port}/", tmp_path / "profile")
    assert "written 2 times" in found
    assert "written 1 times" not in found
    # The new contents have their slider, too, and only one.
    assert found.count('type="range"') == 1
