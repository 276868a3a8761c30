"""Read and decode in child processes: what an image does to its decoder, it does to nobody else.

A decoder has a limit of memory, each step of an image a limit of time; an image that crashes its decoder, hangs it or
fills its memory is a bad image like any other. Pixels come back through memory that both processes share, uncopied.
The child's side, and the messages, are in decoder_process.py. Knows no torch.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qvsplit.errors import ItemError, ItemNotFound, ProcessError
from qvsplit.runtime.clock import active_seconds
from qvsplit.sources import decoder_process
from qvsplit.sources.files import FileInfo
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.pixel_budget import Closed as Closed
from qvsplit.sources.source import Entry, Key, local_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ITEM_SECONDS = 60.0  # for each of an item's steps: to be read, to have its header read, to be decoded
START_SECONDS = 120.0  # a machine may be busy, its disk cold
_CODE = "from qvsplit.sources.decoder_process import main; main({descriptor}, {seconds})"

T = TypeVar("T")
OnSize = Callable[[int, int], None]
Fetch = Callable[[Entry], Path]  # Source.fetch


class _Died(Exception):
    """The child is no more."""


class _TookTooLong(Exception):
    """The child gave no answer within its time."""


class DecoderPool:
    """One `Decoder` a thread. Pickled, it leaves its children behind; the copy starts its own when it needs them."""

    def __init__(self, item_timeout: float = ITEM_SECONDS, fetch: Fetch = local_file) -> None:
        self.item_timeout = item_timeout
        self._fetch = fetch
        self._mine = threading.local()
        self._all: list[Decoder] = []
        self._closed = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[DecoderPool], tuple[float, Fetch]]:
        """Pickle the settings alone."""
        return DecoderPool, (self.item_timeout, self._fetch)

    def mine(self) -> Decoder:
        """Give the calling thread's decoder.

        Raises:
            Closed: `close` was called.
        """
        decoder: Decoder | None = getattr(self._mine, "decoder", None)
        if decoder is None:
            with self._lock:
                if self._closed:
                    raise Closed
                decoder = self._mine.decoder = Decoder(self.item_timeout, self._fetch)
                self._all.append(decoder)
        return decoder

    def peak_memory(self) -> int:
        """Add up the most that the children held, each at its own worst, in bytes."""
        with self._lock:
            return sum(decoder.peak_memory for decoder in self._all)

    def close(self) -> None:
        """End every child, whatever it does. May be called from any thread."""
        with self._lock:
            self._closed = True
            closed = list(self._all)
        for decoder in closed:
            decoder.close()
        deadline = time.monotonic() + 1
        for decoder in closed:
            decoder.wait(deadline - time.monotonic())


class Decoder:
    """One child process, started when it is needed and again when it died. Used by one thread at a time.

    A step of which the child dies is tried once more: the system may have had reasons of its own. Every step raises
    `ItemError`, with the reason and its kind, for a bad file, and `Closed` after `close`.
    """

    def __init__(self, item_timeout: float = ITEM_SECONDS, fetch: Fetch = local_file) -> None:
        self.item_timeout = item_timeout
        self._fetch = fetch
        self.peak_memory = 0  # the most that a child of it held, in bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False
        self._held: tuple[Key, str] | None = None  # item and SHA-256 of the bytes that the child keeps

    def read(self, entry: Entry) -> FileInfo:
        """Read and hash the file of `entry`. The child keeps its bytes, for `decode`.

        Raises:
            ItemNotFound: The file was listed and no longer exists.
            ItemError: It cannot be read.
        """
        return self._try(lambda: self._read(entry))

    def decode(self, entry: Entry, info: FileInfo, on_size: OnSize = lambda width, height: None) -> DecodedImage:
        """Decode the file of `entry`, which `read` said to be `info`; of this process or of another.

        Reads nothing where the child still has those bytes, else reads them again.

        Args:
            entry: Where the file lies.
            info: What was read.
            on_size: Called with the width and height that the header claims, before memory is taken for the pixels; it
                may wait, and it is called again where the image is tried a second time. What it raises is passed on.

        Raises:
            ItemNotFound: The file had to be read again, and no longer exists.
            ItemError: It is no image that can be read, or its content is no longer that of `info`.
        """

        def step() -> DecodedImage:
            if self._held != (entry.key, info.sha256) and self._read(entry).sha256 != info.sha256:
                raise ItemError("was changed while it was being read")
            return self._decode(on_size)

        return self._try(step)

    def measure(self, entry: Entry) -> tuple[int, int]:
        """Read the file and give width and height by its header alone, perhaps before turning upright."""

        def step() -> tuple[int, int]:
            self._read(entry)
            width, height = self._ask({"do": "measure"})["measured"]
            return int(width), int(height)

        return self._try(step)

    def close(self) -> None:
        """End the child, whatever it does. May be called from another thread."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()

    def wait(self, seconds: float) -> None:
        """Wait for the child that was closed to be gone, so long at the most."""
        child = self._child
        if child is not None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, seconds))

    def _try(self, step: Callable[[], T]) -> T:
        """Take `step`, once more where the child died of it."""
        for last in (False, True):
            try:
                return step()
            except _TookTooLong:
                self._stop()
                raise ItemError(
                    f"took longer than {self.item_timeout:g} s to read or decode; `item_timeout` allows more", "timeout"
                ) from None
            except _Died:
                how, kind = self._stop()
                if self._closed:
                    raise Closed from None
                if last:
                    raise ItemError(f"crashes its decoder ({how})", kind) from None
        raise AssertionError

    def _read(self, entry: Entry) -> FileInfo:
        self._held = None
        file = self._fetched(entry)
        if self._socket is None:
            self._start()
        read = self._ask({"do": "read", "file": file, "size": entry.size})
        self._held = entry.key, read["sha256"]
        if file != entry.file:  # a copy's own times say nothing of the item
            return FileInfo(read["sha256"], read["size"], entry.mtime_ns or 0, entry.version)
        return FileInfo(read["sha256"], read["size"], read["mtime_ns"], read["version"])

    def _fetched(self, entry: Entry) -> str:
        """Have the source give the item as a local file."""
        try:
            return str(self._fetch(entry))
        except FileNotFoundError:
            raise ItemNotFound("is no longer there") from None
        except OSError as error:
            raise ItemError(f"cannot be fetched: {error.strerror or error}", "permission") from None

    def _decode(self, on_size: OnSize) -> DecodedImage:
        """Decode the bytes that the child keeps."""
        width, height = self._ask({"do": "decode"})["claims"]
        try:
            on_size(width, height)
        except BaseException:  # the child still waits for leave: the next one starts afresh
            self._stop(patience=0)
            raise
        decoded = self._ask({"do": "go on"})
        width, height = decoded["decoded"]
        self.peak_memory = max(self.peak_memory, decoded["memory"])
        pixels = self._receive_pixels(width, height)
        return DecodedImage(pixels, width, height, decoded["taken_at"], decoded["format"])

    def _receive_pixels(self, width: int, height: int) -> npt.NDArray[np.uint8]:
        """Map the memory that the child filled, uncopied, as [height, width, 3]; it goes with the array."""
        import numpy as np

        assert self._socket is not None
        ours, deadline = self._socket, active_seconds() + self.item_timeout
        try:
            _, (descriptor,), _, _ = decoder_process.receive_until(deadline, ours, lambda: socket.recv_fds(ours, 1, 1))
        except TimeoutError:
            raise _TookTooLong from None
        except (OSError, ValueError):  # the child died just now, or no descriptor is left
            raise _Died from None
        try:
            pixels = mmap.mmap(
                descriptor, width * height * 3, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except (MemoryError, OSError):
            raise ItemError("does not fit into memory", "memory") from None
        else:
            return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        finally:
            os.close(descriptor)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its answer, for `item_timeout` seconds, not counting those of a pause."""
        if self._socket is None:
            raise _Died
        try:
            self._socket.settimeout(self.item_timeout)
            decoder_process.send(self._socket, message)
            answer = decoder_process.receive(self._socket, active_seconds() + self.item_timeout)
        except TimeoutError:
            raise _TookTooLong from None
        except (OSError, EOFError):
            raise _Died from None
        except BaseException:  # an interrupt: the answer, when it comes, would be taken for the next one's
            self._stop(patience=0)
            raise
        if "not_found" in answer:
            raise ItemNotFound(answer["not_found"])
        if "error" in answer:
            raise ItemError(answer["error"], answer["kind"])
        if "bug" in answer:
            raise RuntimeError(f"in a decoder: {answer['bug']}")
        return answer

    def _start(self) -> None:
        if self._closed:
            raise Closed
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._child = _start_child(theirs.fileno(), self.item_timeout)
            except OSError as error:
                ours.close()
                raise ProcessError(f"no process can be started to decode images ({error.strerror})") from None
        self._socket = ours
        self._kill_if_closed()  # `close` may have come while it was being started
        try:
            decoder_process.receive(ours, active_seconds() + START_SECONDS)
        except (OSError, EOFError):
            how, _ = self._stop()
            if self._closed:
                raise Closed from None
            raise ProcessError(f"a process to decode images did not start ({how}); is Pillow installed?") from None

    def _kill_if_closed(self) -> None:
        if self._closed and self._child is not None:
            self._child.kill()

    def _stop(self, *, patience: float = 0.2) -> tuple[str, str]:
        """End the child; give how it ended, and the kind of error that this is for the item."""
        child, self._child = self._child, None
        self._held = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if child is None:
            return "it was never there", "content"
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience)  # it may be about to end by itself, with a status that says more
        child.kill()
        return _ending(child.wait())


def _start_child(descriptor: int, seconds: float) -> subprocess.Popen[bytes]:
    """Start a child on the socket `descriptor`, with the very modules that this process has. Raises OSError."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # no thread pools for what a decoder computes
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _CODE.format(descriptor=descriptor, seconds=seconds)],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # libraries' remarks on odd files; a bug comes as a message
        env=environment,
    )


def _ending(code: int) -> tuple[str, str]:
    if code == -signal.SIGKILL:
        return "killed: not enough memory? fewer `workers` take less", "memory"
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name, "content"
    return f"exit {code}", "content"
