"""Reading and decoding in processes of their own: what a picture does to its decoder, it does to nobody else.

A decoder has a limit of memory, each picture a limit of time; one that crashes its decoder, hangs it or fills its
memory is a bad picture like any other. Pixels come back through memory that both processes share. Knows no torch.

The talk on the socket: JSON messages behind their length in four bytes. To `read` the child answers with the file's
hash, size and mtime, and keeps its bytes; to `decode` with the size that the header claims, waits for leave to take
the memory, and passes a descriptor of the RGB pixels; to `measure` with width and height by the header.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from qvsplit.errors import PictureError, PictureVanished, QvsplitError
from qvsplit.folders import Found

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PICTURE_SECONDS = 60.0  # for each of its steps: to be read, to have its header read, to be decoded
START_SECONDS = 120.0  # a machine may be busy, its disk cold
MEMORY_BYTES = 4 << 30  # beyond what the decoder takes itself: several copies of the largest picture there may be
_STRIP_BYTES = 16 << 20

T = TypeVar("T")
OnFile = Callable[[bytes, int, int | None], bool]


class Closed(Exception):
    """`close` was called: whoever still waits for a picture need not wait longer."""


class _Died(Exception):
    """The child is no more."""


class Decoder:
    """One child process, started when it is needed and again when it died. Used by one thread at a time."""

    def __init__(self, seconds: float = PICTURE_SECONDS) -> None:
        self.seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False
        self.peak_memory = 0  # the most that a child of it held, in bytes

    def look(
        self, found: Found, on_file: OnFile, may: Callable[[int], None] = lambda pixels: None
    ) -> npt.NDArray[np.uint8] | None:
        """The picture as upright RGB [height, width, 3].

        None where `on_file`, told SHA-256, size and trusted mtime_ns, does not want it.

        `may` is asked for the memory of so many pixels, and may wait. PictureError with the reason for a bad picture.
        """
        return self._try(lambda: self._look(found, on_file, may))

    def measure(self, found: Found) -> tuple[int, int]:
        """Width and height by the header alone, perhaps before turning upright. PictureError if it has none."""

        def step() -> tuple[int, int]:
            self._ask({"do": "read", "root": found.root, "path": found.path, "size": found.size})
            width, height = self._ask({"do": "measure"})["measured"]
            return int(width), int(height)

        return self._try(step)

    def close(self) -> None:
        """End the child, whatever it does. May be called from another thread."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()

    def _kill_if_closed(self) -> None:
        if self._closed and self._child is not None:
            self._child.kill()

    def wait(self, seconds: float) -> None:
        """For the child that was closed to be gone, so long at the most."""
        child = self._child
        if child is not None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, seconds))

    def _try(self, step: Callable[[], T]) -> T:
        """`step`, once more where the child died of it: the system may have had reasons of its own."""
        for last in (False, True):
            try:
                return step()
            except TimeoutError:
                self._stop()
                raise PictureError(f"took longer than {self.seconds:g} s to read or decode") from None
            except _Died:
                how = self._stop()
                if self._closed:
                    raise Closed from None
                if last:
                    raise PictureError(f"crashes its decoder ({how})") from None
        raise AssertionError

    def _look(self, found: Found, on_file: OnFile, may: Callable[[int], None]) -> npt.NDArray[np.uint8] | None:
        import numpy as np

        file = self._ask({"do": "read", "root": found.root, "path": found.path, "size": found.size})
        if not on_file(bytes.fromhex(file["sha256"]), file["size"], file["mtime_ns"]):
            return None
        width, height = self._ask({"do": "decode"})["claims"]
        may(width * height)
        decoded = self._ask({"do": "go on"})
        width, height = decoded["decoded"]
        self.peak_memory = max(self.peak_memory, decoded["memory"])
        assert self._socket is not None
        try:
            _, (descriptor,), _, _ = socket.recv_fds(self._socket, 1, 1)
        except TimeoutError:
            raise
        except (OSError, ValueError):  # the child died just now, or no descriptor is left
            raise _Died from None
        try:  # not copied: the array is the only holder of the mapping, which goes with it
            pixels = mmap.mmap(
                descriptor, width * height * 3, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except (MemoryError, OSError):
            raise PictureError("does not fit into memory") from None
        else:
            return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        finally:
            os.close(descriptor)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            if message["do"] != "read":
                raise _Died
            self._start()
        assert self._socket is not None
        try:
            self._socket.settimeout(self.seconds)
            _send(self._socket, message)
            answer = _receive(self._socket, time.monotonic() + self.seconds)
        except TimeoutError:
            raise
        except (OSError, EOFError):
            raise _Died from None
        if "vanished" in answer:
            raise PictureVanished(answer["vanished"])
        if "error" in answer:
            raise PictureError(answer["error"])
        if "bug" in answer:
            raise RuntimeError(f"in a decoder: {answer['bug']}")
        return answer

    def _start(self) -> None:
        if self._closed:
            raise Closed
        ours, theirs = socket.socketpair()
        # the very modules that this process has; no thread pools for what a decoder computes
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        with theirs:
            try:
                self._child = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-c",
                        f"from qvsplit.decoder import main; main({theirs.fileno()}, {self.seconds})",
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # libraries' remarks on odd files; a bug comes as a message
                    env=environment,
                )
            except OSError as error:
                ours.close()
                raise QvsplitError(f"no process can be started to decode pictures ({error.strerror})") from None
        self._socket = ours
        self._kill_if_closed()  # which may have come while it was being started
        try:
            ours.settimeout(START_SECONDS)
            _receive(ours, time.monotonic() + START_SECONDS)
        except (OSError, EOFError):
            how = self._stop()
            if self._closed:
                raise Closed from None
            raise QvsplitError(f"a process to decode pictures did not start ({how}); is Pillow installed?") from None

    def _stop(self) -> str:
        """End the child, and say how it ended."""
        child, self._child = self._child, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if child is None:
            return "it was never there"
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.2)  # it may be about to end by itself, with a status that tells more
        child.kill()
        code = child.wait()
        return _ending(code)


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed: not enough memory?"
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit {code}"


