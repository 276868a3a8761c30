"""Read a video: which frames it has, and any of them as upright RGB. PyAV, imported when the first video is met.

The rule (`VIDEO_RULE`) gives, to the bit, the frames that transformers' own reader has in its exact mode. The packets
are read once without decoding and sorted by presentation time: that counts the frames, and the rate is their number
over their span; what a header claims of either is not believed. Frames are matched by presentation time, converted by
FFmpeg's scaler with fixed flags, and turned upright. Of a clip that is sampled, one frame at a time is in memory.

Only the content decides what a file is, and nothing but that one file is ever opened: playlists and the like, which
name other files and hosts, are no videos here. Every bad clip is an `ItemError` with a reason and its kind. Knows
nothing of models: no torch.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qvsplit.errors import ItemError
from qvsplit.sources.faults import iso_kind

if TYPE_CHECKING:
    from fractions import Fraction

    import numpy as np
    import numpy.typing as npt
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

VIDEO_RULE = 1  # how a file becomes upright RGB frames; part of the extraction config
HEAD_BYTES = 4096  # as many of a file's first bytes as `kind_of` looks at
MAX_PACKETS = 2_000_000  # a day at 23 frames a second
MAX_PIXELS = 40_000_000  # of a frame: beyond 8K (7680 × 4320)
MAX_DECODED_PIXELS = 20 * 10**12  # of all frames: ten hours of 4K at 60 a second; hours of decoding on one core
MAX_SECONDS = 30 * 24 * 3600
MAX_FPS = 10_000
THREADS = 1  # for one clip; several clips are decoded at once, each in a process of its own
# Seeking costs about as much as decoding so many frames; where it saves less, the frames between are decoded.
SEEK_FRAMES = 64

# FFmpeg's demuxers of files that hold everything themselves: no playlists, no lists of files, no devices
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf,gif"
_PROTOCOLS = "none"  # which is the name of none: nothing is opened beside the file at hand
_SEEKABLE = frozenset({"mov", "matroska"})  # those that have an index of key frames
_ATTACHED_PICTURE = 0x400
_SOME, _MUCH = 8 << 20, 256 << 20  # of memory: what FFmpeg takes beside frames, and more than it takes of a sound file

Progress = Callable[[], None]


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a clip is.

    Attributes:
        n_frames: Frames that are shown.
        fps: Frames a second, over the span of all packets.
        duration: That span in seconds.
        width: Of an upright frame, in pixels.
        height: Of an upright frame, in pixels.
        stream: Number of the stream in the file.
        codec: FFmpeg's name of it, e.g. "h264".
        container: FFmpeg's name of the format, e.g. "mov" for all of MP4's family.
        rotation: Degrees, counter-clockwise, by which decoded frames are turned to be upright.
        pixel_aspect: Width to height of an upright frame's pixels, e.g. "4:3"; None where they are square.
    """

    n_frames: int
    fps: float
    duration: float
    width: int
    height: int
    stream: int
    codec: str
    container: str
    rotation: int
    pixel_aspect: str | None


@dataclass(frozen=True, slots=True)
class Scan:
    """What `frames` needs to know of a clip.

    Attributes:
        info: What the clip is.
        times: Presentation times of its frames, sorted, int64.
        keys: Places of the key frames among them, sorted.
        in_order: Whether frames are counted in the order of decoding, since their times cannot be trusted.
    """

    info: VideoInfo
    times: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    in_order: bool

    @property
    def seekable(self) -> bool:
        """Whether decoding may begin at any key frame."""
        return self.info.container in _SEEKABLE and not self.in_order


def reader_versions() -> dict[str, str]:
    """Give what the pixels of a video may depend on: PyAV, its FFmpeg, the processor's architecture.

    PyAV's wheels name FFmpeg's libraries by version, so that it need not be imported.
    """
    import importlib.metadata
    import platform

    name = re.compile(r"lib(avcodec|avfilter|avformat|avutil|swscale)\b.*?(\d+\.\d+\.\d+)")
    files = importlib.metadata.files("av") or []
    found = {match[1]: match[2] for file in files if (match := name.match(file.name))}
    if len(found) < 5:  # built against an FFmpeg of the system
        import av

        versions = {key.removeprefix("lib"): value for key, value in av.library_versions.items()}
        found = {key: ".".join(map(str, versions[key])) for key in versions if name.match(f"lib{key} 0.0.0")}
    ffmpeg = ", ".join(f"{library} {found[library]}" for library in sorted(found))
    return {"av": importlib.metadata.version("av"), "ffmpeg": ffmpeg, "architecture": platform.machine()}


