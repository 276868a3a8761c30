"""The child process that reads and decodes for one `Decoder`, and the messages between the two. Knows no torch.

Messages on the socket are JSON behind their length in four bytes, little-endian. The parent asks:

    {"do": "read", "root", "path", "size"}   → {"sha256", "size", "mtime_ns", "version"}; the child keeps the bytes
    {"do": "measure"}                        → {"measured": [width, height]}, by the header alone
    {"do": "decode"}                         → {"claims": [width, height]}, then the child waits for
    {"do": "go on"}                          → {"decoded": [width, height], "taken_at", "format", "memory"}, and a
                                               descriptor of memory that holds the RGB pixels

`measure` and `decode` are of the bytes that were read last. Instead of an answer comes {"error", "kind"} for a bad
file, {"not_found"} for one that no longer exists, {"bug"} for what nobody expected.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from qvsplit.errors import ItemError, ItemNotFound
from qvsplit.runtime.clock import wait_until
from qvsplit.runtime.memory import peak_memory
from qvsplit.sources.source import Entry

if TYPE_CHECKING:
    from PIL import Image

MEMORY_BYTES = 4 << 30  # beyond what the decoder takes itself: several copies of the largest image there may be
_STRIP_BYTES = 16 << 20

T = TypeVar("T")


def main(descriptor: int, seconds: float) -> None:
    """Run the child on the socket that it has as `descriptor`, until the other end is closed.

    Args:
        descriptor: The socket's number.
        seconds: The parent's limit for each step. Should the parent be gone, the child ends itself some time later.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, which ends us by closing the socket
    from qvsplit.sources import images

    images.warm_up()
    _limit_memory()
    with socket.socket(fileno=descriptor) as connection:
        send(connection, {"ready": True})
        _Child(connection, seconds).serve()


class _Child:
    """What the child does with the parent's messages, and the bytes of the file that it has read last."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection = connection
        self.seconds = seconds
        self.data = b""

    def serve(self) -> None:
        """Answer messages until the other end is closed."""
        steps: dict[str, Callable[[dict[str, Any]], None]] = {
            "read": self._read,
            "measure": self._measure,
            "decode": self._decode,
        }
        while True:
            try:
                message = receive(self.connection)
                self._set_alarm()
                steps[message["do"]](message)
            except ItemNotFound as error:
                send(self.connection, {"not_found": error.args[0]})
            except ItemError as error:
                send(self.connection, {"error": error.args[0], "kind": error.kind})
            except MemoryError:
                send(self.connection, {"error": "does not fit into memory", "kind": "memory"})
            except (EOFError, OSError):
                return
            except Exception as error:
                send(self.connection, {"bug": repr(error)})
            finally:
                signal.alarm(0)

    def _read(self, message: dict[str, Any]) -> None:
        from qvsplit.sources import files

        self.data = b""  # before the next file is in memory
        file = files.read(Entry("", message["file"], message["size"], None, None), message["file"])
        self.data = file.data
        identity = {"sha256": file.sha256, "size": file.size, "mtime_ns": file.mtime_ns, "version": file.version}
        send(self.connection, identity)

    def _measure(self, message: dict[str, Any]) -> None:
        from qvsplit.sources import images

        send(self.connection, {"measured": images.measure(self.data)})

    def _decode(self, message: dict[str, Any]) -> None:
        from qvsplit.sources import images

        image, metadata = images.decode_with_metadata(self.data, on_size=self._wait_for_leave)
        with _shared_memory() as shared:
            _write_pixels(image, shared)
            decoded = {"decoded": image.size, "taken_at": metadata.taken_at, "format": metadata.format}
            send(self.connection, decoded | {"memory": peak_memory()})
            socket.send_fds(self.connection, [b"p"], [shared.fileno()])

    def _wait_for_leave(self, width: int, height: int) -> None:
        """Tell the parent the size that the header claims; wait, for however long, until the memory may be taken."""
        try:
            send(self.connection, {"claims": [width, height]})
            signal.alarm(0)
            receive(self.connection)
            self._set_alarm()
        except (EOFError, OSError):
            raise SystemExit from None

    def _set_alarm(self) -> None:
        signal.alarm(int(2 * self.seconds) + 30)  # should the parent be gone, and nobody watch the clock


def _write_pixels(image: Image.Image, shared: Any) -> None:
    """Write RGB pixels row by row, a part of the image at a time, so that they are never in memory twice."""
    width, height = image.size
    # one of the two is all there is
    rows, columns = max(1, _STRIP_BYTES // (3 * width)), min(width, _STRIP_BYTES // 3)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            box = (left, top, min(left + columns, width), min(top + rows, height))
            shared.write(image.crop(box).tobytes())
    shared.flush()


def _shared_memory() -> Any:
    """Open a file without a name, in memory where the system has such files."""
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


# ---------------------------------------------------------------------------------------------------------- messages


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message."""
    text = json.dumps(message).encode()
    connection.sendall(len(text).to_bytes(4, "little") + text)


def receive(connection: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Wait for one message.

    Args:
        connection: The socket.
        deadline: Until when to wait, by `active_seconds`; None waits for ever.

    Raises:
        EOFError: The other end is closed.
        TimeoutError: The deadline has passed.
    """
    length = int.from_bytes(_receive_exactly(connection, 4, deadline), "little")
    message: dict[str, Any] = json.loads(_receive_exactly(connection, length, deadline))
    return message


def _receive_exactly(connection: socket.socket, count: int, deadline: float | None) -> bytes:
    got = bytearray()
    while len(got) < count:
        missing = count - len(got)
        if deadline is None:
            more = connection.recv(missing)
        else:
            more = receive_until(deadline, connection, functools.partial(connection.recv, missing))
        if not more:
            raise EOFError
        got += more
    return bytes(got)


def receive_until(deadline: float, connection: socket.socket, receive: Callable[[], T]) -> T:
    """Wait until `deadline`, by `active_seconds`, for what `receive` gets from `connection`.

    Raises:
        TimeoutError: The deadline has passed.
    """

    def wait(seconds: float) -> T:
        connection.settimeout(seconds)
        return receive()

    return wait_until(deadline, wait)
