"""Processes forked from one that has imported already: a start costs milliseconds, and not all those imports again.

A server process imports what its children need and forks one for each order; all processes of one run of the tests share
it. A child is a process like any other, with
its own descriptors, environment and folder; only its interpreter's start and its imports have happened before. Tests
of just those, of streams, encodings and the interpreter's end, start Python anew; see `processes`.

    python -m tests.support.forked IMPORTS DESCRIPTOR        serves whoever connects to a socket
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import functools
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

DECODER = "from qvsplit.sources import images, videos; import qvsplit.sources.decoder_process; images.warm_up()"
LIGHT_COMMANDS = "import qvsplit.cli, rich.console, rich.markdown, rich.panel, rich.table"
# what extract, ask and gate import for a tiny checkpoint
COMMANDS = """
import pandas, pyarrow.parquet, torch  # pandas: pyarrow imports it where it is installed
import qvsplit.answering.loading, qvsplit.answering.local_engine, qvsplit.ask, qvsplit.cli, qvsplit.extract
import qvsplit.judging, qvsplit.models.encoder, qvsplit.models.language, qvsplit.models.ways, qvsplit.on_demand
import qvsplit.models.copied_prefix, qvsplit.models.shared_prefix, qvsplit.models.whole_prompt
import qvsplit.output.table, qvsplit.verify, typer._adapters
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.qwen2_vl import image_processing_qwen2_vl, modeling_qwen2_vl, processing_qwen2_vl
from transformers.models.qwen2_vl import video_processing_qwen2_vl
import qvsplit.answering.schema, qvsplit.answering.selection, qvsplit.kernels.fused_decoder
import qvsplit.kernels.fused_encoder, qvsplit.models.packed_suffixes, qvsplit.models.scoring, qvsplit.output.report
import qvsplit.pipeline.execution, packaging.requirements
import prompt_toolkit, qvsplit.commands.line_editor
from tests.support import fake_encoder, chat_loops
torch.set_num_threads(1)
"""

# all processes of one run of the tests have one name for their servers, those that they start as well
RUN = os.environ.setdefault("PYTEST_RUN", os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex)


def _say(descriptor: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(descriptor, f"{number:15}\n".encode())


def _said(descriptor: int) -> int:
    return int(os.read(descriptor, 16))


class Forked:
    """A process that a `Server` forked: what tests and a decoder need of a `subprocess.Popen`."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status  # the server writes the exit code into it
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if self.returncode is None:
            os.close(self._status)

    def poll(self) -> int | None:
        """Give its exit code, or minus the signal that ended it; None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, `timeout` seconds at the most; give its exit code, or minus the signal that ended it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if self.returncode is None and select.select([self._status], [], [], 0)[0]:
                    self.returncode = _said(self._status)
                    os.close(self._status)
                if self.returncode is not None:
                    return self.returncode
            left = 0.05 if deadline is None else min(0.05, deadline - time.monotonic())
            if left <= 0:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            self._wait_for_end(left)

    def _wait_for_end(self, seconds: float) -> None:
        poller = select.poll()
        poller.register(self._status, select.POLLIN)
        poller.poll(1000 * seconds)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


class Program(Forked):
    """A forked process with pipes: stdin, stdout and stderr are text."""

    def __init__(self, pid: int, status: int, stdin: int, stdout: int, stderr: int) -> None:
        super().__init__(pid, status)
        self.stdin, self.stdout, self.stderr = os.fdopen(stdin, "w"), os.fdopen(stdout), os.fdopen(stderr)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their ends, and wait for its end."""
        said: list[str] = []
        reading = threading.Thread(target=lambda: said.append(self.stderr.read()))
        reading.start()
        self.stdin.close()
        printed = self.stdout.read()
        reading.join()
        self.wait(timeout)
        return printed, said[0]

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