# --------------------------------------------------------------------------------------------------- kind by content

_SIGNATURES = {
    b"\x1aE\xdf\xa3": "Matroska", b"FLV\x01": "FLV", b"OggS": "Ogg", b"\0\0\x01\xba": "MPEG",
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"): "ASF", bytes.fromhex("060e2b34020501010d0102010102"): "MXF",
}  # fmt: skip
_PACKETS = ((0, 188), (4, 192), (0, 204))  # of MPEG transport streams: where the first one's mark is, and their length


def kind_of(head: bytes, *, gifs_are_videos: bool) -> Literal["image", "video"]:
    """Tell by a file's first bytes, HEAD_BYTES of them, what it is to be read as: whatever is no video is an image."""
    if head.startswith(b"GIF8"):
        return "video" if gifs_are_videos else "image"
    return "video" if _container_of(head) else "image"


def _container_of(head: bytes) -> str | None:
    """Name the format of a video for people; None where it is none."""
    if (kind := iso_kind(head)) is not None:
        return kind if kind == "MP4" else None
    if head[4:8] in {b"moov", b"mdat", b"wide"}:
        return "QuickTime"
    if head[4:8] in {b"free", b"skip", b"pnot"} and head[:2] == b"\0\0":  # a box that is not large
        return "QuickTime"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    if is_transport_stream(head):
        return "MPEG-TS"
    if head.startswith(b"GIF8"):
        return "GIF"
    return next((name for signature, name in _SIGNATURES.items() if head.startswith(signature)), None)


def is_transport_stream(head: bytes) -> bool:
    """Tell whether a file is an MPEG transport stream: every packet begins with a mark."""
    for first, length in _PACKETS:
        marks = head[first::length]
        if len(marks) >= 3 and marks.count(0x47) == len(marks):
            return True
    return False


# -------------------------------------------------------------------------------------------------------- the file


class FileView:
    """An open file for FFmpeg: with a position of its own, and without a name, so that only the content counts."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes."""
        data = os.pread(self._descriptor, count, self._position)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError("a position before the file's first byte")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Give the position."""
        return self._position

    def at(self, offset: int, count: int) -> bytes:
        """Read up to `count` bytes at `offset`."""
        return os.pread(self._descriptor, count, offset)


def _boxes(file: FileView) -> Iterator[tuple[bytes, int]]:
    """Give type and end of the boxes that an MP4 file is made of, as far as they can be followed."""
    start, size = 0, file.size
    while start + 8 <= size:
        header = file.at(start, 16)
        length, name = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:  # a length of 64 bits follows
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:  # the last one
            length = size - start
        if length < 8:
            return
        start += length
        yield name, start


def _missing_bytes(file: FileView) -> int:
    """Count the bytes by which an MP4 file is shorter than the boxes that it is made of."""
    ends = [end for name, end in _boxes(file) if name in {b"mdat", b"moov", b"moof"}]
    return max(0, max(ends, default=0) - file.size)


@contextmanager
def _opened(file: FileView, threads: int = THREADS) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the video stream of a file; turn whatever goes wrong inside the block into an ItemError that says so."""
    try:
        import av
    except ImportError:
        raise ItemError("is a video, which needs PyAV: pip install av", "reader-missing") from None
    head = file.at(0, HEAD_BYTES)
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": _PROTOCOLS, "max_pixels": str(MAX_PIXELS)}
    stream = None
    file.seek(0)
    try:
        with av.open(file, mode="r", options=options, metadata_errors="replace") as container:
            stream = _video_stream(container)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            stream.thread_count = threads
            stream.thread_type = "FRAME" if threads > 1 else "SLICE"
            try:
                yield container, stream
            except av.error.FFmpegError as error:  # while the decoder holds what it has taken
                raise _bad_clip(error, file, head, stream) from None
    except av.error.FFmpegError as error:
        raise _bad_clip(error, file, head, stream) from None
    except MemoryError:
        raise ItemError("does not fit into memory", "memory") from None
    except OSError as error:
        raise ItemError(f"cannot be read: {error.strerror or error}", "permission") from None


