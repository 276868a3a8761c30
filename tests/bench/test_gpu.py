"""The bench of everything that waits for a GPU: what it makes of its parts, and that none of them outlives it."""

from __future__ import annotations

import os
import select
import time
from types import SimpleNamespace

import pytest

from bench import gpu

SLEEPER = """
import os, time
os.fork()
os.write({told}, b".")
time.sleep(20)
"""


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """A part of two processes that say when they run and end late; a pipe says when all of them have ended."""
    reading, told = os.pipe()
    os.set_inheritable(told, True)
    (tmp_path / "sleeper.py").write_text(SLEEPER.format(told=told))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield SimpleNamespace(reading=reading, told=told)
    os.close(reading)


def heard(reading: int) -> bytes:
    assert select.select([reading], [], [], 10)[0], "a process goes on"
    return os.read(reading, 1)


def test_no_part_outlives_an_interrupted_run(sleeper, tmp_path, monkeypatch):
    def interrupt_once_all_run(seconds):
        assert [heard(sleeper.reading) for _ in range(4)] == [b"."] * 4
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=time.perf_counter, sleep=interrupt_once_all_run))
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 4)
    parts = [gpu.Part(name, ["sleeper"]) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        list(gpu._run(parts, tmp_path, end=time.perf_counter() + 60, forked=False))
    os.close(sleeper.told)
    assert heard(sleeper.reading) == b""  # nobody is left who could write


def test_a_part_without_time_is_stopped_at_once(sleeper, tmp_path):
    (tmp_path / "a.log").write_text('{"from": "an earlier run"}\n')
    parts = [gpu.Part("a", ["sleeper"], seconds=-1)]
    ((_, result),) = gpu._run(parts, tmp_path, end=time.perf_counter() + 60, forked=False)
    os.close(sleeper.told)
    assert result == {"lacks": "time", "code": None, "part_seconds": result["part_seconds"]}
    assert heard(sleeper.reading) == b""


@pytest.mark.parametrize(
    ("said", "code", "result"),
    [
        ('loading\n{"rate": 5}\n', 0, {"rate": 5}),
        ('{"rate": 5}\n', 1, {"rate": 5, "lacks": "exit code 1", "code": 1}),
        ('{"rate": 5}\n', None, {"rate": 5, "lacks": "time", "code": None}),
        ('{"rate": 5, "oth', None, {"lacks": 'time, and its last line is cut off: {"rate": 5, "oth', "code": None}),
        ("{broken", 3, {"lacks": "exit code 3, and its last line is cut off: {broken", "code": 3}),
        ("FAILED a::b - no\n1 failed, 2 passed in 3s\n", 1, {"failed": 1, "passed": 2, "which": ["a::b"]}),
        ("2 passed in 3s\n", 3, {"passed": 2, "which": [], "lacks": "exit code 3", "code": 3}),
        ("ValueError: no\n", 1, {"lacks": "ValueError: no", "code": 1}),
        ("", -11, {"lacks": "exit code -11", "code": -11}),
    ],
)
def test_what_a_part_said_last_is_its_result_and_its_exit_code_counts(said, code, result):
    assert gpu._result(said, code) == result
