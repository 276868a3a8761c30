"""One writer at a time, by a lock that ends with its holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from qvsplit.errors import DiskError, StoreInUse
from qvsplit.store import layout, lock
from qvsplit.store.storage import LocalStorage

HOLD = """
import sys, time
from pathlib import Path
from qvsplit.store.storage import LocalStorage
with LocalStorage(Path(sys.argv[1])).lock() as lock:
    if sys.argv[2] == "announce":
        lock.announce()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def storage(tmp_path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


@pytest.fixture
def hold(storage):
    """Have another process hold the lock."""
    held = []

    def start(*words: str) -> subprocess.Popen:
        words = words or ("announce",)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(storage.folder), *words], stdout=subprocess.PIPE, text=True
        )
        held.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in held:
        process.kill()
        process.communicate()


def test_another_process_is_refused_and_told_who_holds_it(storage, hold):
    process = hold()
    with pytest.raises(StoreInUse, match="is being written by process") as caught, storage.lock():
        pass
    assert caught.value.exit_code == 5
    for part in (str(storage.folder), f"process {process.pid} on {socket.gethostname()}", "wait=True"):
        assert part in str(caught.value)


def test_a_holder_that_has_not_announced_itself_is_named_by_the_kernel(storage, hold):
    process = hold("silent")
    (storage.folder / layout.LOCK).write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "since": "ever"}))
    with pytest.raises(StoreInUse, match=f"by (process {process.pid}|process 1 on)"), storage.lock():
        pass


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"pid": "x"}', "[" * 2000])
def test_nonsense_in_the_file_is_passed_over(storage, monkeypatch, text):
    monkeypatch.setattr(lock, "_holder_by_kernel", lambda descriptor: None)
    with storage.lock():
        (storage.folder / layout.LOCK).write_text(text)
        with pytest.raises(StoreInUse, match="written by another process"), storage.lock():
            pass


def test_it_ends_with_its_holder_however_that_dies(storage, hold):
    process = hold()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with storage.lock():
        pass


def replace_sleep(monkeypatch, sleep) -> None:
    """In the main thread alone: the module is everybody's, also the clock's."""
    real = time.sleep

    def replaced(seconds):
        (sleep if threading.current_thread() is threading.main_thread() else real)(seconds)

    monkeypatch.setattr(time, "sleep", replaced)


def test_waiting_says_for_whom_once_and_then_goes_on(storage, monkeypatch):
    notes, sleeps = [], []
    held = storage.lock()
    held.__enter__()

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            held.__exit__(None, None, None)

    replace_sleep(monkeypatch, sleep)
    with storage.lock(wait=True, on_note=notes.append):
        pass
    assert len(sleeps) == 3
    assert len(notes) == 1 and notes[0].startswith("waiting for") and str(storage.folder) in notes[0]


CREATES = """
import sys
import threading
from pathlib import Path
from qvsplit.store.storage import LocalStorage
with LocalStorage(Path(sys.argv[1])).lock() as lock:
    lock.announce()
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_store_that_was_created_for_nothing_is_gone_and_who_waits_for_it_has_its_own_lock(storage, monkeypatch):
    """The lock that is waited for is on a file that no longer exists once it is free."""
    process = subprocess.Popen(
        [sys.executable, "-c", CREATES, str(storage.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    gone = []

    def sleep(seconds):
        process.communicate("\n")
        gone.append(not storage.folder.exists())

    replace_sleep(monkeypatch, sleep)
    with storage.lock(wait=True):
        assert gone == [True]
        with pytest.raises(StoreInUse), storage.lock():
            pass
    assert not storage.folder.exists()


def test_two_that_create_and_remove_a_store_at_once_never_hold_it_both(storage):
    """Each counts up a number that only the holder may change; what one of them creates the other removes."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom qvsplit.store import lock\n"
        "from qvsplit.store.storage import LocalStorage\nlock.POLL_SECONDS = 0.0005\ncount = Path(sys.argv[2])\n"
        "for _ in range(40):\n"
        "    with LocalStorage(Path(sys.argv[1])).lock(wait=True):\n"
        "        count.write_text(str(int(count.read_text()) + 1))\n"
    )
    count = storage.folder.parent / "count"
    count.write_text("0")
    words = [sys.executable, "-c", code, str(storage.folder), str(count)]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert count.read_text() == "120"


def test_a_run_that_writes_nothing_leaves_no_name(storage):
    with storage.lock() as held:
        assert (storage.folder / layout.LOCK).read_bytes() == b""
        held.announce()
        assert json.loads((storage.folder / layout.LOCK).read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(storage, monkeypatch, code):
    def flock(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DiskError, match="without locks, where two runs could spoil"), storage.lock():
        pass
