"""Clips that are hostile, odd or damaged: what a folder of videos from anywhere may hold, small and made on the spot.

`hostile` has one of each kind, `damaged` any number of truncated and spoiled ones of every container. None of them may
stop, hang or fill whoever reads it; what each must come to is said beside it.

    python bench/fuzz.py clips [--cases 400] [--seed 0]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qvsplit.errors import ERROR_KINDS, ItemError
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.source import Entry
from tests.support.clips import make_clip, make_sound

# Every container that is read, with a codec of its own where it has one
CONTAINERS: dict[str, dict[str, object]] = {
    "h264.mp4": {"codec_options": {"qp": "20", "bf": "2", "g": "6"}},
    "fragments.mp4": {"muxer_options": {"movflags": "frag_keyframe+empty_moov"}},
    "sound.mp4": {"audio": True},
    "prores.mov": {"codec": "prores", "pixels": "yuv422p10le"},
    "hevc.mkv": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": {"deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "jpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "h264.ts": {"codec_options": {"qp": "20", "bf": "2", "g": "6"}},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "h264.flv": {},
    "wmv2.wmv": {"codec": "wmv2"},
    "mpeg2.mxf": {"codec": "mpeg2video"},
    "gif.gif": {"codec": "gif", "pixels": "rgb8"},
}
FRAMES = 16


@functools.cache
def sound_clips() -> dict[str, bytes]:
    """One small clip of each container, of 16 frames."""
    made = {}
    with tempfile.TemporaryDirectory() as place:
        for name, how in CONTAINERS.items():
            made[name] = make_clip(Path(place) / name, FRAMES, **how).read_bytes()  # type: ignore[arg-type]
    return made


# ------------------------------------------------------------------------------------------------- boxes of MP4 files


def box(kind: bytes, *content: bytes) -> bytes:
    """A box with its length."""
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def replaced(data: bytes, path: tuple[bytes, ...], change: Callable[[bytes], bytes]) -> bytes:
    """`data`, boxes one behind the other, with `change` of the content of those at `path` in their place."""
    made, at = b"", 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        content = data[at + 8 : at + length]
        if kind == path[0]:
            content = replaced(content, path[1:], change) if path[1:] else change(content)
            made += box(kind, content)
        else:
            made += data[at : at + length]
        at += length
    return made


TABLES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def with_table(data: bytes, kind: bytes, content: bytes) -> bytes:
    """An MP4 file whose table of this kind says something else. Its index must lie behind the frames."""
    return replaced(data, (*TABLES, kind), lambda old: content)


def full(*numbers: int) -> bytes:
    """Version, flags, and numbers of 32 bits."""
    return struct.pack(f">{1 + len(numbers)}I", 0, *numbers)


def _mp4() -> bytes:
    return sound_clips()["h264.mp4"]


def _moov(data: bytes) -> bytes:
    at = data.index(b"moov") - 4
    return data[at:]


def many_tracks(data: bytes, count: int) -> bytes:
    """An MP4 file with its track so many times. Its index must lie behind the frames."""
    moov = _moov(data)
    at = moov.index(b"trak") - 4
    length = int.from_bytes(moov[at : at + 4], "big")
    track = moov[at : at + length]
    return data[: -len(moov)] + box(b"moov", moov[8:at], track * count, moov[at + length :])


def _squeezed(claim: int, zeros: int) -> bytes:
    """A QuickTime file whose index is compressed: to so many zeros, and it claims another size."""
    packed = zlib.compress(bytes(zeros), 9)
    return box(b"wide") + box(
        b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", struct.pack(">I", claim), packed))
    )


def _edits(count: int) -> bytes:
    """An MP4 file that shows its frames again and again, by its list of edits."""
    edits = struct.pack(">IIhh", 600, 0, 1, 0) * count
    return replaced(_mp4(), (b"moov", b"trak", b"edts"), lambda old: box(b"elst", full(count), edits))


def _sized(name: str, width: int, height: int) -> bytes:
    """A clip of the container that claims other sizes, wherever 96 × 64 stands in its header."""
    data = bytearray(sound_clips()[name])
    for order, numbers in ((">", "HH"), ("<", "HH"), ("<", "II"), (">", "II"), ("<", "ii")):
        old, new = struct.pack(order + numbers, 96, 64), struct.pack(order + numbers, width, height)
        data = data.replace(old, new)
        old, new = struct.pack(order + numbers, 64, 96), struct.pack(order + numbers, height, width)
        data = data.replace(old, new)
    return bytes(data)


@dataclass(frozen=True)
class Clip:
    """One file: its bytes, and whether it must fail, must not, or may do either."""

    data: bytes
    fails: bool | None = True
    reason: str = ""  # a pattern that its reason must have


def hostile() -> dict[str, Clip]:
    """One file of each kind, by name."""
    mp4, mkv = _mp4(), sound_clips()["ffv1.mkv"]
    playlist = (
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nh264.ts\n#EXTINF:2,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    moov = _moov(mp4)
    size = b"\xb0\x81\x60\xba\x81\x40"  # of a Matroska track: 96 × 64
    assert mkv.count(size) == 1
    count = FRAMES
    with tempfile.TemporaryDirectory() as place:
        sound = make_sound(Path(place) / "a.mp4").read_bytes()
        cover = make_sound(Path(place) / "b.mp4", cover=True).read_bytes()
    return {
        "playlist.mp4": Clip(playlist.encode(), reason="is not an image"),
        "list-of-files.mp4": Clip(b"ffconcat version 1.0\nfile h264.ts\n", reason="is not an image"),
        "empty.mp4": Clip(b""),
        "one-byte.mkv": Clip(b"\x1a"),
        "text.mp4": Clip(b"this is no video\n"),
        "signature-alone.mp4": Clip(mp4[:32]),
        "zeros-behind-it.mp4": Clip(mp4[:32] + bytes(1 << 20)),
        "cut-off.mp4": Clip(mp4[: len(mp4) // 2], reason="ends early"),
        "without-index.mp4": Clip(mp4[: -len(moov)], reason="without its index"),
        "index-alone.mp4": Clip(mp4[:32] + moov),
        "sound-alone.mp4": Clip(sound, reason="only sound"),
        "cover-alone.mp4": Clip(cover, reason="only a cover"),
        "huge.mkv": Clip(mkv.replace(size, b"\xb0\x82\x40\x00\xba\x82\x20\x00"[:8])),
        "huge.avi": Clip(_sized("jpeg.avi", 16384, 8192)),
        "huge.mov": Clip(_sized("prores.mov", 16384, 8192)),
        "lasts-for-years.mp4": Clip(_lasting(mp4), reason="claims to last"),
        "lasts-for-ever.mp4": Clip(with_table(mp4, b"stts", full(1, count, 0xFFFFFFFF)), None),
        "no-time-at-all.mp4": Clip(with_table(with_table(mp4, b"stts", full(1, count, 0)), b"ctts", full(0))),
        "times-without-frames.mp4": Clip(with_table(mp4, b"stts", full(1, 0xFFFFFFFF, 512)), None),
        "frames-without-end.mp4": Clip(with_table(mp4, b"stsz", full(1, 0x7FFFFFFF))),
        "three-million-frames.mp4": Clip(_one_chunk(mp4, 3_000_000)),
        "chunks-without-end.mp4": Clip(with_table(mp4, b"stco", full(0x3FFFFFFF, *[48] * 64)), None),
        "the-same-frame-always.mp4": Clip(_always_the_same(mp4, 100_000), None),
        "edits.mp4": Clip(_edits(10_000), None),
        "thousands-of-tracks.mp4": Clip(many_tracks(mp4, 8_000), reason="damaged"),
        "index-that-grows.mov": Clip(_squeezed(0x7FFFFFFF, 64 << 20)),
        "index-that-is-smaller.mov": Clip(_squeezed(100, 8 << 20)),
        "boxes-in-boxes.mp4": Clip(mp4[:32] + _nested(20_000)),
    }


def _lasting(mp4: bytes) -> bytes:
    """An MP4 file whose times are in whole seconds, with one frame a month."""
    data = replaced(mp4, (b"moov", b"trak", b"mdia", b"mdhd"), lambda old: old[:12] + full(1)[4:] + old[16:])
    data = replaced(data, (b"moov", b"trak", b"edts"), lambda old: b"")
    return with_table(with_table(data, b"stts", full(1, FRAMES, 2_600_000)), b"ctts", full(0))


def _one_chunk(mp4: bytes, count: int) -> bytes:
    """So many frames of one byte, behind each other."""
    data = with_table(mp4, b"stsz", full(1, count))
    data = with_table(data, b"stts", full(1, count, 512))
    data = with_table(data, b"stsc", full(1, 1, count, 1))
    return with_table(data, b"ctts", full(0))


def _always_the_same(mp4: bytes, count: int) -> bytes:
    """So many chunks that are all the first frame."""
    at = mp4.index(b"stco") + 12
    offset = int.from_bytes(mp4[at : at + 4], "big")
    at = mp4.index(b"stsz") + 16
    size = int.from_bytes(mp4[at : at + 4], "big")
    data = with_table(mp4, b"stsz", full(size, count))
    data = with_table(data, b"stts", full(1, count, 512))
    data = with_table(data, b"stsc", full(1, 1, 1, 1))
    data = with_table(data, b"ctts", full(0))
    return with_table(data, b"stco", full(count, *[offset] * count))


def _nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = box(b"moov", data)
    return data


# ------------------------------------------------------------------------------------------------------------- damage


def damaged(cases: int, seed: int = 0, first: int = 0) -> Iterator[tuple[str, bytes]]:
    """Truncated and spoiled clips of every container in turn, by a name that says which; the same for a seed."""
    clips = list(sound_clips().items())
    for number in range(first, first + cases):
        name, data = clips[number % len(clips)]
        chance = random.Random(f"{seed} {number}")
        yield f"{number:05d}-{name}", _damage(data, chance)


def _damage(data: bytes, chance: random.Random) -> bytes:
    spoiled = bytearray(data)
    head = min(len(data), 2048)
    match chance.randrange(6):
        case 0:
            return data[: chance.randrange(len(data))]
        case 1:  # anywhere
            for _ in range(chance.choice([1, 4, 30])):
                spoiled[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 2:  # in its headers, at the beginning or at the end
            for _ in range(chance.choice([1, 3, 10])):
                at = chance.randrange(head)
                spoiled[at if chance.random() < 0.5 else -1 - at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
        case 3:  # a number that is as large as it can be
            at = chance.randrange(max(1, head - 4))
            spoiled[at : at + 4] = chance.choice([b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4), b"\xff\xff\xff\x7f"])
        case 4:  # a piece of it elsewhere
            start, length, to = (chance.randrange(len(data)) for _ in range(3))
            piece = spoiled[start : start + length % 4096]
            spoiled[to : to + len(piece)] = piece
        case 5:  # a piece that is missing
            start = chance.randrange(len(data))
            del spoiled[start : start + chance.randrange(1, 2048)]
    return bytes(spoiled)


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Outcome:
    """What became of one file: the frames that it had, or why it has none; and what it took."""

    name: str
    frames: int
    error: ItemError | None
    seconds: float


def read(pool: DecoderPool, file: Path) -> Outcome:
    """Read a file as an extraction does: hash it, scan it, take some of its frames."""
    entry, began, frames, error = (
        Entry(str(file.parent), file.name, file.stat().st_size, None, None),
        time.monotonic(),
        0,
        None,
    )
    decoder = pool.mine()
    try:
        info = decoder.read(entry)
        if info.kind == "image":
            decoder.decode(entry, info)
        else:
            video = decoder.scan(entry, info)
            last = video.n_frames - 1
            for frame in decoder.frames(entry, info, sorted({0, last // 3, last // 2, last})):
                assert frame.shape == (video.height, video.width, 3)
                frames += 1
    except ItemError as bad:
        error = bad
    return Outcome(file.name, frames, error, time.monotonic() - began)


def wrong_about(outcome: Outcome) -> str:
    """Say what is wrong with how a file ended, if anything: a reason that nobody would understand."""
    if outcome.error is None:
        return ""
    reason = str(outcome.error)
    if outcome.error.kind not in ERROR_KINDS:
        return f"the kind {outcome.error.kind}"
    if not reason or "\n" in reason or "Errno" in reason or "b'" in reason or len(reason) > 200 or "crashes" in reason:
        return reason
    return ""


def main(words: list[str]) -> None:
    """Fuzz, and count."""
    parser = argparse.ArgumentParser(prog="bench/fuzz.py clips", description=main.__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="without progress, that a clip may take")
    options = parser.parse_args(words)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder, pool = Path(place), DecoderPool(options.seconds, gifs_are_videos=True)

        def one(case: tuple[str, bytes]) -> Outcome:
            file = folder / case[0]
            file.write_bytes(case[1])
            outcome = read(pool, file)
            file.unlink()
            return outcome

        cases = [(name, clip.data) for name, clip in hostile().items()]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            outcomes = list(threads.map(one, (*cases, *damaged(options.cases, options.seed))))
        pool.close()
    reasons = Counter(str(outcome.error) for outcome in outcomes if outcome.error is not None)
    for reason, number in reasons.most_common(40):
        print(f"{number:6}  {reason}")
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:5]
    print("slowest: " + ", ".join(f"{one.name} {one.seconds:.1f} s" for one in slowest))
    wrong = [f"{one.name}: {problem}" for one in outcomes if (problem := wrong_about(one))]
    for line in wrong:
        print(line)
    print(json.dumps({
        "tried": len(outcomes), "read": sum(one.error is None for one in outcomes), "reasons": len(reasons),
        "by_error_kind": dict(Counter(one.error.kind for one in outcomes if one.error is not None)),
        "longest_seconds": round(slowest[0].seconds, 1), "seconds": round(time.monotonic() - began, 1),
        "decoder_memory_bytes": pool.peak_memory(), "wrong": wrong,
    }))  # fmt: skip
    sys.exit(bool(wrong))
