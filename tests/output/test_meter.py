"""What a meter says of rate and time left, by a clock that is set by hand."""

from __future__ import annotations

import pytest

from qvsplit.output.meter import BYTES, WINDOW_SECONDS, Meter, duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def advance(meter, clock, *, times, every, number=1):
    for _ in range(times):
        clock.now += every
        meter.advance(number)


def test_nothing_is_said_before_something_was_measured(clock):
    meter = Meter("images", 100, clock=clock)
    assert (meter.rate, meter.seconds_left, meter.line) == (None, None, "images 0 of 100")
    clock.now += 50
    meter.advance(8)  # the first batch: how long it took says how long everything took to begin
    clock.now += 5
    assert (meter.rate, meter.seconds_left, meter.line) == (None, None, "images 8 of 100")
    advance(meter, clock, times=1, every=5, number=8)
    clock.now += 1
    assert meter.rate == pytest.approx(0.8)
    assert meter.line == "images 16 of 100, 48/min, about 2 min left"


def test_a_rate_does_not_know_how_long_the_beginning_took(clock):
    """A first image after ten minutes, then one every two seconds."""
    meter = Meter("images", 1001, clock=clock)
    clock.now += 600
    advance(meter, clock, times=50, every=2)
    clock.now += 1
    assert meter.rate == pytest.approx(0.5)
    assert meter.seconds_left == pytest.approx((1001 - 50) * 2 - 1)


def test_a_rate_is_of_the_recent_past(clock):
    """Ten thousand small ones in no time, then large ones: after the window, only these count."""
    meter = Meter("images", 100_000, clock=clock)
    advance(meter, clock, times=10_000, every=0.01)
    fast = meter.rate
    assert fast == pytest.approx(100, rel=0.02)
    advance(meter, clock, times=int(WINDOW_SECONDS / 5) + 2, every=5)
    clock.now += 1
    assert meter.rate == pytest.approx(0.2, rel=0.01)


def test_what_comes_in_batches_has_the_rate_of_batches(clock):
    """Of eight that come at once every thirty seconds, whatever part of one has been counted."""
    meter = Meter("images", 800, clock=clock)
    for _ in range(6):
        clock.now += 30
        for _ in range(8):
            clock.now += 0.01
            meter.advance()
            assert meter.rate is None or meter.rate == pytest.approx(8 / 30, rel=0.01)
    clock.now += 1
    assert meter.rate == pytest.approx(8 / 30, rel=0.01)


def test_slow_items_are_measured_however_long_ago_they_were(clock):
    """Videos of ten minutes: a window of time alone would hold none."""
    meter = Meter("videos", 20, clock=clock)
    advance(meter, clock, times=3, every=600)
    clock.now += 60
    assert meter.line == "videos 3 of 20, 6.0/h, about 2 h 49 min left"


def test_time_left_runs_down_between_two_batches_and_grows_in_a_stall(clock):
    meter = Meter("images", 100, clock=clock)
    advance(meter, clock, times=5, every=10)
    left = []
    for _ in range(40):
        clock.now += 1
        left.append(meter.seconds_left)
    assert left[8] == pytest.approx(95 * 10 - 9)  # as long as the next may well be on its way
    assert left[39] > left[19] > left[9]  # and then it is late
    assert 0 < meter.rate < 0.1


def test_after_a_stall_the_rate_comes_back(clock):
    meter = Meter("images", 10_000, clock=clock)
    advance(meter, clock, times=100, every=1)
    clock.now += 3600
    assert meter.rate < 0.05
    advance(meter, clock, times=200, every=1)
    clock.now += 1
    assert meter.rate == pytest.approx(1, rel=0.02)


def test_what_was_known_is_no_measure(clock):
    """Half of the answers are in the table already: they come at once, and the others take as long as before."""
    meter = Meter("answers", 100, clock=clock)
    advance(meter, clock, times=5, every=2)
    for _ in range(50):
        meter.skip()
    advance(meter, clock, times=5, every=2)
    clock.now += 1
    assert meter.done == 60
    assert meter.rate == pytest.approx(0.5)
    assert meter.seconds_left == pytest.approx(40 * 2 - 1)


def test_time_spent_on_another_phase_does_not_count(clock):
    meter = Meter("images", 100, clock=clock)
    advance(meter, clock, times=5, every=2)
    clock.now += 300
    meter.leave_out(300)
    advance(meter, clock, times=5, every=2)
    clock.now += 1
    assert meter.rate == pytest.approx(0.5)


def test_bytes_and_parts(clock):
    meter = Meter("loading model", unit=BYTES, clock=clock)
    meter.set("config and processor", 0, 0)
    assert meter.line == "loading model: config and processor"
    for number in range(11):
        meter.set("tensors", number * 100_000_000, 4_400_000_000)
        clock.now += 2
    assert meter.line == "loading model: tensors 1.00 GB of 4.40 GB, 50.00 MB/s, about 66 s left"
    meter.set("laying out", 0, 0)
    assert meter.line == "loading model: laying out"


def test_the_end_says_nothing_of_time(clock):
    meter = Meter("images", 10, clock=clock)
    advance(meter, clock, times=10, every=2)
    clock.now += 1
    assert meter.line == "images 10 of 10, 30/min"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1, "1 s"), (89, "89 s"), (100, "2 min"), (5300, "88 min"), (5460, "1 h 31 min"), (300_000, "3 days")],
)
def test_a_time_in_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
