"""The fixtures of tests in a bucket."""

import uuid
from collections.abc import Iterator

import pytest

from cascaded_diffusion.files import bucket
from cascaded_diffusion.files.bucket import BucketPath
from tests.storage.emulator import BUCKET, Emulator


@pytest.fixture
def server(bucket_server: Emulator) -> Iterator[Emulator]:
    """The server, which refuses nothing any more after the test."""
    bucket._REACHED.clear()
    yield bucket_server
    bucket_server.intercept = lambda *_: None


@pytest.fixture
def folder(server: Emulator) -> BucketPath:
    """A folder of its own in the server's bucket."""
    return BucketPath(f"gs://{BUCKET}/{uuid.uuid4().hex}")
