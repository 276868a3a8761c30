"""The process that joins a cluster: it may die in any way, and nothing of it is left. Real processes, without Ray."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from qvsplit.errors import ModelError, ProcessError
from qvsplit.pipeline.cluster import messages
from qvsplit.pipeline.cluster import runner as runner_module
from qvsplit.pipeline.cluster.runner import DriverProcess

OPENED = "import os, sys, time\nfrom multiprocessing.connection import Connection\nrun = Connection({descriptor})\n"
# the driver's own `main`, which would join a cluster, with something else in place of that
MAIN = """\
import os, sys, time
from qvsplit.errors import ModelError
from qvsplit.pipeline.cluster import driver

def serve(inbox, send, folder):
{body}

driver._serve = serve
driver.main({{descriptor}}, {{folder!r}})
"""


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """No thread, descriptor, process or folder."""
    scratch = tmp_path / "temporary"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    descriptors = set(os.listdir("/proc/self/fd"))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "qvsplit-driver"]
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert list(scratch.iterdir()) == []


@pytest.fixture
def started(monkeypatch):
    """Start a process that runs this code, which has `run`, a connection; or `main` with this body of `_serve`."""
    every = []

    def start(code: str, *, main: bool = False) -> DriverProcess:
        text = MAIN.format(body=textwrap.indent(textwrap.dedent(code), "    ")) if main else OPENED + code
        monkeypatch.setattr(runner_module, "_CODE", text)
        every.append(DriverProcess())
        return every[-1]

    yield start
    for one in every:
        one.end(at_once=True)


def said(driver: DriverProcess) -> object:
    """Wait for what it says."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (message := driver.receive()) is not None:
            return message
    raise AssertionError("it says nothing")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------- it dies


def test_one_that_is_killed_ends_the_run_with_one_line(started):
    driver = started("run.send(os.getpid()); time.sleep(60)")
    os.kill(said(driver), signal.SIGKILL)
    with pytest.raises(ProcessError, match=r"\(exit code -9\); what was finished is kept: run again$") as caught:
        said(driver)
    assert caught.value.exit_code == 70


def test_one_that_leaves_as_ray_does_is_no_exit_code_of_ours_and_its_last_words_are_told(started):
    """1 would say that all but some items are extracted."""
    words = r"'(raylet) first\n\n\x1b[31mThe node is\x1b[0m marked dead.\x1b[0m\n  \n'"
    driver = started(f"os.write(2, {words}.encode()); os._exit(1)")
    with pytest.raises(ProcessError, match=r"\(exit code 1: The node is marked dead\.\); what was") as caught:
        said(driver)
    assert caught.value.exit_code == 70


def test_what_it_said_before_it_died_is_heard(started):
    driver = started("[run.send(number) for number in range(50)]; os._exit(1)")
    assert [said(driver) for _ in range(50)] == list(range(50))
    with pytest.raises(ProcessError, match="exit code 1"):
        said(driver)


def test_one_that_dies_in_the_middle_of_a_word_has_not_said_it(started):
    driver = started("run.send('whole'); os.write(run.fileno(), b'\\0\\0\\1\\0half'); os._exit(3)")
    assert said(driver) == "whole"
    with pytest.raises(ProcessError, match="exit code 3"):
        said(driver)


def test_one_that_is_gone_is_gone_whoever_asks_and_hears_nothing(started):
    driver = started("os._exit(0)")
    for _ in range(3):
        with pytest.raises(ProcessError, match="exit code 0"):
            said(driver)
        driver.send(messages.Run())  # says nothing: `receive` does
    driver.end()
    driver.end()


def test_one_that_hangs_when_it_has_nothing_more_to_say_is_not_waited_for(started, monkeypatch):
    monkeypatch.setattr(runner_module, "END_SECONDS", 0.2)
    driver = started("run.close(); time.sleep(60)")
    with pytest.raises(ProcessError, match="exit code -9"):
        said(driver)


def test_what_cannot_be_understood_is_a_mistake_of_ours(started):
    driver = started("run.send_bytes(b'no pickle'); time.sleep(60)")
    with pytest.raises(pickle.UnpicklingError):
        said(driver)


def test_none_can_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ProcessError, match="cannot be started") as caught:
        DriverProcess()
    assert caught.value.exit_code == 70


# ------------------------------------------------------------------------------------------------ what it prints


@pytest.mark.parametrize("stream", [1, 2])
def test_however_much_it_prints_it_is_heard(started, capfd, stream):
    driver = started(f"[os.write({stream}, b'x' * 99 + b'\\n') for _ in range(20_000)]; run.send('done'); os._exit(1)")
    assert said(driver) == "done"
    with pytest.raises(ProcessError, match="exit code 1") as caught:
        said(driver)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")


