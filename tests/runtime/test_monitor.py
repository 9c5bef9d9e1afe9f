"""Compilations counted, memory measured, a few steps traced."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from cascaded_diffusion.runtime import monitor
from cascaded_diffusion.runtime.monitor import CompileWatch, StepProfiler, peak_memory


def _compile_something(scale):
    jax.jit(lambda x: jnp.sin(x) * scale).lower(jnp.zeros(3)).compile()


def test_compilations_are_counted_while_it_listens():
    _compile_something(0.5)
    watch = CompileWatch()
    with watch:
        assert watch.take() == (0, 0.0)
        _compile_something(1.5)
        count, secs = watch.take()
        assert count >= 1
        assert secs > 0
        assert watch.take() == (0, 0.0)  # taken is taken
        f = jax.jit(lambda x: x * 2.5)
        x = f(jnp.zeros(3))
        watch.take()
        f(x)  # compiled already
        assert watch.take() == (0, 0.0)
    _compile_something(3.5)
    assert watch.take() == (0, 0.0)


def test_it_stops_listening_when_training_fails():
    watch = CompileWatch()
    with contextlib.suppress(RuntimeError), watch:
        raise RuntimeError
    _compile_something(4.5)
    assert watch.take() == (0, 0.0)


class _Device:
    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_memory_is_the_hosts_and_the_fullest_devices(monkeypatch):
    found = peak_memory()
    assert 0.05 < found["host_peak_gb"] < 1000
    stats = [{"peak_bytes_in_use": 2e9}, None, {}, {"peak_bytes_in_use": 3e9}]
    monkeypatch.setattr(monitor.jax, "local_devices", lambda: [_Device(s) for s in stats])
    assert peak_memory()["device_peak_gb"] == 3
    monkeypatch.setattr(monitor.jax, "local_devices", lambda: [_Device(None)])
    assert set(peak_memory()) == {"host_peak_gb"}


@pytest.fixture
def traces(monkeypatch):
    """What is asked of JAX's profiler, which takes seconds to start."""
    calls = []
    monkeypatch.setattr(monitor.jax.profiler, "start_trace", lambda path: calls.append(path))
    monkeypatch.setattr(monitor.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def _train(profiler, first, last, traces):
    """Steps during which a trace was made, and what was said at which."""
    traced, said = [], {}
    for step in range(first, last + 1):
        profiler.before(step)
        if traces and traces[-1] != "stop":
            traced.append(step)
        line = profiler.after(step, jnp.zeros(()))
        if line is not None:
            said[step] = line
    return traced, said


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path, traces):
    traced, said = _train(StepProfiler(tmp_path, (3, 5)), 1, 8, traces)
    assert traced == [3, 4, 5]
    assert traces == [str(tmp_path), "stop"]
    assert list(said) == [5]
    assert said[5].startswith("traced steps 3 to 5 (")
    assert said[5].endswith(f" s): {tmp_path}")


def test_one_step_can_be_traced(tmp_path, traces):
    assert _train(StepProfiler(tmp_path, (2, 2)), 1, 4, traces)[0] == [2]
    assert traces == [str(tmp_path), "stop"]


def test_nothing_is_traced_unasked(tmp_path, traces):
    profiler = StepProfiler(tmp_path, None)
    assert _train(profiler, 1, 4, traces) == ([], {})
    profiler.close()
    assert traces == []


def test_a_trace_ends_when_training_ends_inside(tmp_path, traces):
    with contextlib.suppress(RuntimeError), contextlib.closing(StepProfiler(tmp_path, (2, 9))) as p:
        assert _train(p, 1, 4, traces) == ([2, 3, 4], {})
        raise RuntimeError
    assert traces == [str(tmp_path), "stop"]
    p.close()  # once
    assert traces == [str(tmp_path), "stop"]


def test_the_trace_is_there_to_be_looked_at(tmp_path):
    profiler = StepProfiler(tmp_path / "profile", (2, 2))
    f = jax.jit(jnp.sin)
    for step in (1, 2, 3):
        profiler.before(step)
        said = profiler.after(step, f(jnp.ones(3)))
        assert (said is not None) == (step == 2)
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert bool(files) == (step >= 2)
    assert any(p.name.endswith(".xplane.pb") and p.stat().st_size for p in files)
