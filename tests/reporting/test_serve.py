"""The served page: on this machine alone, and always that of the files."""

import contextlib
import http.client
import threading

import pytest

from cascaded_diffusion import report
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.reporting.report import report_of, runs_in
from cascaded_diffusion.reporting.serve import make_server
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import tiny_base


@pytest.fixture
def runs(tmp_path):
    for name in ("first", "second"):
        folder = RunFolder(tmp_path / name)
        folder.write_config(tiny_base())
        for step in (1, 2, 3):
            append_line(folder.metrics_path, {"step": step, "loss": 1.0 / step})
    return tmp_path


def served(root):
    return served_by(root, lambda: report_of(root, runs_in(root)))


@contextlib.contextmanager
def served_by(root, build):
    with make_server(root, build, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address
        finally:
            server.shutdown()
            thread.join(10)


def get(address, path, host=None):
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_files(runs):
    with served(runs) as address:
        assert address[0] == "127.0.0.1"
        status, page = get(address, "/")
        assert status == 200
        assert "loss of first, second" in page
        assert "at step 3 of" in page
        _, version = get(address, "/version")
        assert get(address, "/version") == (200, version)
        append_line(RunFolder(runs / "first").metrics_path, {"step": 4, "loss": 0.2})
        _, changed = get(address, "/version")
        assert changed != version
        assert "at step 4 of" in get(address, "/")[1]


def test_the_script_is_added_once_at_the_end(runs):
    with served(runs) as address:
        _, page = get(address, "/")
    assert page.count("async function follow()") == 1
    assert page.index("async function follow") > page.index("<h1>")
    assert 'fetch("/version")' in page
    assert "POLL_MS" not in page


@pytest.mark.parametrize("path", ["/config.json", "/../etc/passwd", "/?x"])
def test_nothing_else_is_served(runs, path):
    with served(runs) as address:
        assert get(address, path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", ""])
def test_a_page_of_another_name_cannot_read_it(runs, host):
    with served(runs) as address:
        assert get(address, "/", host)[0] == 403
        for own in ("localhost", "127.0.0.1:80"):
            assert get(address, "/version", own)[0] == 200


def test_runs_that_are_gone_are_said_and_come_back(runs, tmp_path_factory):
    with served(runs) as address:
        for name in ("first", "second"):
            (runs / name).rename(tmp_path_factory.mktemp("elsewhere") / name)
        status, page = get(address, "/")
        assert status == 503
        assert "no run there, nor in a folder in it" in page
        RunFolder(runs / "first").write_config(tiny_base())
        assert get(address, "/")[0] == 200


def test_a_port_that_is_taken_is_one_line(runs):
    with served(runs) as (_, port), pytest.raises(UserError, match=f"--port={port}: "):
        report.main(["prog", f"--workdir={runs}", "--serve", f"--port={port}"])


def test_serving_writes_no_file(runs):
    with pytest.raises(UserError, match="--serve writes no file"):
        report.main(["prog", f"--workdir={runs}", "--serve", "--output=a.html"])
