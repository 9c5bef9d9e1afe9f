"""Google Cloud Storage on loopback: `gcp-storage-emulator`, with what runs in a bucket rely on.

The emulator answers one request at a time and knows no preconditions. Here requests are answered
in threads, an object's generation is set when it appears, and `ifGenerationMatch` is kept: of two
writers that expect the same generation, one fails.

    python -m tests.storage.emulator    # serves an empty bucket named "bucket", prints its URL
"""

import contextlib
import io
import itertools
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

# The second is that of the documentation.
BUCKET, _OTHERS = "bucket", ("my-cdm",)
_OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?")


class _Storage(Storage):
    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        self._generations = itertools.count(1_700_000_000_000_000)
        self.offsets = "", ""  # the range of a listing
        self.expected: dict[str, str] = {}  # the generation that an upload expects, by its id

    def _write_config_to_file(self) -> None:
        """Done for every change, of all objects: too slow for thousands of them."""

    def create_file(
        self, bucket: str, name: str, content: bytes, obj: dict, file_id: str | None = None
    ) -> None:
        obj["generation"] = str(next(self._generations))
        super().create_file(bucket, name, content, obj, file_id)

    def get_file_list(self, *args: object, **kwargs: object) -> tuple[list[dict], list[str]]:
        found, prefixes = super().get_file_list(*args, **kwargs)
        start, end = self.offsets
        return [
            obj for obj in found if start <= obj["name"] and (not end or obj["name"] < end)
        ], prefixes

    def generation(self, bucket: str, name: str) -> str:
        """Of an object that exists, or "0"."""
        return self.objects.get(bucket, {}).get(name, {}).get("generation", "0")


class _Handler(emulator.RequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Emulator"

    def __init__(self, *args: object) -> None:
        super().__init__(Emulator.storage_of(args[-1]), *args)

    def do_GET(self) -> None:
        self._respond("GET")

    def do_POST(self) -> None:
        self._respond("POST")

    def do_PUT(self) -> None:
        self._respond("PUT")

    def do_DELETE(self) -> None:
        self._respond("DELETE")

    def do_PATCH(self) -> None:
        self._respond("PATCH")

    def date_time_string(self, timestamp: float | None = None) -> str:
        now = time.time() + self.server.ahead_secs
        return super().date_time_string(now if timestamp is None else timestamp)

    def end_headers(self) -> None:
        if self._generation is not None:
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def _respond(self, method: str) -> None:
        self._generation: str | None = None
        # Read first and answered last, so that nobody waits for a client that does neither.
        body = emulator._read_raw_data(self) or b""
        client, self.wfile = self.wfile, io.BytesIO()
        try:
            self._answer(method, body)
        finally:
            answer, self.wfile = self.wfile.getvalue(), client
        client.write(answer)

    def _answer(self, method: str, body: bytes) -> None:
        with self.server.lock:
            status = self.server.intercept(method, unquote(self.path))
            if status is None:
                status = self._precondition(method)
            if status is not None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if not body and "uploadType=media" in self.path:
                self._create_empty()
                return
            rest, self.rfile = self.rfile, io.BytesIO(body)
            if "Transfer-Encoding" in self.headers:
                del self.headers["Transfer-Encoding"]
                self.headers["Content-Length"] = str(len(body))
            try:
                emulator.Router(self).handle(method)
            finally:
                self.rfile = rest

    def _create_empty(self) -> None:
        """The emulator fails at an object without contents."""
        url = urlsplit(self.path)
        bucket, name = _OBJECT.fullmatch(url.path)[1], parse_qs(url.query)["name"][0]
        obj = objects._make_object_resource("", bucket, name, "application/octet-stream", "0")
        self.storage.create_file(bucket, name, b"", objects._checksums(b"", obj))
        answer = json.dumps(obj).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _precondition(self, method: str) -> HTTPStatus | None:
        """The status of a request whose precondition fails, or None."""
        url = urlsplit(self.path)
        found, query = _OBJECT.fullmatch(url.path), parse_qs(url.query)
        offsets = (query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
        self.storage.offsets = tuple(offsets)
        if found is None:
            return None
        upload_id = query.get("upload_id", [""])[0]
        name = unquote(found[2]) if found[2] else query.get("name", [""])[0]
        now = self.storage.generation(found[1], name)
        if method == "GET" and now != "0":
            self._generation = now
        if query.get("ifGenerationNotMatch", [None])[0] == now:
            return HTTPStatus.NOT_MODIFIED if now != "0" else None
        wanted = query.get("ifGenerationMatch", [now])[0]
        if upload_id and method == "PUT":
            wanted = self.storage.expected.get(upload_id, now)
        return None if wanted == now else HTTPStatus.PRECONDITION_FAILED


class Emulator(ThreadingHTTPServer):
    """The server. `intercept(method, path)` may answer a request by a status of its own."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.lock, self.ahead_secs = threading.RLock(), 0.0
        self.intercept: Callable[[str, str], HTTPStatus | None] = lambda *_: None
        self.storage = _Storage()
        for name in (BUCKET, *_OTHERS):
            buckets.create_bucket(name, self.storage)
        for name in ("gcp_storage_emulator", "api.object", "api.bucket"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    @staticmethod
    def storage_of(server: object) -> _Storage:
        assert isinstance(server, Emulator)
        return server.storage

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects that begin with `prefix`."""
        with self.lock:
            return sorted(n for n in self.storage.objects.get(BUCKET, {}) if n.startswith(prefix))


def environment(url: str) -> dict[str, str]:
    """What a process needs to use the server."""
    return {"STORAGE_EMULATOR_HOST": url}


@contextlib.contextmanager
def serving() -> Iterator[Emulator]:
    """The server, in a thread, for this process and those that it starts."""
    with Emulator() as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in environment(server.url).items():
            patch.setenv(name, value)
        yield server
        server.shutdown()


if __name__ == "__main__":
    with Emulator() as running:
        print(running.url, flush=True)
        running.serve_forever()
