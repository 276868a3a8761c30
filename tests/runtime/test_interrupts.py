"""Signals: raised, remembered, held back, or the end of the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from qvsplit.runtime import interrupts


@pytest.fixture
def installed():
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.install()
    yield
    interrupts.clear()
    interrupts._installed = False
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "raised"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, interrupts.Terminated),
        (signal.SIGHUP, interrupts.Terminated),
    ],
)
def test_a_signal_is_raised_and_remembered_until_it_is_dealt_with(installed, number, raised):
    interrupts.check()
    with pytest.raises(KeyboardInterrupt) as first:
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt) as again:
        interrupts.check()
    assert type(first.value) is type(again.value) is raised
    interrupts.clear()
    interrupts.check()


def test_a_signal_inside_is_delivered_at_the_end_of_the_outermost_block(installed):
    done = []

    @interrupts.held_back()
    def outer() -> None:
        with interrupts.held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("inner")
        done.append("outer")

    with pytest.raises(interrupts.Terminated):
        outer()
    assert done == ["inner", "outer"]


def test_other_threads_hear_no_signals(installed):
    done = []

    def work() -> None:
        with interrupts.held_back(), interrupts.at_once():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_at_once_ends_the_process_with_one_line(number, code):
    program = (
        "import os\nfrom qvsplit.runtime import interrupts\ninterrupts.install()\n"
        f"with interrupts.at_once():\n    os.kill(os.getpid(), {int(number)})\n    print('not reached')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "qvsplit: interrupted\n")


def test_at_once_without_install_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.at_once():
        assert signal.getsignal(signal.SIGTERM) is before
