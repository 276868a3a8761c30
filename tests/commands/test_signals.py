"""Signals that were ignored when a process began, as under `nohup`, stay ignored: by it and by its children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.support.extracting import many
from tests.support.forked import start_program
from tests.support.processes import start_process, start_slowly, wait_for

IMAGES = 12


def ignoring(*names: str) -> dict[str, Any]:
    """Options of a process, and leader of its group, that finds these signals ignored."""

    def ignore() -> None:
        for name in names:
            signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)

    return {"preexec_fn": ignore, "start_new_session": True}


def ignoring_and_forked(*names: str) -> dict[str, Any]:
    """Options of such a process that need not import all anew."""
    return {"ignored": [signal.Signals[f"SIG{name}"] for name in names], "session": True, "start": start_program}


@pytest.mark.parametrize(
    ("name", "options"), [("HUP", ignoring_and_forked), ("INT", ignoring), ("TERM", ignoring_and_forked)]
)
def test_a_run_hears_nothing_of_what_was_ignored_when_it_began(name, options, tmp_path, out):
    """The signal comes again and again, to the whole process group: while it loads, reads, encodes and writes."""
    folder = many(tmp_path / "photos", IMAGES)
    words = ["extract", folder, "--out", out, "--model", "fake", "--patch-budget", 1, "--json"]
    process = start_slowly(*words, seconds_a_shard=0.1, **options(name))
    wait_for(out.exists, process)
    while process.poll() is None:
        os.killpg(process.pid, signal.Signals[f"SIG{name}"])
        time.sleep(0.01)
    printed, said = process.communicate()
    assert (process.returncode, said) == (0, "")
    assert json.loads(printed)["encoded"] == IMAGES


def test_other_signals_are_heard(tmp_path, out):
    folder = many(tmp_path / "photos", IMAGES)
    process = start_slowly(
        "extract", folder, "--out", out, "--model", "fake", "--patch-budget", 1, **ignoring_and_forked("HUP", "INT")
    )
    wait_for(out.exists, process)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert said.splitlines()[-1] == "qvsplit: interrupted"


def test_ctrl_c_while_qvsplit_is_imported_is_no_traceback():
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\nfrom qvsplit.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_doctor_ends_at_once_with_the_processes_that_import(name, tmp_path):
    """A library hangs while it is imported, for much longer than anybody waits here."""
    (tmp_path / "av.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'hanging').write_text(str(os.getpid()))\ntime.sleep(100)\n"
    )
    told, environment = tmp_path / "hanging", os.environ | {"PYTHONPATH": str(tmp_path)}
    process = start_process("doctor", env=environment)
    wait_for(lambda: told.exists() and told.read_text(), process)
    process.send_signal(signal.Signals[f"SIG{name}"])
    assert process.wait(60) == {"TERM": 143, "INT": 130}[name]
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
