"""The child process that reads and decodes for one `Decoder`, and the messages between the two. Knows no torch.

Messages on the socket are JSON behind their length in four bytes, little-endian. The parent asks:

    {"do": "read", "file", "size", "gifs_are_videos"}
                             → a FileInfo's fields; the child keeps the bytes of an image, and a video open.
                               `frames` is null where they have to be counted, by
    {"do": "count"}          → {"frames": how many, or null where that cannot be told}
    {"do": "measure", "max_pixels"}
                             → {"measured": [width, height]}, by the header alone
    {"do": "decode", "max_pixels"}
                             → {"claims": [width, height]}, then the child waits for
    {"do": "go on"}          → {"decoded": [width, height], "taken_at", "format", "cut_rows", "memory"}, and a
                               descriptor of memory that holds the RGB pixels
    {"do": "scan"}           → {"scanned": a VideoInfo's fields, "memory"}
    {"do": "frames", "indices"}
                             → {"frames": [width, height]}, and descriptors of two buffers of memory that hold one
                               frame each; then, for each frame,
    {"do": "next"}           → {"buffer": the one that it is in, "memory"}. The child decodes one frame ahead, and
                               writes into a buffer again once the frame after the one in it was asked for

`count`, `measure` and `decode` are of the image that was read last, `scan` and `frames` of the video. Instead of an
answer comes {"error", "kind"} for a bad file, {"not_found"} for one that no longer exists, {"bug"} for what nobody
expected. While a video is read, scanned or decoded, {"progress"} comes before the answer, every half second while
anything advances.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import mmap
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from qvsplit.errors import ItemError, ItemNotFound, size
from qvsplit.runtime.clock import wait_until
from qvsplit.runtime.memory import machine_memory, peak_memory
from qvsplit.sources.source import Entry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from qvsplit.sources.files import OpenVideo
    from qvsplit.sources.videos import Scan

MEMORY_BYTES = 4 << 30  # beyond what the decoder takes itself; of a large image, PIXEL_BYTES for each of its pixels
PIXEL_BYTES = 16  # that an image may take here and in the process that has it decoded: see docs/decisions.md
PROGRESS_SECONDS = 0.5
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
    memory = _Memory()
    memory.limit(0)
    with socket.socket(fileno=descriptor) as connection:
        send(connection, {"ready": True})
        _Child(connection, seconds, memory).serve()


class _Child:
    """What the child does with the parent's messages, and the file that it has read last."""

    def __init__(self, connection: socket.socket, seconds: float, memory: _Memory) -> None:
        self.connection = connection
        self.seconds = seconds
        self.memory = memory
        self.data = b""
        self.video: OpenVideo | None = None
        self.scanned: Scan | None = None
        self.progress_at = 0.0

    def serve(self) -> None:
        """Answer messages until the other end is closed."""
        steps: dict[str, Callable[[dict[str, Any]], None]] = {
            "read": self._read,
            "count": self._count,
            "measure": self._measure,
            "decode": self._decode,
            "scan": self._scan,
            "frames": self._frames,
            "next": lambda message: None,  # asked for before the parent had heard that there are no more
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
        from qvsplit.sources import files, images, videos

        self._forget()  # before the next file is in memory
        entry = Entry("", message["file"], message["size"], None, None)
        kind_of = functools.partial(videos.kind_of, gifs_are_videos=message["gifs_are_videos"])
        file, self.video = files.read_either(
            entry, message["file"], head_bytes=videos.HEAD_BYTES, kind_of=kind_of, on_progress=self._tell_progress
        )
        self.data = file.data
        frames = None if self.video is None and images.may_have_frames(self.data) else 1
        send(self.connection, dataclasses.asdict(file.info) | {"frames": frames})

    def _count(self, message: dict[str, Any]) -> None:
        from qvsplit.sources import images

        self._expect_image()
        send(self.connection, {"frames": images.frames(self.data)})

    def _forget(self) -> None:
        if self.video is not None:
            self.video.stream.close()
        self.data, self.video, self.scanned = b"", None, None
        self.memory.limit(0)

    def _measure(self, message: dict[str, Any]) -> None:
        from qvsplit.sources import images

        self._expect_image()
        send(self.connection, {"measured": images.measure(self.data, message["max_pixels"])})

    def _decode(self, message: dict[str, Any]) -> None:
        from qvsplit.sources import images

        self._expect_image()
        image, metadata = images.decode_with_metadata(
            self.data, on_size=self._wait_for_leave, max_pixels=message["max_pixels"]
        )
        with _shared_memory() as shared:
            _write_pixels(image, shared)
            decoded = {"decoded": image.size} | dataclasses.asdict(metadata)
            send(self.connection, decoded | {"memory": peak_memory()})
            socket.send_fds(self.connection, [b"p"], [shared.fileno()])

    def _expect_image(self) -> None:
        if self.video is not None:
            raise ItemError("is a video, not an image")

    def _scan(self, message: dict[str, Any]) -> None:
        _, scanned = self._scanned()
        send(self.connection, {"scanned": dataclasses.asdict(scanned.info), "memory": peak_memory()})

    def _scanned(self) -> tuple[OpenVideo, Scan]:
        """Give the open video, scanned, at the latest now."""
        from qvsplit.sources import videos

        video = self.video
        if video is None:
            raise ItemError("is an image, not a video")
        if self.scanned is None:
            scanned = videos.scan(videos.FileView(video.stream.fileno()), self._tell_progress)
            video.check_unchanged()
            self.scanned = scanned
        return video, self.scanned

    def _frames(self, message: dict[str, Any]) -> None:
        """Decode one frame ahead of the one that was asked for last; see the top of this file."""
        import numpy as np

        from qvsplit.sources import videos

        video, scanned = self._scanned()
        info, indices = scanned.info, message["indices"]
        buffers = self._send_buffers(info.width, info.height)
        view, asked = videos.FileView(video.stream.fileno()), 0
        for number, frame in enumerate(videos.frames(view, scanned, indices, self._tell_progress)):
            while asked < number:
                self._wait_for_parent()
                asked += 1
            np.copyto(buffers[number % 2], frame)
            video.check_unchanged()
            send(self.connection, {"buffer": number % 2, "memory": peak_memory()})
        while asked < len(indices):
            self._wait_for_parent()
            asked += 1

    def _send_buffers(self, width: int, height: int) -> list[npt.NDArray[np.uint8]]:
        """Make memory for two frames that the parent sees, too; it goes with the arrays."""
        import numpy as np

        arrays = []
        with _shared_memory() as first, _shared_memory() as second:
            for shared in (first, second):
                try:
                    os.truncate(shared.fileno(), width * height * 3)
                    mapped = mmap.mmap(shared.fileno(), width * height * 3)
                except OSError:
                    raise MemoryError from None
                arrays.append(np.frombuffer(mapped, np.uint8).reshape(height, width, 3))
            send(self.connection, {"frames": [width, height], "memory": peak_memory()})
            socket.send_fds(self.connection, [b"f"], [first.fileno(), second.fileno()])
        return arrays

    def _tell_progress(self) -> None:
        """Tell the parent, now and then, that the work advances."""
        now = time.monotonic()
        if now - self.progress_at < PROGRESS_SECONDS:
            return
        self.progress_at = now
        self._set_alarm()
        try:
            send(self.connection, {"progress": True})
        except OSError:
            raise SystemExit from None

    def _wait_for_parent(self) -> None:
        """Wait, for however long, for the message that lets the work go on."""
        try:
            signal.alarm(0)
            receive(self.connection)
            self._set_alarm()
        except (EOFError, OSError):
            raise SystemExit from None

    def _wait_for_leave(self, width: int, height: int) -> None:
        """Tell the parent the size that the header claims; wait, for however long, until the memory may be taken."""
        self.memory.limit(width * height)
        try:
            send(self.connection, {"claims": [width, height]})
        except OSError:
            raise SystemExit from None
        self._wait_for_parent()

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
        return os.fdopen(os.memfd_create("qvsplit-pixels"), "w+b")
    return tempfile.TemporaryFile()


class _Memory:
    """What memory this process may take: by itself enough for most images, more for one that claims to be large."""

    def __init__(self) -> None:
        import resource

        self._machine = machine_memory()
        self._own: int | None = None  # taken before any image; None where the system keeps no such limit
        with suppress(OSError, ValueError), open("/proc/self/statm") as statm:
            self._own = int(statm.read().split()[0]) * resource.getpagesize()

    def limit(self, pixels: int) -> None:
        """Set the limit for an image that claims so many pixels. ItemError where this machine has not as much."""
        import resource

        needed = PIXEL_BYTES * pixels
        if needed > max(MEMORY_BYTES, self._machine):
            raise ItemError(
                f"takes {size(needed)} of memory as {pixels:,} pixels, and there are {size(self._machine)}", "memory"
            )
        if self._own is None:
            return
        with suppress(ValueError, OSError):
            highest = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (self._own + max(MEMORY_BYTES, needed), highest))


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