class Server:
    """Forks processes that have run `imports`. It ends with the last process that is connected to it.

    All that call it by one `name` have one server: whoever comes first starts it.
    """

    def __init__(self, imports: str, name: str = "") -> None:
        self._process: subprocess.Popen[bytes] | None = None
        address = f"\0qvsplit-tests-{name or uuid.uuid4().hex}"
        while (connection := _connected(address)) is None:
            assert self._process is None, "the server did not start; what it printed says why"
            self._process = _started(imports, address)
        self._socket = connection

    def start(self, code: str, descriptors: Sequence[int], **about: Any) -> tuple[int, int]:
        """Fork a process that runs `code`, in which `descriptors` are these: stdin, stdout, stderr, and any more.

        Gives its number, and the descriptor that says how it has ended: see `Forked`.

        It may have `about` it another `environment` or `folder` than ours, `ignored` signals, a new `session`, and its
        stdin as `terminal` of that.
        """
        order = {"code": code, "environment": dict(os.environ), "folder": os.getcwd()} | about
        reader, writer = os.pipe()
        socket.send_fds(self._socket, [json.dumps(order).encode()], [writer, *descriptors])
        os.close(writer)
        return _said(reader), reader


def _connected(address: str) -> socket.socket | None:
    """Give a connection to the server at this address; None where there is none, or one that ends."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with suppress(ConnectionError):
        connection.connect(address)
        if connection.recv(1):
            return connection
    connection.close()
    return None


def _started(imports: str, address: str) -> subprocess.Popen[bytes] | None:
    """Start a server at this address; None where another process is just doing so."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(0.01)
            return None
        listener.listen()
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked", imports, str(listener.fileno())],
            pass_fds=[listener.fileno()], env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip


@functools.cache
def server_of(process: int, imports: str) -> Server:
    """The server of this run of the tests, of which this process has that number: a fork of it connects by itself."""
    return Server(imports, f"{RUN}-{zlib.crc32(imports.encode())}")


def start_decoder(descriptor: int, seconds: float, server: Server | None = None) -> Forked:
    """Fork a decoder on the socket `descriptor`: in place of `decoder._start_child`."""
    code = f"qvsplit.sources.decoder_process.main(descriptors[3], {seconds})"
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        of = server or server_of(os.getpid(), DECODER)
        return Forked(*of.start(code, [nowhere, nowhere, nowhere, descriptor]))
    finally:
        os.close(nowhere)


def start_program(code: str, *, imports: str = COMMANDS, **about: Any) -> Program:
    """Fork a process that runs `code` with pipes, after these `imports`; see `Server.start`."""
    reader, stdin = os.pipe()
    stdout, writer = os.pipe()
    stderr, error_writer = os.pipe()
    started = server_of(os.getpid(), imports).start(code, [reader, writer, error_writer], **about)
    for one in (reader, writer, error_writer):
        os.close(one)
    return Program(*started, stdin, stdout, stderr)


def command(*words: object) -> str:
    """Code that runs a command of qvsplit's."""
    return f"import sys\nfrom qvsplit.cli import main\nsys.argv = {['qvsplit', *map(str, words)]!r}\nmain()"


def run_program(*words: object, **about: Any) -> subprocess.CompletedProcess[str]:
    """Run one command of qvsplit's in a forked process."""
    program = start_program(command(*words), **about)
    printed, said = program.communicate()
    assert program.returncode is not None
    return subprocess.CompletedProcess([*map(str, words)], program.returncode, printed, said)


def program_in(folder: Path) -> None:
    """Put a program `qvsplit` into a folder, for shells: it runs in a forked process, on the shell's own streams."""
    server_of(os.getpid(), COMMANDS)  # started by the program it would hold the shell's streams open, and end with it
    code = "import sys; from tests.support import forked; sys.exit(forked.run_here(*sys.argv[1:]))"
    (folder / "qvsplit").write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    (folder / "qvsplit").chmod(0o755)


def run_here(*words: str) -> int:
    """Run one command of qvsplit's in a forked process, on the standard streams of this one."""
    return Forked(*server_of(os.getpid(), COMMANDS).start(command(*words), [0, 1, 2])).wait()


