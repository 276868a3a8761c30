"""Read and decode in child processes: what an item does to its decoder, it does to nobody else.

A decoder has a limit of memory, each step of an item a limit of time, a video's of time without progress; an item that
crashes its decoder, hangs it or fills its memory is a bad item like any other. Pixels come back through memory that
both processes share, uncopied. The child's side, and the messages, are in decoder_process.py. Knows no torch.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qvsplit.errors import ItemError, ItemNotFound, ProcessError
from qvsplit.runtime.clock import active_seconds
from qvsplit.sources import decoder_process
from qvsplit.sources.files import CHANGED, FileInfo
from qvsplit.sources.images import MAX_IMAGE_PIXELS, DecodedImage
from qvsplit.sources.pixel_budget import Closed as Closed
from qvsplit.sources.source import Entry, Key, local_file
from qvsplit.sources.videos import VideoInfo

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ITEM_SECONDS = 60.0  # for each of an item's steps: to be read, to have its header read, to be decoded
START_SECONDS = 120.0  # a machine may be busy, its disk cold
_NO_PROGRESS = "made no progress for {} while it was being decoded"
_CODE = "from qvsplit.sources.decoder_process import main; main({descriptor}, {seconds})"

T = TypeVar("T")
OnSize = Callable[[int, int], None]
Fetch = Callable[[Entry], Path]  # Source.fetch


class _Died(Exception):
    """The child is no more."""


class _TookTooLong(Exception):
    """The child gave no answer within its time."""


@dataclass(frozen=True, eq=False)
class _Clip:
    """The frames that the child is giving, in two buffers by turns."""

    buffers: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


class DecoderPool:
    """One `Decoder` a thread. Pickled, it leaves its children behind; the copy starts its own when it needs them."""

    def __init__(
        self,
        item_timeout: float = ITEM_SECONDS,
        fetch: Fetch = local_file,
        gifs_are_videos: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        self.item_timeout = item_timeout
        self._settings = fetch, gifs_are_videos, max_image_pixels
        self._mine = threading.local()
        self._all: list[Decoder] = []
        self._closed = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[DecoderPool], tuple[float, Fetch, bool, int]]:
        """Pickle the settings alone."""
        return DecoderPool, (self.item_timeout, *self._settings)

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
                decoder = self._mine.decoder = Decoder(self.item_timeout, *self._settings)
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

    def __init__(
        self,
        item_timeout: float = ITEM_SECONDS,
        fetch: Fetch = local_file,
        gifs_are_videos: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        self.item_timeout = item_timeout
        self._fetch = fetch
        self._gifs_are_videos = gifs_are_videos
        self._max_image_pixels = max_image_pixels
        self.peak_memory = 0  # the most that a child of it held, in bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False
        self._held: tuple[Key, str] | None = None  # item and SHA-256 of the file that the child keeps
        self._clip: _Clip | None = None  # what the child gives frames of

    def read(self, entry: Entry) -> FileInfo:
        """Read and hash the file of `entry`. The child keeps an image's bytes, for `decode`, and a video open.

        Raises:
            ItemNotFound: The file was listed and no longer exists.
            ItemError: It cannot be read.
        """
        info = self._try(lambda: self._read(entry))
        return info if info.frames is not None else replace(info, frames=self._count())

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
            self._hold(entry, info)
            return self._decode(on_size)

        return self._try(step)

    def scan(self, entry: Entry, info: FileInfo) -> VideoInfo:
        """Say what the clip of `entry` is, which `read` said to be `info`; of this process or of another.

        Raises:
            ItemNotFound: The file had to be read again, and no longer exists.
            ItemError: It is no clip that can be read, or its content is no longer that of `info`.
        """

        def step() -> VideoInfo:
            self._hold(entry, info)
            answer = self._ask({"do": "scan"})
            self.peak_memory = max(self.peak_memory, answer["memory"])
            return VideoInfo(**answer["scanned"])

        return self._try(step, _NO_PROGRESS)

    def frames(
        self, entry: Entry, info: FileInfo, indices: Sequence[int]
    ) -> Generator[npt.NDArray[np.uint8], None, None]:
        """Give frames of the clip of `entry`, uint8 [height, width, 3], upright RGB, while the child decodes the next.

        A frame that the child dies of is tried once more, by another one that begins there. Frames that are not taken
        any more, since the iterator is closed or another step is taken in between, end the child.

        Args:
            entry: Where the file lies.
            info: What was read.
            indices: Which frames, in order; one may repeat.

        Yields:
            An array that is valid until the next one is asked for.

        Raises:
            ItemNotFound: The file had to be read again, and no longer exists.
            ItemError: It cannot be decoded up to there, or its content is no longer that of `info`.
        """
        wanted = [int(index) for index in indices]
        clip: _Clip | None = None

        def step(position: int) -> npt.NDArray[np.uint8]:
            nonlocal clip
            if clip is None or clip is not self._clip:
                clip = self._begin_clip(entry, info, wanted[position:])
            return self._next_frame(clip, is_last=position == len(wanted) - 1)

        try:
            for position in range(len(wanted)):
                yield self._try(functools.partial(step, position), _NO_PROGRESS)
        finally:
            if clip is not None and clip is self._clip:
                self._stop(patience=0)

    def measure(self, entry: Entry, info: FileInfo | None = None) -> tuple[int, int]:
        """Give width and height of an image by its header alone, perhaps before turning upright.

        `info` is what was read; without it the file is read.
        """

        def step() -> tuple[int, int]:
            if info is None:
                self._read(entry)
            else:
                self._hold(entry, info)
            width, height = self._ask({"do": "measure", "max_pixels": self._max_image_pixels})["measured"]
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

    def _try(self, step: Callable[[], T], too_long: str = "took longer than {} to read or decode") -> T:
        """Take `step`, once more where the child died of it."""
        for last in (False, True):
            try:
                return step()
            except _TookTooLong:
                self._stop()
                raise ItemError(
                    f"{too_long.format(f'{self.item_timeout:g} s')}; `item_timeout` allows more", "timeout"
                ) from None
            except _Died:
                how, kind = self._stop()
                if self._closed:
                    raise Closed from None
                if last:
                    raise ItemError(f"crashes its decoder ({how})", kind) from None
        raise AssertionError

    def _hold(self, entry: Entry, info: FileInfo) -> None:
        """Have the child keep the file that `info` is of; it is read again where it does not."""
        self._end_clip()
        if self._held != (entry.key, info.sha256) and self._read(entry).sha256 != info.sha256:
            raise ItemError(CHANGED)

    def _read(self, entry: Entry) -> FileInfo:
        self._end_clip()
        self._held = None
        file = self._fetched(entry)
        if self._socket is None:
            self._start()
        read = FileInfo(**self._ask({
            "do": "read", "file": file, "size": entry.size, "gifs_are_videos": self._gifs_are_videos
        }))  # fmt: skip
        self._held = entry.key, read.sha256
        if file != entry.file:  # a copy's own times say nothing of the item
            return replace(read, mtime_ns=entry.mtime_ns or 0, version=entry.version)
        return read

    def _count(self) -> int | None:
        """Count the frames of the image that the child keeps; None where that cannot be told, and decoding says why."""
        try:
            frames: int | None = self._ask({"do": "count"})["frames"]
        except (_TookTooLong, _Died):
            self._stop()
            if self._closed:
                raise Closed from None
            return None
        return frames

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
        width, height = self._ask({"do": "decode", "max_pixels": self._max_image_pixels})["claims"]
        try:
            on_size(width, height)
        except BaseException:  # the child still waits for leave: the next one starts afresh
            self._stop(patience=0)
            raise
        decoded = self._ask({"do": "go on"})
        width, height = decoded["decoded"]
        self.peak_memory = max(self.peak_memory, decoded["memory"])
        (pixels,) = self._receive_memory(1, (height, width, 3), mmap.MAP_PRIVATE)
        return DecodedImage(pixels, width, height, decoded["taken_at"], decoded["format"], decoded["cut_rows"])

    def _begin_clip(self, entry: Entry, info: FileInfo, indices: list[int]) -> _Clip:
        """Have the child begin with these frames."""
        self._hold(entry, info)
        answer = self._ask({"do": "frames", "indices": indices})
        width, height = answer["frames"]
        first, second = self._receive_memory(2, (height, width, 3), mmap.MAP_SHARED)
        self._clip = _Clip((first, second))
        return self._clip

    def _next_frame(self, clip: _Clip, *, is_last: bool) -> npt.NDArray[np.uint8]:
        try:
            answer = self._ask({"do": "next"})
        except (ItemError, RuntimeError):  # the child has said why it gives no more
            self._clip = None
            raise
        self.peak_memory = max(self.peak_memory, answer["memory"])
        if is_last:
            self._clip = None
        return clip.buffers[answer["buffer"]]

    def _end_clip(self) -> None:
        """End the child where it still gives frames: they are not wanted any more."""
        if self._clip is not None:
            self._stop(patience=0)

    def _receive_memory(self, count: int, shape: tuple[int, int, int], flags: int) -> list[npt.NDArray[np.uint8]]:
        """Map memory that the child fills, uncopied, as uint8 arrays; it goes with them."""
        import numpy as np

        assert self._socket is not None
        ours, deadline = self._socket, active_seconds() + self.item_timeout
        descriptors: list[int] = []
        try:
            _, descriptors, _, _ = decoder_process.receive_until(
                deadline, ours, lambda: socket.recv_fds(ours, 1, count)
            )
            if len(descriptors) != count:  # the child died just now, or no descriptor is left
                raise _Died
            size, access = math.prod(shape), mmap.PROT_READ | mmap.PROT_WRITE
            mapped = [mmap.mmap(descriptor, size, flags=flags, prot=access) for descriptor in descriptors]
        except TimeoutError:
            raise _TookTooLong from None
        except (MemoryError, OSError):
            if not descriptors:
                raise _Died from None
            self._stop(patience=0)
            raise ItemError("does not fit into memory", "memory") from None
        except _Died:
            raise
        except BaseException:  # an interrupt: what comes next on the socket would be taken for an answer
            self._stop(patience=0)
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return [np.frombuffer(memory, np.uint8).reshape(shape) for memory in mapped]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its answer, `item_timeout` seconds from the last sign of progress.

        Those of a pause do not count.
        """
        if self._socket is None:
            raise _Died
        try:
            self._socket.settimeout(self.item_timeout)
            decoder_process.send(self._socket, message)
            answer: dict[str, Any] = {"progress": True}
            while "progress" in answer:
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
                raise ProcessError(
                    f"no process can be started to decode images and videos ({error.strerror})"
                ) from None
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
        self._held = self._clip = None
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
