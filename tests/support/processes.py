"""qvsplit as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_process(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command as a process of its own."""
    command = [sys.executable, "-m", "qvsplit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def start_process(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start one command as a process of its own."""
    return start_python(
        f"import sys\nfrom qvsplit.cli import main\nsys.argv = {['qvsplit', *map(str, words)]!r}\nmain()",
        **options,
    )


def start_slowly(
    *words: object,
    seconds_a_shard: float = 300.0,
    seconds_a_batch: float = 0.1,
    start: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Start one command with a fake encoder that takes its time, so that it can be met at work.

    It is started by `start_python`, or by what does the same.
    """
    return (start or start_python)(
        "import sys\nfrom tests.support import fake_encoder\nimport qvsplit.store.store_writer as writing\n"
        f"fake_encoder.install({seconds_a_batch})\nwriting.SHARD_SECONDS = {seconds_a_shard}\n"
        f"from qvsplit.cli import main\nsys.argv = {['qvsplit', *map(str, words)]!r}\nmain()",
        **options,
    )


def start_python(code: str, **options: Any) -> subprocess.Popen[str]:
    """Start Python with this code."""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def stop_for(process: subprocess.Popen[str], seconds: float, *, group: bool = False) -> None:
    """Stop a process as Ctrl-Z does, with all of its `group` where it leads one, and have it go on after a while."""
    send = os.killpg if group else os.kill
    send(process.pid, signal.SIGSTOP)
    wait_until_stopped(process.pid)
    time.sleep(seconds)
    send(process.pid, signal.SIGCONT)


def wait_until_stopped(process: int, seconds: float = 30.0) -> None:
    """Wait until a process has stopped, be it our child or not."""
    end = time.monotonic() + seconds
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end, "it does not stop"
        time.sleep(0.002)


def as_nobody(function: Callable[[], Any]) -> Any:
    """Call a function in a forked child that has no rights of root's; what it returns comes back as JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, json.dumps(function()).encode())
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    """Wait until `condition` holds, while `process` runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