def _video_stream(container: InputContainer) -> VideoStream:
    """Choose the stream that FFmpeg finds best, and see whether it can be decoded."""
    stream: Any = container.streams.best("video")
    if stream is None:
        raise ItemError("holds no video, only sound" if container.streams.audio else "holds no video")
    if int(stream.disposition) & _ATTACHED_PICTURE:
        raise ItemError("holds no video, only a cover picture")
    if stream.codec_context is None:
        raise ItemError(
            "is a video in a codec that this FFmpeg cannot decode; a newer one may: pip install --upgrade av",
            "reader-missing",
        )
    _check_size(stream.codec_context.width, stream.codec_context.height)
    video: VideoStream = stream
    return video


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ItemError(f"has frames of {width}×{height} pixels, over the limit of {MAX_PIXELS:,}")


def _bad_clip(error: Exception, file: FileView, head: bytes, stream: VideoStream | None) -> ItemError:
    """Say in words for those who own the file what FFmpeg said of it; equal causes in equal words."""
    import av

    codec = stream.codec_context if stream is not None else None
    pixels = codec.width * codec.height if codec is not None else 0
    if not _has_room(pixels, _MUCH if isinstance(error, MemoryError) else _SOME):
        return ItemError("does not fit into memory", "memory")
    container = _container_of(head) or "video"
    missing = (av.error.DecoderNotFoundError, av.error.PatchWelcomeError, av.error.BSFNotFoundError)
    if isinstance(error, missing):
        name = f" ({_codec_name(stream)})" if stream is not None else ""
        return ItemError(
            f"is a video of a variant{name} that this FFmpeg cannot decode; a newer one may: pip install --upgrade av",
            "reader-missing",
        )
    article = "an" if container[0] in "AFM" and container != "Matroska" else "a"
    if container in {"MP4", "QuickTime"} and stream is None:
        if _missing_bytes(file):
            return _cut_off(_missing_bytes(file))
        if all(name != b"moov" for name, _ in _boxes(file)):
            return ItemError(f"is {article} {container} file without its index (moov): writing it was never finished")
    if stream is None:
        return ItemError(f"is {article} {container} file that is cut off or damaged")
    if codec is not None and not pixels:  # no size is known where the decoder has refused it
        return ItemError(f"is {article} {container} file that is damaged, or has frames of over {MAX_PIXELS:,} pixels")
    return ItemError(f"is {article} {container} file that is damaged")


def _has_room(pixels: int, beside: int) -> bool:
    """Tell whether memory for another frame is to be had, and so many bytes `beside` it.

    Where memory ends, FFmpeg often says that the file is broken, or gives nothing; and where a broken file claims more
    than there can be, that memory ended.
    """
    try:
        mmap.mmap(-1, beside + 8 * pixels).close()
    except (MemoryError, OSError):
        return False
    return True


def _cut_off(missing: int) -> ItemError:
    return ItemError(f"ends early: its last {missing:,} bytes are missing; copy it again")


def _codec_name(stream: VideoStream) -> str:
    return str(stream.codec.canonical_name)


# --------------------------------------------------------------------------------------------------------- the scan


def scan(file: FileView, on_progress: Progress = lambda: None) -> Scan:
    """Read all packets of the clip without decoding them, and decode the first frame.

    Args:
        file: The clip.
        on_progress: Called for every packet.

    Raises:
        ItemError: It is no clip that can be read.
    """
    with _opened(file) as (container, stream):
        found = _packets(file, container, stream, on_progress)
    with _opened(file) as (container, stream):
        first = next(_decoded(container, stream, on_progress), None)
        if first is None:
            raise ItemError("holds no frame that can be decoded")
        rotation = first.rotation
        turned = rotation // 90 % 2 == 1
        width, height = (first.height, first.width) if turned else (first.width, first.height)
        if found.info.n_frames * width * height > MAX_DECODED_PIXELS:
            raise ItemError(
                f"has {found.info.n_frames:,} frames of {width}×{height} pixels, more than may be decoded of one file; "
                "cut it into several files"
            )
        info = replace(
            found.info, width=width, height=height, rotation=rotation, pixel_aspect=_pixel_aspect(stream, turned)
        )
    return replace(found, info=info)


