"""Signals: raised, remembered, held back, or the end of the process at once."""

from __future__ import annotations

import ctypes
import operator
import os
import select
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest

from qvsplit.runtime import interrupts


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


# --------------------------------------------------------------------------------------------- what was ignored before


@pytest.fixture(params=interrupts.SIGNALS, ids=lambda number: number.name)
def ignored(request):
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    signal.signal(request.param, signal.SIG_IGN)
    interrupts.install()
    yield request.param
    interrupts.clear()
    interrupts._installed = False
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_was_ignored_stays_ignored(ignored):
    for block in (interrupts.at_once, interrupts.held_back):
        os.kill(os.getpid(), ignored)
        with block():
            assert signal.getsignal(ignored) is signal.SIG_IGN
            os.kill(os.getpid(), ignored)
    assert signal.getsignal(ignored) is signal.SIG_IGN
    interrupts.check()
    other = next(number for number in interrupts.SIGNALS if number != ignored)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), other)


def test_at_once_ends_also_where_nobody_can_be_told():
    program = (
        "import os\nfrom qvsplit.runtime import interrupts\ninterrupts.install()\n"
        f"with interrupts.at_once():\n    os.kill(os.getpid(), {int(signal.SIGTERM)})\n    print('not reached')"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, check=False)
    assert (done.returncode, done.stdout) == (143, b"")


# ----------------------------------------------------------------------------------------------- waiting for input


@pytest.fixture
def silent_pipe():
    """A pipe in which nothing comes; after 10 s something, so that a wait that is not woken ends, and fails its test."""
    reader, writer = os.pipe()
    late = threading.Timer(10, os.write, (writer, b"too late"))
    late.start()
    yield reader
    woken = late.is_alive()
    late.cancel()
    late.join()
    os.close(reader)
    os.close(writer)
    assert woken, "the wait ended only when something came to be read"


def test_a_signal_just_before_the_wait_is_not_lost(installed, silent_pipe, monkeypatch):
    """Between the last step of Python and the system call: two calls by one function in C, no step between them."""
    wait = select.select

    def killed_before(*words):
        kill = ctypes.CDLL(None).kill  # os.kill would look for signals itself
        steps = partial(kill, os.getpid(), int(signal.SIGTERM)), partial(wait, *words)
        return list(map(operator.call, steps))[1]

    monkeypatch.setattr(select, "select", killed_before)
    with pytest.raises(interrupts.Terminated):
        interrupts.wait_for_input(silent_pipe)


def test_what_arrived_before_ends_the_wait(installed, silent_pipe):
    with pytest.raises(interrupts.Terminated):
        os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(interrupts.Terminated):
        interrupts.wait_for_input(silent_pipe)


def test_the_wait_ends_with_input_and_leaves_nothing_behind(installed):
    before = os.listdir("/proc/self/fd")
    reader, writer = os.pipe()
    os.write(writer, b"x")
    interrupts.wait_for_input(reader)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)
    assert os.listdir("/proc/self/fd") == before
    assert signal.set_wakeup_fd(-1) == -1
