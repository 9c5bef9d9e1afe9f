"""Rates, and what is said of slow steps and slow processes, by a clock that the test turns."""

import numpy as np
import pytest

from cascaded_diffusion.training import clock as clock_lib
from cascaded_diffusion.training.clock import Clock, straggler


class _Time:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def turn(monkeypatch):
    time = _Time()
    monkeypatch.setattr(clock_lib, "time", time)

    def forward(secs):
        time.now += secs

    return forward


def _clock(said=None, peak_flops=None):
    said = [] if said is None else said
    return Clock(16, 1e9, peak_flops=peak_flops, say=said.append)


def _steps(clock, turn, secs, count, first=1):
    for step in range(first, first + count):
        turn(secs)
        clock.step_done(step)


def test_rates_are_of_the_steps_since_the_last_reading(turn):
    clock = _clock()
    _steps(clock, turn, 0.5, 4)
    clock.data_waited(0.3)
    clock.data_waited(0.2)
    assert clock.read() == pytest.approx(
        {
            "images_per_sec": 32,
            "step_secs": 0.5,
            "data_wait_fraction": 0.25,
            "model_flops_per_sec": 2e9,
        }
    )
    # Nothing of this is in the next one.
    _steps(clock, turn, 2.0, 2)
    found = clock.read()
    assert found["images_per_sec"] == pytest.approx(8)
    assert found["step_secs"] == pytest.approx(2)
    assert found["data_wait_fraction"] == 0


def test_utilization_is_of_the_peak_that_is_known(turn):
    clock = _clock(peak_flops=8e9)
    _steps(clock, turn, 0.5, 4)
    found = clock.read()
    assert found["model_flops_utilization"] == pytest.approx(2e9 / 8e9)
    assert found["model_flops_per_sec"] == pytest.approx(2e9)
    clock = _clock(peak_flops=None)
    _steps(clock, turn, 0.5, 4)
    assert "model_flops_utilization" not in clock.read()


def test_a_pause_does_not_count(turn):
    said = []
    clock = _clock(said)
    _steps(clock, turn, 0.5, 20)
    with clock.pause():
        turn(1000.0)
    _steps(clock, turn, 0.5, 20, first=21)
    assert clock.read()["step_secs"] == pytest.approx(0.5)
    assert said == []


def test_without_steps_or_time_there_are_numbers(turn):
    found = _clock(peak_flops=1e9).read()
    assert found["images_per_sec"] == found["model_flops_utilization"] == 0
    clock = _clock()
    clock.data_waited(5.0)  # no more than all of the time
    turn(1.0)
    assert clock.read()["data_wait_fraction"] == 1


def test_a_step_that_takes_several_times_as_long_is_said(turn):
    said = []
    clock = _clock(said)
    _steps(clock, turn, 0.5, 12)
    _steps(clock, turn, 1.4, 1, first=13)  # not three times
    assert said == []
    _steps(clock, turn, 1.6, 1, first=14)
    assert said == ["step 14 took 1.6 s, the ones before it 0.50 s"]
    _steps(clock, turn, 0.5, 3, first=15)
    assert len(said) == 1


def test_short_steps_and_the_first_ones_are_not_called_slow(turn):
    said = []
    clock = _clock(said)
    _steps(clock, turn, 0.01, 20)
    _steps(clock, turn, 0.9, 1, first=21)  # 90 times, yet below a second
    assert said == []
    clock = _clock(said)
    _steps(clock, turn, 0.5, 5)
    _steps(clock, turn, 60.0, 1, first=6)  # of what is usual nothing is known yet
    assert said == []


@pytest.mark.parametrize("log_every", [1, 2, 5])
def test_slow_steps_are_said_however_often_rates_are_read(turn, log_every):
    said = []
    clock = _clock(said)
    for step in range(1, 41):
        turn(30.0 if step == 36 else 0.5)
        clock.step_done(step)
        if step % log_every == 0:
            clock.read()
    assert said == ["step 36 took 30.0 s, the ones before it 0.50 s"]


def test_a_straggler_is_the_process_that_waits_for_data():
    assert straggler(np.asarray([0.0, 0.05, 0.9, 0.1])) == (
        "straggler: process 2 waits 90% of its time for data, the median process 8%: all wait"
        " for it"
    )
    # All wait alike: that is slow reading, of no process in particular.
    assert straggler(np.asarray([0.8, 0.85, 0.9, 0.8])) is None
    assert straggler(np.asarray([0.0, 0.1, 0.19, 0.0])) is None
    assert straggler(np.zeros(1)) is None
