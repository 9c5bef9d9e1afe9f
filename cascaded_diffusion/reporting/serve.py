"""The page of runs as a local web page that follows them while they train.

It listens on this machine alone. A script asks once in a while whether something has changed, and
then replaces the page's contents; sliders and the scroll position stay where they are.
"""

import contextlib
import hashlib
import http.server
import pathlib
import threading
from collections.abc import Callable, Iterator

from cascaded_diffusion.errors import UserError

_HOST = "127.0.0.1"
# Names of this machine; a page of another name that leads here is refused.
_NAMES = {"127.0.0.1", "localhost", "[::1]"}
_POLL_MS = 3000
# What a page is made of; checkpoints are not.
_PATTERNS = ("*.json", "*.jsonl", "*.png", "EARLY_STOP", "TRAIN_COMPLETE")
_SCRIPT = """
<script>
let version = "VERSION";
async function follow() {
  const found = await (await fetch("/version")).text();
  if (version === found) return;
  const positions = [...document.querySelectorAll(".slider input")].map(x => x.value);
  const answer = await fetch("/");
  if (!answer.ok) return;
  const text = await answer.text(), top = scrollY;
  version = found;
  const fresh = new DOMParser().parseFromString(text, "text/html");
  document.title = fresh.title;
  document.body.replaceWith(fresh.body);
  for (const old of document.querySelectorAll("body script")) {
    const script = document.createElement("script");
    script.textContent = old.textContent;
    if (!old.textContent.includes("async function follow")) old.replaceWith(script);
  }
  document.querySelectorAll(".slider input").forEach((x, i) => {
    if (i < positions.length) { x.value = positions[i]; x.oninput(); }
  });
  scrollTo(0, top);
}
setInterval(() => follow().catch(() => {}), POLL_MS);
follow().catch(() => {});
</script>
"""


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    children = sorted(root.iterdir()) if root.is_dir() else []
    for folder in (root, *(p for p in children if p.is_dir())):
        for part in (folder, folder / "eval", folder / "samples", folder / "sweep"):
            for pattern in _PATTERNS:
                yield from sorted(part.glob(pattern))


def version_of(root: pathlib.Path) -> str:
    """A digest of the times and sizes of all files that a page of `root` is made of."""
    digest = hashlib.sha256()
    for path in _files(root):
        try:
            about = path.stat()
        except OSError:  # it was replaced in this moment
            continue
        digest.update(f"{path} {about.st_mtime_ns} {about.st_size}\n".encode(errors="replace"))
    return digest.hexdigest()[:16]


def make_server(
    root: pathlib.Path, build: Callable[[], str], port: int
) -> http.server.ThreadingHTTPServer:
    """A server of the page that `build` makes of `root`; port 0 is any that is free.

    Raises UserError if the port is taken.
    """
    kept: dict[str, bytes] = {}
    building = threading.Lock()

    def page() -> bytes:
        with building:  # once, for all who ask
            return built()

    def built() -> bytes:
        version = version_of(root)
        if version not in kept:
            # Of the files before they are read: what changes meanwhile is a change.
            script = _SCRIPT.replace("POLL_MS", str(_POLL_MS)).replace("VERSION", version)
            text = build().replace("</body>", f"{script}</body>")
            kept.clear()
            kept[version] = text.encode(errors="backslashreplace")
        return kept[version]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if name not in _NAMES:
                self.send_error(403)
            elif self.path == "/version":
                self._answer(version_of(root).encode(), "text/plain")
            elif self.path == "/":
                try:
                    self._answer(page(), "text/html; charset=utf-8")
                except UserError as e:
                    self.send_error(503, explain=str(e))
            else:
                self.send_error(404)

        def _answer(self, data: bytes, kind: str) -> None:
            self.send_response(200)
            for key, value in (("Content-Type", kind), ("Content-Length", str(len(data)))):
                self.send_header(key, value)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the page was closed meanwhile
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    try:
        return http.server.ThreadingHTTPServer((_HOST, port), Handler)
    except OSError as e:
        raise UserError(f"--port={port}: {e.strerror}; name another, or 0 for any") from e