def test_a_line_without_an_end_is_cut(started):
    driver = started("os.write(2, b'y' * 5_000_000); os._exit(1)")
    with pytest.raises(ProcessError, match="exit code 1: yyy") as caught:
        said(driver)
    assert len(str(caught.value)) < 600


# ------------------------------------------------------------------------------------------------------- its end


FAMILY = """
import subprocess
child = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE)
run.send((os.getpid(), process.pid, int(process.stdout.readline())))
open(os.path.join({folder!r}, 'socket'), 'w').close()
"""


@pytest.mark.parametrize("at_once", [True, False])
def test_all_that_it_has_started_ends_with_it(started, monkeypatch, at_once):
    monkeypatch.setattr(runner_module, "END_SECONDS", 0.2)
    driver = started(FAMILY + "time.sleep(60)")
    pids = said(driver)
    assert os.getsid(pids[0]) == pids[0]  # a terminal's Ctrl-C is not for them
    assert all(map(is_alive, pids))
    driver.end(at_once=at_once)
    wait_until(lambda: not any(map(is_alive, pids)))
    assert not os.path.exists(driver.folder)


def test_what_it_has_started_ends_too_where_it_has_died(started):
    driver = started(FAMILY + "os._exit(1)")
    pids = said(driver)
    with pytest.raises(ProcessError):
        said(driver)
    driver.end()
    wait_until(lambda: not any(map(is_alive, pids)))


LISTENS = "run.send('here')\nword = run.recv()\nopen({path!r}, 'w').write(type(word).__name__)\n"


def test_it_is_asked_to_end_and_given_the_time(started, tmp_path):
    driver = started(LISTENS.format(path=str(tmp_path / "heard")) + "time.sleep(0.3); run.send('last words')")
    assert said(driver) == "here"
    driver.end()
    assert (tmp_path / "heard").read_text() == "Finish"


def test_while_nothing_is_at_stake_it_is_not_asked(started, tmp_path):
    driver = started(LISTENS.format(path=str(tmp_path / "heard")))
    assert said(driver) == "here"
    began = time.monotonic()
    driver.end(at_once=True)
    assert time.monotonic() - began < 3
    assert not (tmp_path / "heard").exists()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("number", [1, 63, 64, 65, 1000])
def test_whatever_it_still_has_to_say_it_ends(started, at_once, number):
    """The thread that hears it must not wait for somebody who takes what it has heard."""
    driver = started(f"run.send('here')\nfor _ in range({number}): run.send('x' * 1000)\nrun.recv()")
    assert said(driver) == "here"
    if at_once:
        wait_until(lambda: driver._inbox.qsize() == min(number, runner_module.MESSAGES_AHEAD))
    driver.end(at_once=at_once)
    assert not driver._thread.is_alive()


# ------------------------------------------------------------------------------------------- with the driver's `main`


def test_what_ends_the_run_there_is_raised_here(started):
    driver = started("raise ModelError('no such model')", main=True)
    with pytest.raises(ModelError, match="^no such model$") as caught:
        said(driver)
    assert not getattr(caught.value, "__notes__", [])


def test_of_a_mistake_of_ours_it_is_told_where_it_is(started):
    driver = started("dict()['nothing']", main=True)
    with pytest.raises(RuntimeError) as caught:
        said(driver)
    assert str(caught.value) == "KeyError: 'nothing'"
    (note,) = caught.value.__notes__
    assert note.startswith("Traceback") and "in serve" in note


def test_ctrl_c_is_the_runs_to_hear(started):
    driver = started("send(os.getpid()); inbox.get(); send('still here'); inbox.get()", main=True)
    os.kill(said(driver), signal.SIGINT)
    time.sleep(0.1)
    driver.send(messages.Run())
    assert said(driver) == "still here"


def test_a_run_that_is_gone_ends_it_and_takes_its_folder_with_it(started):
    driver = started("open(folder + '/socket', 'w').close(); send(os.getpid()); time.sleep(60)", main=True)
    pid = said(driver)
    assert os.path.exists(driver.folder + "/socket")
    _shut(driver)
    wait_until(lambda: not is_alive(pid))
    assert driver._process.wait() == 0
    assert not os.path.exists(driver.folder)


def _shut(driver: DriverProcess) -> None:
    """As if this process were gone: nobody writes to the driver any more."""
    import socket

    with socket.socket(fileno=os.dup(driver._connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_WR)