def _packets(file: FileView, container: InputContainer, stream: VideoStream, on_progress: Progress) -> Scan:
    """Count and time the packets; everything of `Scan.info` that needs no frame."""
    from fractions import Fraction

    import numpy as np

    name = container.format.name.split(",")[0]
    times, keys, end, in_order = array("q"), bytearray(), 0, name == "avi"
    for packet in container.demux(stream):
        on_progress()
        if packet.size == 0 and packet.pts is None and packet.dts is None:
            continue  # the demuxer's mark for the end
        if packet.is_discard:
            continue
        if packet.has_sidedata("encryption_info"):
            raise ItemError("is encrypted")
        if len(times) == MAX_PACKETS:
            raise ItemError(f"has more than {MAX_PACKETS:,} frames; cut it into several files")
        in_order |= packet.pts is None
        time = packet.dts if packet.pts is None else packet.pts
        if time is None:
            raise ItemError("has frames without timestamps; to write it anew may help: ffmpeg -i FILE -c copy NEW.mkv")
        end = max(end, time + (packet.duration or 0)) if times else time + (packet.duration or 0)
        times.append(time)
        keys.append(packet.is_keyframe)
    if name == "mov" and (missing := _missing_bytes(file)):
        raise _cut_off(missing)
    if not times:
        raise ItemError("holds no frames")
    unsorted = np.frombuffer(times, np.int64)
    order = np.argsort(unsorted, kind="stable")
    ordered = unsorted[order]
    key_places = np.flatnonzero(np.frombuffer(keys, np.uint8)[order])
    span = (end - int(ordered[0])) * (stream.time_base or Fraction(0))
    fps, duration = _rate(len(times), span, stream)
    info = VideoInfo(len(times), fps, duration, 0, 0, stream.index, _codec_name(stream), name, 0, None)
    return Scan(info, ordered, key_places, in_order)


def _rate(count: int, span: Fraction, stream: VideoStream) -> tuple[float, float]:
    """Give frames a second, and the duration in seconds; of a single frame without one, by what the header says."""
    from fractions import Fraction

    if span <= 0:
        rate = stream.average_rate or stream.guessed_rate
        if count > 1 or not rate:
            raise ItemError("has no usable timestamps: all of its frames have the same")
        span = count / Fraction(rate)
    if not 0 < span <= MAX_SECONDS:
        raise ItemError(
            f"claims to last {float(span):,.0f} s, over the limit of {MAX_SECONDS:,} s: its times are wrong"
        )
    if count / span > MAX_FPS:
        raise ItemError(f"claims {float(count / span):,.0f} frames a second, over the limit of {MAX_FPS:,}")
    return float(count / span), float(span)


def _pixel_aspect(stream: VideoStream, turned: bool) -> str | None:
    aspect = stream.sample_aspect_ratio
    if not aspect or aspect == 1:
        return None
    sides = (aspect.denominator, aspect.numerator) if turned else (aspect.numerator, aspect.denominator)
    return "{}:{}".format(*sides)


# ------------------------------------------------------------------------------------------------------- the frames


def frames(
    file: FileView,
    scanned: Scan,
    indices: Sequence[int],
    on_progress: Progress = lambda: None,
    *,
    threads: int = THREADS,
    seek_frames: int = SEEK_FRAMES,
) -> Iterator[npt.NDArray[np.uint8]]:
    """Give frames of the clip, uint8 [height, width, 3], upright RGB, one in memory at a time.

    Args:
        file: The clip.
        scanned: What `scan` gave for it.
        indices: Which frames, in order; one may repeat.
        on_progress: Called for every packet.
        threads: Of the decoder; they change no pixel.
        seek_frames: Seek where it saves more frames than these; where the clip can be sought in at all.

    Raises:
        ItemError: It cannot be decoded up to there.
    """
    if any(later < earlier for earlier, later in itertools.pairwise(indices)):
        raise ValueError("frames are asked for out of order")
    if indices and not 0 <= indices[0] <= indices[-1] < scanned.info.n_frames:
        raise ValueError(f"no frames {indices[0]} to {indices[-1]} in a clip of {scanned.info.n_frames}")
    position, may_seek = 0, scanned.seekable
    while position < len(indices):
        with _opened(file, threads) as (container, stream):
            reader = _Reader(container, stream, scanned, on_progress, seek_frames if may_seek else None)
            try:
                for index in indices[position:]:
                    yield reader.frame(index)
                    position += 1
            except _NotWhereSought:  # the index of the file is wrong: from its first frame, then
                may_seek = False


