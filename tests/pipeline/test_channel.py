"""A channel between one worker and one taker: in order, bounded, and nobody waits once the other end is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice

import pytest

from qvsplit.pipeline.channel import AHEAD, Channel
from qvsplit.sources.decoder import Closed

HANGS = 20.0  # seconds: what takes as long hangs


class Waiting(threading.Condition):
    """A condition that says when somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout=None):
        self.waits.set()
        return super().wait(timeout)


@pytest.fixture
def channel(monkeypatch) -> Channel[int]:
    channel: Channel[int] = Channel()
    channel._changed = Waiting()
    return channel


class Other:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]):
        self._call = call
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._outcome = self._call()
        except BaseException as error:
            self._outcome = error

    def outcome(self):
        self._thread.join(HANGS)
        assert not self._thread.is_alive(), "hangs"
        return self._outcome


def waits(channel: Channel[int]) -> None:
    assert channel._changed.waits.wait(HANGS), "nobody waits"


def filled(channel: Channel[int]) -> Channel[int]:
    for value in range(AHEAD):
        channel.put(value)
    return channel


def test_all_values_come_in_order(channel):
    def worker():
        for value in range(100):
            channel.put(value)
        channel.end()

    other, taken = Other(worker), Other(lambda: list(channel))
    assert taken.outcome() == list(range(100))
    assert other.outcome() is None


def test_no_more_wait_than_a_few(channel):
    """The next put waits until one was taken."""
    filled(channel)
    other = Other(lambda: channel.put(AHEAD))
    waits(channel)
    assert len(channel._waiting) == AHEAD
    taken = iter(channel)
    assert next(taken) == 0
    assert other.outcome() is None
    assert list(islice(taken, AHEAD)) == list(range(1, AHEAD + 1))


def test_a_taker_waits_for_a_value(channel):
    other = Other(lambda: next(iter(channel)))
    waits(channel)
    channel.put(7)
    assert other.outcome() == 7


def test_a_taker_that_waits_hears_of_the_end(channel):
    other = Other(lambda: list(channel))
    waits(channel)
    channel.end()
    assert other.outcome() == []


def test_an_error_comes_behind_what_was_put_before_it(channel):
    filled(channel).end(ValueError("broken"))
    taken = iter(channel)
    assert [next(taken) for _ in range(AHEAD)] == list(range(AHEAD))
    with pytest.raises(ValueError, match="broken"):
        next(taken)


def test_an_error_is_raised_in_a_taker_that_waits(channel):
    other = Other(lambda: list(channel))
    waits(channel)
    channel.end(ValueError("broken"))
    assert isinstance(other.outcome(), ValueError)


def test_a_worker_that_waits_hears_that_nobody_takes_any_more(channel):
    filled(channel)
    other = Other(lambda: channel.put(AHEAD))
    waits(channel)
    channel.close()
    assert isinstance(other.outcome(), Closed)


def test_once_closed_nothing_is_kept(channel):
    """Neither what waits nor what would come: it may be large."""
    filled(channel).close()
    assert not channel._waiting
    with pytest.raises(Closed):
        channel.put(9)
    assert not channel._waiting
    assert Other(lambda: list(channel)).outcome() == []


def test_a_taker_that_waits_hears_that_it_is_closed(channel):
    """As by an interrupt, in another thread than the one that takes."""
    other = Other(lambda: list(channel))
    waits(channel)
    channel.close()
    assert other.outcome() == []
