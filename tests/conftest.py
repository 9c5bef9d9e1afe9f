"""Settings for all tests: eight simulated devices, programs that compile fast and are kept."""

import contextlib
import gc
import os
import pathlib

from tests.xla import QUICK_COMPILATION

# Tests of a binary's own settings, and of speed, set XLA_FLAGS for a process of their own.
_FLAGS = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILATION}"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Test processes share what they compile: reading a program back takes a few milliseconds.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Imports and traced programs are millions of objects that stay; looking through them for
# garbage at Python's own pace takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)

import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain asks

# Files of half a minute or more start first, the longest at the head, so that no process is left
# with one at the end.
_LONGEST_FIRST = (
    "test_end_to_end",
    "test_sharding",
    "test_drill",
    "test_runs",
    "test_stage",
    "test_score",
    "test_classifier_extractor",
    "test_execution",
    "test_unet",
    "test_samplers",
    "test_resume",
    "test_demo",
    "test_distributed",
    "test_training",
    "test_cas",
    "test_inception_extractor",
    "test_plans",
    "test_sweep",
    "test_recovery",
    "test_layers",
    "test_jax_setup",
    "test_sample",
    "test_plan",
    "test_norms",
)


# Their programs run long enough for XLA to optimize them a little, or are compared to the bit.
_OPTIMIZED = {
    "test_augment",
    "test_cas",
    "test_end_to_end",
    "test_samplers",
    "test_winograd",
}


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # What was imported and collected stays.


@pytest.fixture(autouse=True, scope="module")
def _compilation(request):
    """XLA spends as little as it can on all other programs."""
    from tests.xla import quickest

    with contextlib.nullcontext() if request.path.stem in _OPTIMIZED else quickest():
        yield


@pytest.fixture(scope="session")
def bucket_server():
    """The emulator of Cloud Storage, one for a test process: its address is looked up once."""
    from tests.storage.emulator import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def one_layer():
    """Stages of the module have the network that compiles soonest, in place of a U-Net."""
    from tests.one_layer import in_place_of_the_unet

    with in_place_of_the_unet():
        yield
