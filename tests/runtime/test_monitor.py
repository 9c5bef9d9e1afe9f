"""What is told of a run: compilations, memory, traces, the peak of the device."""

import jax
import jax.numpy as jnp
import pytest

from cascaded_diffusion.runtime import monitor
from cascaded_diffusion.runtime.accelerators import accelerator_of


def test_compilations_are_counted_while_it_listens():
    with monitor.CompileWatch() as watch:
        watch.take()
        jax.jit(lambda x: x * 3 + 17)(jnp.ones(3)).block_until_ready()
        count, secs = watch.take()
        assert count >= 1
        assert secs > 0
        assert watch.take() == (0, 0.0)
    jax.jit(lambda x: x * 5 + 19)(jnp.ones(4)).block_until_ready()
    assert watch.take() == (0, 0.0)


def test_memory_and_age_of_the_process():
    assert 0.01 < monitor.peak_memory()["host_peak_gb"] < 1000
    assert 0 < monitor.secs_since_start() < 86400


def test_only_the_steps_asked_for_are_traced(tmp_path):
    profiler = monitor.StepProfiler(tmp_path, (2, 3))
    for step in range(1, 5):
        profiler.before(step)
        told = profiler.after(step, jnp.ones(3) * step)
        assert (told is not None) == (step == 3)
        assert told is None or told.startswith("traced steps 2 to 3 (")
        assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 3)
    profiler.close()
    silent = monitor.StepProfiler(tmp_path / "none", None)
    silent.before(1)
    assert silent.after(1, None) is None
    assert not (tmp_path / "none").exists()


def test_a_training_that_ends_inside_closes_its_trace(tmp_path):
    profiler = monitor.StepProfiler(tmp_path, (1, 10))
    profiler.before(1)
    assert profiler.after(1, jnp.ones(3)) is None
    profiler.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    found = accelerator_of(kind)
    assert (found and found.name) == name
