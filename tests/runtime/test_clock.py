"""The clock that does not count what a process was stopped for."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import pytest

from qvsplit.runtime import clock
from qvsplit.runtime.clock import active_seconds, wait_until
from tests.support.processes import start_python, stop_for

STOPPED = 2.0
SAYS = """
import sys, time
from qvsplit.runtime.clock import active_seconds
active, wall = active_seconds(), time.monotonic()
print("running", flush=True)
sys.stdin.readline()
print(active_seconds() - active, time.monotonic() - wall, flush=True)
"""


def test_a_stop_is_not_counted():
    """Of a real process that does nothing itself to notice it."""
    process = start_python(SAYS, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "running\n"
    stop_for(process, STOPPED)
    active, wall = map(float, process.communicate("\n", timeout=60)[0].split())
    assert wall >= STOPPED
    assert wall - active > STOPPED - 2 * clock.BEAT_SECONDS


def test_what_a_process_runs_is_counted():
    before, wall = active_seconds(), time.monotonic()
    time.sleep(0.3)
    assert 0.3 <= active_seconds() - before <= time.monotonic() - wall


@pytest.fixture
def times(monkeypatch):
    """A clock without a thread, by times that the test sets."""
    now, own = [100.0], clock._Clock()
    own._beats, own._last = True, 100.0
    monkeypatch.setattr(clock, "_clock", own)
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def test_a_gap_counts_as_one_beat_and_a_busy_second_in_full(times):
    assert active_seconds() == 100.0
    times[0] += 0.9
    assert active_seconds() == 100.9
    times[0] += 3600
    assert active_seconds() == pytest.approx(100.9 + clock.BEAT_SECONDS)
    times[0] += 0.5
    assert active_seconds() == pytest.approx(101.4 + clock.BEAT_SECONDS)


def test_a_wait_is_until_its_deadline_and_at_least_once(times):
    waited = []

    def wait(seconds):
        waited.append(seconds)
        times[0] += seconds
        raise TimeoutError

    with pytest.raises(TimeoutError):
        wait_until(active_seconds() + 0.6, wait)
    assert waited == pytest.approx([0.25, 0.25, 0.1])
    with pytest.raises(TimeoutError):
        wait_until(active_seconds() - 1, wait)
    assert len(waited) == 4
    assert wait_until(active_seconds() - 1, lambda seconds: "there") == "there"


def test_a_wait_goes_on_behind_a_pause(times):
    waited = []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            return "there"
        times[0] += 3600
        raise TimeoutError

    assert wait_until(active_seconds() + 0.6, wait) == "there"


def test_a_forked_child_has_a_clock_that_beats():
    active_seconds()
    child = os.fork()
    if child == 0:
        before = len(threading.enumerate())
        active_seconds()
        os._exit(0 if (before, len(threading.enumerate())) == (1, 2) else 1)
    assert os.waitpid(child, 0)[1] == 0