def start_on_terminal(words: Sequence[str], **environment: str) -> tuple[Forked, int]:
    """Start one command of qvsplit's on a pseudo-terminal; gives the process and the terminal's other side."""
    return python_on_terminal(command(*words), **environment)


def python_on_terminal(code: str, **environment: str) -> tuple[Forked, int]:
    """Run code on a pseudo-terminal, as `start_on_terminal`."""
    ours, theirs = os.openpty()
    server = server_of(os.getpid(), COMMANDS)
    started = server.start(code, [theirs] * 3, environment=os.environ | environment, terminal=True)
    os.close(theirs)
    return Forked(*started), ours


# ------------------------------------------------------------------------------------------------------ the server


def serve(imports: str, descriptor: int) -> None:
    """Import, then fork a child for each order, and say how each ended, while anybody is connected."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the processes that are connected, whose end we hear of
    names: dict[str, Any] = {}
    gc.disable()  # imports make no garbage worth looking for
    exec(imports, names)
    gc.enable()
    gc.freeze()  # what children share is not written to
    listener = socket.socket(fileno=descriptor)
    clients: dict[int, socket.socket] = {}
    running: dict[int, tuple[int, int]] = {}  # what says that a child has ended → its pid, where to write how
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    while True:
        for ready, _ in poller.poll():
            if ready == descriptor:
                if client := _accepted(listener):
                    clients[client.fileno()] = client
                    poller.register(client, select.POLLIN)
            elif ready in running:
                poller.unregister(ready)
                pid, writer = running.pop(ready)
                _, status = os.waitpid(pid, 0)
                _say(writer, os.waitstatus_to_exitcode(status))
                os.close(writer)
                os.close(ready)
            elif order := _order_of(clients[ready]):
                message, (writer, *descriptors) = order
                child = os.fork()
                if child == 0:
                    others = [one for ended, (_, other) in running.items() for one in (ended, other)]
                    _be(json.loads(message), names, descriptors, [writer, descriptor, *clients, *others])
                for one in descriptors:
                    os.close(one)
                ended = os.pidfd_open(child)
                running[ended] = child, writer
                poller.register(ended, select.POLLIN)
                _say(writer, child)
            else:
                poller.unregister(ready)
                clients.pop(ready).close()
                if not clients:
                    os._exit(0)  # nothing is taken apart


def _accepted(listener: socket.socket) -> socket.socket | None:
    """Greet whoever connects; not another user, who knows the address as well."""
    client, _ = listener.accept()
    _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user == os.geteuid():
        with suppress(BrokenPipeError):
            client.send(b".")
        return client
    client.close()
    return None


def _order_of(client: socket.socket) -> tuple[bytes, list[int]] | None:
    """Give an order and its descriptors; None where the process that was connected has ended."""
    with suppress(ConnectionResetError):
        message, received, _, _ = socket.recv_fds(client, 1 << 20, 16)
        return (message, received) if message else None
    return None


def _be(order: dict[str, Any], names: dict[str, Any], descriptors: list[int], not_ours: list[int]) -> None:
    """Be the process that was ordered, to its end."""
    code = 1
    try:
        for one in not_ours:
            os.close(one)
        for number, one in enumerate(descriptors[:3]):
            os.dup2(one, number)
            os.close(one)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number in order.get("ignored", ()):
            signal.signal(number, signal.SIG_IGN)
        if order.get("session") or order.get("terminal"):
            os.setsid()
        if order.get("terminal"):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for name in ("stdin", "stdout", "stderr"):
            _open_anew(name)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        tempfile.tempdir = None  # it may have been looked up
        exec(order["code"], names | {"descriptors": descriptors})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # as a process does at its end: waits for threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _open_anew(name: str) -> None:
    """Open a standard stream as Python does for what is there now."""
    number = ("stdin", "stdout", "stderr").index(name)
    plain = getattr(sys, name)
    stream = os.fdopen(
        number, "w" if number else "r", encoding=plain.encoding, errors=plain.errors, closefd=False,
        buffering=1 if number == 2 or os.isatty(number) else -1,
    )  # fmt: skip
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