class _NotWhereSought(Exception):
    """A frame was not found, or not whole, behind the key frame that should lead to it."""


class _Reader:
    """Decode forward to one frame after another."""

    def __init__(
        self, container: InputContainer, stream: VideoStream, scanned: Scan, on_progress: Progress, seek: int | None
    ) -> None:
        self._container = container
        self._stream = stream
        self._scan = scanned
        self._on_progress = on_progress
        self._seek_frames = seek
        self._sought = False
        self._decoder = _decoded(container, stream, on_progress)
        self._converter = _Converter(stream, scanned.info)
        self._decoded = 0  # frames, where they are counted
        self._place: int | None = None  # of the frame in hand, as `_target` has places
        self._rgb: npt.NDArray[np.uint8] | None = None

    def frame(self, index: int) -> npt.NDArray[np.uint8]:
        """Give the frame, or the next one where the decoder has none for it, as behind a cut in a recording."""
        target = index if self._scan.in_order else int(self._scan.times[index])
        if self._rgb is None or self._place is None or self._place < target:
            self._seek_towards(index)
            self._rgb = None  # before the next one is in memory
            self._rgb = self._converter.rgb(self._next_from(target, index))
        return self._rgb

    def _seek_towards(self, index: int) -> None:
        """Go to the last key frame before the wanted one, where that saves much."""
        if self._seek_frames is None:
            return
        before = bisect.bisect_right(self._scan.keys, index) - 1
        key = int(self._scan.keys[before]) if before >= 0 else 0
        reached = -1 if self._place is None else bisect.bisect_right(self._scan.times, self._place) - 1
        if key - reached > self._seek_frames:
            self._container.seek(int(self._scan.times[key]), stream=self._stream, backward=True)
            self._decoder = _decoded(self._container, self._stream, self._on_progress)
            self._sought = True

    def _next_from(self, target: int, index: int) -> VideoFrame:
        while (frame := self._next()) is not None:
            self._converter.check(frame)
            place = self._decoded if self._scan.in_order else frame.pts
            self._decoded += 1
            if place is None or place < target:
                continue
            if self._sought and place > target:
                raise _NotWhereSought
            self._place = place
            return frame
        count = self._scan.info.n_frames
        raise ItemError(f"ends early: its frame {index + 1:,} of {count:,} cannot be decoded")

    def _next(self) -> VideoFrame | None:
        """Decode one frame. Nothing that goes wrong behind a place that was sought is the clip's fault yet."""
        import av

        try:
            frame = next(self._decoder, None)
        except av.error.FFmpegError:
            if self._sought:
                raise _NotWhereSought from None
            raise
        if self._sought and (frame is None or frame.is_corrupt):
            raise _NotWhereSought
        return frame


def _decoded(container: InputContainer, stream: VideoStream, on_progress: Progress) -> Iterator[VideoFrame]:
    """Decode from where the container is, in the order in which frames are shown."""
    for packet in container.demux(stream):
        on_progress()
        yield from packet.decode()


class _Converter:
    """Turn decoded frames into upright RGB, by a filter graph that is kept while they are alike."""

    def __init__(self, stream: VideoStream, info: VideoInfo) -> None:
        self._time_base = stream.time_base
        self._size = (info.width, info.height)
        self._graph: Any = None
        self._key: object = None

    def check(self, frame: VideoFrame) -> None:
        """Refuse a clip whose frames are not all of one size."""
        size = (frame.width, frame.height) if frame.rotation // 90 % 2 == 0 else (frame.height, frame.width)
        if size != self._size:
            raise ItemError(
                f"changes its resolution from {self._size[0]}×{self._size[1]} to {size[0]}×{size[1]}; cut it there"
            )

    def rgb(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """Give [height, width, 3]."""
        import numpy as np

        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if self._graph is None or key != self._key:
            self._graph, self._key = self._graph_for(frame), key
        self._graph.push(frame)
        rgb: npt.NDArray[np.uint8] = self._graph.pull().to_ndarray()
        return np.rot90(rgb, frame.rotation // 90 % 4) if frame.rotation else rgb

    def _graph_for(self, frame: VideoFrame) -> Any:
        import av.filter

        graph = av.filter.Graph()
        graph.threads = 1
        format_name: Any = frame.format.name
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=format_name, time_base=self._time_base),
            graph.add("scale", "flags=bicubic"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        return graph