class Decoders:
    """One `Decoder` a thread, and the memory that all of them may take for pixels at a time."""

    def __init__(self, seconds: float = PICTURE_SECONDS) -> None:
        self.seconds = seconds
        self._mine = threading.local()
        self._all: list[Decoder] = []
        self._closed = False
        self._lock = threading.Lock()

    def mine(self) -> Decoder:
        """The calling thread's."""
        decoder: Decoder | None = getattr(self._mine, "decoder", None)
        if decoder is None:
            with self._lock:
                if self._closed:
                    raise Closed
                decoder = self._mine.decoder = Decoder(self.seconds)
                self._all.append(decoder)
        return decoder

    def peak_memory(self) -> int:
        """The most that the children held, each at its own worst, in bytes."""
        with self._lock:
            return sum(decoder.peak_memory for decoder in self._all)

    def close(self) -> None:
        """End every child."""
        with self._lock:
            self._closed = True
            closed = list(self._all)
        for decoder in closed:
            decoder.close()
        deadline = time.monotonic() + 1
        for decoder in closed:
            decoder.wait(deadline - time.monotonic())


class PixelBudget:
    """How many pixels may be in memory as decoded pictures, in order: the first in line is never kept waiting.

    Whoever takes pictures in turn says with `serve` whose turn it is; that one gets its memory even over the budget,
    so that those behind it, who hold theirs until their own turn, cannot block it.
    """

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._turn = -1
        self._closed = False
        self._changed = threading.Condition()

    def take(self, number: int, pixels: int) -> None:
        """Wait until picture `number` may have so many pixels."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number <= self._turn or pixels <= self._free)
            if self._closed:
                raise Closed
            self._free -= pixels

    def give_back(self, pixels: int) -> None:
        """They are no longer in memory."""
        with self._changed:
            self._free += pixels
            self._changed.notify_all()

    def serve(self, number: int) -> None:
        """It is the turn of picture `number`."""
        with self._changed:
            self._turn = number
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


# ------------------------------------------------------------------------------------------------------ the child


def main(descriptor: int, seconds: float) -> None:
    """What the child process runs, on the socket that it has as `descriptor`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, which ends us by closing the socket
    from qvsplit import images

    images.warm_up()
    _limit_memory()
    with socket.socket(fileno=descriptor) as talk:
        _send(talk, {"ready": True})
        data = b""
        while True:
            try:
                message = _receive(talk)
                signal.alarm(int(2 * seconds) + 30)  # should the parent be gone, and nobody watch the clock
                if message["do"] == "read":
                    data = b""
                    file = images.read(Found(message["root"], message["path"], message["size"], 0))
                    data = file.data
                    _send(talk, {"sha256": file.sha256.hex(), "size": file.size, "mtime_ns": file.mtime_ns})
                elif message["do"] == "measure":
                    _send(talk, {"measured": images.measure(data)})
                else:
                    _decode(talk, data, seconds)
            except PictureVanished as error:
                _send(talk, {"vanished": str(error)})
            except PictureError as error:
                _send(talk, {"error": str(error)})
            except MemoryError:
                _send(talk, {"error": "does not fit into memory"})
            except (EOFError, OSError):
                return
            except Exception as error:
                _send(talk, {"bug": repr(error)})
            finally:
                signal.alarm(0)


def _decode(talk: socket.socket, data: bytes, seconds: float) -> None:
    from qvsplit import devices, images

    def claims(width: int, height: int) -> None:
        try:
            _send(talk, {"claims": [width, height]})
            signal.alarm(0)  # leave may take its time
            _receive(talk)
            signal.alarm(int(2 * seconds) + 30)
        except (EOFError, OSError):
            raise SystemExit from None

    image = images.decode(data, on_size=claims)
    width, height = image.size
    with _shared_memory() as shared:
        rows, columns = (
            max(1, _STRIP_BYTES // (3 * width)),
            min(width, _STRIP_BYTES // 3),
        )  # one of them is all there is
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                box = (left, top, min(left + columns, width), min(top + rows, height))
                shared.write(image.crop(box).tobytes())
        shared.flush()
        _send(talk, {"decoded": [width, height], "memory": devices.peak_memory()})
        socket.send_fds(talk, [b"p"], [shared.fileno()])


def _shared_memory() -> Any:
    """A file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("qvsplit-pixels"), "wb")
    return tempfile.TemporaryFile()


def _limit_memory() -> None:
    import resource

    try:
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return  # not Linux: such systems do not keep this limit anyway
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))


def _send(talk: socket.socket, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    talk.sendall(len(text).to_bytes(4, "little") + text)


def _receive(talk: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """One message. EOFError where the other end is closed, TimeoutError past the deadline."""
    length = int.from_bytes(_exactly(talk, 4, deadline), "little")
    message: dict[str, Any] = json.loads(_exactly(talk, length, deadline))
    return message


def _exactly(talk: socket.socket, count: int, deadline: float | None) -> bytes:
    got = bytearray()
    while len(got) < count:
        if deadline is not None:
            talk.settimeout(max(0.001, deadline - time.monotonic()))
        more = talk.recv(count - len(got))
        if not more:
            raise EOFError
        got += more
    return bytes(got)
