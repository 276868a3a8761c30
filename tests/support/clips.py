"""Clips whose frames say their own number, made with PyAV: odd ones, small and quick.

A frame shows its number as ten bars, black or white, between a white one on the left and a black one on the right:
`number_of` reads it back, also through a codec that loses something, and fails where the frame is not upright.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BITS = 10
LOSSLESS = {"qp": "0"}  # of libx264

Pixels = npt.NDArray[np.uint8]


def drawn(number: int, width: int = 96, height: int = 64) -> Pixels:
    """Draw a frame, uint8 [height, width, 3]: bars of its number, above a lower half that is brighter in a corner."""
    bars = [1, *(number >> bit & 1 for bit in range(BITS)), 0]
    columns = np.array(bars)[np.arange(width) * len(bars) // width]
    frame = np.repeat(np.repeat(columns[None, :, None], height, 0), 3, 2) * 200 + 20
    frame[height // 2 :, : width // 2, 0] += 30
    return frame.astype(np.uint8)


def number_of(frame: Pixels) -> int:
    """Read the number that an upright frame shows."""
    width = frame.shape[1]
    count = BITS + 2
    grey = frame.mean(2)
    middles = [(2 * bar + 1) * width // (2 * count) for bar in range(count)]
    bars = [bool(grey[2:-2, middle].mean() > 125) for middle in middles]
    assert bars[0] and not bars[-1], "not upright"
    red = frame[..., 0].astype(int) - frame[..., 2]
    half = frame.shape[0] // 2
    assert red[half:].mean() > red[:half].mean(), "not upright"
    return sum(bar << bit for bit, bar in enumerate(bars[1:-1]))


def make_clip(
    path: Path,
    count: int = 12,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (96, 64),
    pixels: str = "yuv420p",
    rate: int = 25,
    times: Sequence[int] | None = None,
    format: str | None = None,
    codec_options: dict[str, str] | None = None,
    muxer_options: dict[str, str] | None = None,
    turned: int = 0,
    aspect: Fraction | None = None,
    audio: bool = False,
    sizes: Iterable[tuple[int, int]] | None = None,
) -> Path:
    """Make a clip of frames 0, 1, 2, ... .

    Args:
        path: Where to.
        count: How many frames.
        codec: FFmpeg's name of the encoder.
        size: Width and height of the upright frame.
        pixels: Pixel format.
        rate: Frames a second.
        times: When each frame is shown, in 1/rate s; one after another unless given.
        format: Of the container; by the path unless given.
        codec_options: Of the encoder; libx264 loses nothing unless they are given.
        muxer_options: Of the container.
        turned: Frames are stored turned, and metadata say that they be turned by so many degrees, counter-clockwise.
        aspect: Of a pixel.
        audio: Put a stream of silence before the video.
        sizes: A size for each frame, for encoders that take that.
    """
    import av

    if codec_options is None:
        codec_options = LOSSLESS if codec == "libx264" else {}
    with av.open(str(path), "w", format=format, options=muxer_options or {}) as container:
        sound = (
            container.add_stream("aac" if path.suffix not in {".webm", ".mkv"} else "libopus", rate=48000)
            if audio
            else None
        )
        stream: Any = container.add_stream(codec, rate=rate, options=codec_options)
        stream.width, stream.height = size if turned % 180 == 0 else size[::-1]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        if aspect is not None:
            stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = aspect
        if turned:
            stream.set_display_rotation(turned)
        if sound is not None:
            for start in range(0, 48000 * count // rate, 960):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 960 * 2), np.int16), "s16", "stereo")
                silence.sample_rate, silence.pts = 48000, start
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
        every = list(sizes) if sizes is not None else [size] * count
        for number in range(count):
            picture = np.ascontiguousarray(np.rot90(drawn(number, *every[number]), -turned // 90 % 4))
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = times[number] if times is not None else number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_sound(path: Path, cover: bool = False) -> Path:
    """Make a file of sound alone, or with a cover picture."""
    import av

    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        picture = container.add_stream("mjpeg", rate=1) if cover else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 96, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(drawn(5), "rgb24").reformat(format="yuvj420p")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        for start in range(0, 9600, 960):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 960 * 2), np.int16), "s16", "stereo")
            silence.sample_rate, silence.pts = 48000, start
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    return path


def plain_frames(path: Path) -> list[Pixels]:
    """Decode everything with PyAV alone, sort by time of presentation, convert by the filter graph: the reference."""
    import av

    found: list[tuple[Any, Pixels]] = []
    with av.open(str(path)) as container:
        stream: Any = container.streams.best("video")
        by_time = container.format.name != "avi"
        frames: Iterable[Any] = container.decode(stream)
        for order, frame in enumerate(frames):
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format.name, time_base=stream.time_base
            )
            graph.link_nodes(
                source, graph.add("scale", "flags=bicubic"), graph.add("format", "rgb24"), graph.add("buffersink")
            ).configure()
            graph.push(frame)
            time = frame.pts if by_time else order
            found.append((time, np.rot90(graph.pull().to_ndarray(), frame.rotation // 90 % 4)))
    return [pixels for _, pixels in sorted(found, key=lambda one: one[0])]
