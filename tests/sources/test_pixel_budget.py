"""The pixels that may be in memory: the first in line never waits, the others wait for room."""

from __future__ import annotations

import threading

import pytest

from qvsplit.sources.pixel_budget import Closed, PixelBudget


def test_the_first_in_line_gets_its_pixels_even_over_the_budget():
    budget = PixelBudget(100)
    budget.take(1, 60)
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (budget.take(0, 90), taken.set()), daemon=True)
    thread.start()
    assert not taken.wait(0.2)
    budget.serve(0)
    assert taken.wait(5)
    thread.join()
    later = threading.Event()
    thread = threading.Thread(target=lambda: (budget.take(2, 50), later.set()), daemon=True)
    thread.start()
    budget.give_back(60)
    assert not later.wait(0.2)
    budget.give_back(90)
    assert later.wait(5)
    thread.join()


def test_closing_ends_whoever_waits():
    budget = PixelBudget(100)
    budget.take(0, 100)
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(Closed):
            budget.take(1, 1)
        ended.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not ended.wait(0.2)
    budget.close()
    assert ended.wait(5)
    thread.join()
    with pytest.raises(Closed):
        budget.take(3, 1000)
