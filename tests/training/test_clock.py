"""Rates, and what slows training down."""

import numpy as np
import pytest

from cascaded_diffusion.training import clock as clock_lib
from cascaded_diffusion.training.clock import Clock, straggler


@pytest.fixture
def time(monkeypatch):
    """A time that passes when it is told to."""

    class Time:
        now = 100.0

        def monotonic(self):
            return self.now

    fake = Time()
    monkeypatch.setattr(clock_lib, "time", fake)
    return fake


def test_rates_leave_out_pauses(time):
    clock = Clock(32, 4e9, peak_flops=64e9, say=print)
    for step in range(1, 5):
        clock.data_waited(0.1)
        time.now += 0.5
        clock.step_done(step)
        with clock.pause():
            time.now += 7
    rates = clock.read()
    assert rates["images_per_sec"] == pytest.approx(4 * 32 / 2)
    assert rates["step_secs"] == pytest.approx(0.5)
    assert rates["data_wait_fraction"] == pytest.approx(0.2)
    assert rates["model_flops_per_sec"] == pytest.approx(8e9)
    assert rates["model_flops_utilization"] == pytest.approx(1 / 8)
    # Since that reading: another rate.
    time.now += 1
    clock.step_done(5)
    assert clock.read()["images_per_sec"] == pytest.approx(32)
    assert "model_flops_utilization" not in Clock(1, 1.0, peak_flops=None, say=print).read()


def test_a_step_that_takes_several_times_as_long_is_told(time):
    told = []
    clock = Clock(32, 1.0, peak_flops=None, say=told.append)
    for step in range(1, 30):
        time.now += 9.0 if step == 25 else 0.5
        clock.step_done(step)
    assert told == ["step 25 took 9.0 s, the ones before it 0.50 s"]


def test_the_process_that_waits_for_data_is_the_straggler():
    assert straggler(np.asarray([0.02, 0.03, 0.6, 0.02])) == (
        "straggler: process 2 waits 60% of its time for data, the median process 2%: all wait for"
        " it"
    )
    assert straggler(np.asarray([0.02, 0.03, 0.1, 0.02])) is None
    assert straggler(np.asarray([0.7, 0.7, 0.7, 0.7])) is None  # all of them: no one's fault
