"""The rule by which frames are read, what is a video, and every way in which a clip can be bad."""

from __future__ import annotations

import ctypes
import errno
import http.server
import os
import struct
import subprocess
import sys
import threading
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from qvsplit.errors import ItemError
from qvsplit.sources import faults, videos
from qvsplit.sources.videos import FileView, Scan, kind_of, reader_versions
from tests.support.clips import drawn, make_clip, make_sound, number_of, plain_frames
from tests.support.nasty_clips import many_tracks

QUALITY = {"qmin": "1", "qmax": "2"}  # of encoders that cannot but lose something
B_FRAMES = {"qp": "0", "bf": "3", "g": "10"}
VARIABLE = [0, 1, 2, 5, 6, 10, 11, 12, 13, 20, 21, 22]
CLIPS = {
    "b-frames.mp4": {"count": 40, "codec_options": B_FRAMES},
    "b-frames.avi": {"count": 30, "codec": "mpeg4", "codec_options": {"bf": "2"} | QUALITY},
    "b-frames-h264.avi": {"count": 30, "codec_options": B_FRAMES},
    "turned-90.mp4": {"turned": 90},
    "turned-180.mp4": {"turned": 180},
    "turned-270.mov": {"turned": 270},
    "variable.mp4": {"times": VARIABLE},
    "variable.mkv": {"times": VARIABLE},
    "odd-size.mkv": {"codec": "ffv1", "size": (97, 63)},
    "odd-size-444.mkv": {"codec": "ffv1", "size": (97, 63), "pixels": "yuv444p"},
    "ten-bits.mp4": {"pixels": "yuv420p10le"},
    "ten-bits.mkv": {"codec": "ffv1", "pixels": "yuv422p10le"},
    "interlaced.mp4": {"codec_options": {"qp": "0", "x264-params": "interlaced=1"}},
    "one.mp4": {"count": 1},
    "one.mkv": {"count": 1},
    "two.mp4": {"count": 2},
    "sound-first.mp4": {"audio": True},
    "sound-first.mkv": {"audio": True},
    "plain.ts": {"count": 40, "codec_options": B_FRAMES},
    "open.ts": {"count": 40, "codec_options": {"qp": "0", "g": "10", "x264-params": "open-gop=1:bframes=3"}},
    "open.mp4": {"count": 40, "codec_options": {"qp": "0", "g": "10", "x264-params": "open-gop=1:bframes=3"}},
    "refreshed.mp4": {"count": 40, "codec_options": {"qp": "8", "g": "10", "intra-refresh": "1", "bf": "0"}},
    "camera.m2ts": {"format": "mpegts", "muxer_options": {"mpegts_m2ts_mode": "1"}},
    "fragments.mp4": {"muxer_options": {"movflags": "frag_keyframe+empty_moov"}},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": {"lossless": "1", "deadline": "realtime", "cpu-used": "8"}},
    "vp8.webm": {"codec": "libvpx", "codec_options": {"b": "2M", "deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "codec_options": {"x265-params": "lossless=1:log-level=none"}},
    "plain.flv": {},
    "phone.3gp": {"codec": "mpeg4", "codec_options": QUALITY},
    "prores.mov": {"codec": "prores", "pixels": "yuv422p10le"},
    "motion-jpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "plain.wmv": {"codec": "wmv2", "codec_options": QUALITY},
    "plain.mpg": {"codec": "mpeg2video", "codec_options": {"bf": "2"} | QUALITY},
    "plain.mxf": {"codec": "mpeg2video", "codec_options": QUALITY},
    "plain.gif": {"codec": "gif", "pixels": "rgb8"},
}


def view(path: Path) -> FileView:
    return FileView(os.open(path, os.O_RDONLY))


def scan(path: Path) -> Scan:
    return videos.scan(view(path))


def frames(path: Path, indices=None, **more) -> list[np.ndarray]:
    scanned = scan(path)
    wanted = range(scanned.info.n_frames) if indices is None else indices
    return [frame.copy() for frame in videos.frames(view(path), scanned, wanted, **more)]


def fails(path: Path, reason: str, kind: str = "content") -> None:
    """Scanned and decoded through, it is an item's error with these words."""
    with pytest.raises(ItemError, match=reason) as caught:
        frames(path)
    assert caught.value.kind == kind


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, how in CLIPS.items():
        make_clip(folder / name, **how)
    return folder


# ------------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_a_plain_decoder_and_show_what_was_drawn(clips, name):
    plain = plain_frames(clips / name)
    got = frames(clips / name)
    assert [number_of(frame) for frame in got] == list(range(CLIPS[name].get("count", 12)))
    assert len(got) == len(plain)
    assert all(np.array_equal(one, other) for one, other in zip(got, plain, strict=True))
    sought = frames(clips / name, seek_frames=0)
    threaded = frames(clips / name, threads=2)
    assert all(np.array_equal(one, other) for one, other in zip(got, sought, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(got, threaded, strict=True))


@pytest.mark.parametrize("name", CLIPS)
def test_a_sample_by_seeking_is_a_sample_of_all(clips, name):
    count = scan(clips / name).info.n_frames
    wanted = sorted({0, count // 3, count // 2, count - 1, count - 1})
    assert [number_of(frame) for frame in frames(clips / name, wanted, seek_frames=0)] == wanted


def test_what_is_said_of_a_clip(clips, tmp_path):
    info = scan(clips / "turned-90.mp4").info
    assert (info.n_frames, info.fps, info.duration) == (12, 25.0, 0.48)
    assert (info.width, info.height, info.rotation) == (96, 64, 90)
    assert (info.stream, info.codec, info.container, info.pixel_aspect) == (0, "h264", "mov", None)
    info = scan(clips / "sound-first.mp4").info
    assert info.stream == 1
    wide = make_clip(tmp_path / "wide.mp4", aspect=Fraction(4, 3))
    assert scan(wide).info.pixel_aspect == "4:3"
    wide_and_turned = make_clip(tmp_path / "turned.mp4", aspect=Fraction(4, 3), turned=90)
    assert scan(wide_and_turned).info.pixel_aspect == "3:4"


def test_frames_of_an_avi_are_counted_in_the_order_of_decoding(clips):
    """Its packets have no times of presentation but those that FFmpeg guesses."""
    assert scan(clips / "b-frames.avi").in_order
    assert not scan(clips / "b-frames.mp4").in_order


def test_where_key_frames_can_be_sought(clips):
    assert all(scan(clips / name).seekable for name in ("b-frames.mp4", "vp9.webm", "variable.mkv"))
    assert not any(scan(clips / name).seekable for name in ("plain.ts", "b-frames.avi", "plain.flv", "plain.mpg"))


def test_the_rate_is_frames_over_their_span(clips):
    info = scan(clips / "variable.mkv").info
    assert info.duration == pytest.approx(23 / 25)
    assert info.fps == pytest.approx(12 / (23 / 25))
    assert scan(clips / "one.mkv").info.fps == 25.0


def test_frames_that_an_edit_list_leaves_out_are_not_counted(tmp_path):
    """Its first five frames are decoded, since the others need them, and not shown."""
    clip = make_clip(tmp_path / "edited.mp4", count=20, codec_options={"qp": "0", "bf": "0"})
    data = clip.read_bytes()
    at = data.index(b"elst")
    duration, start = struct.unpack(">Ii", data[at + 12 : at + 20])
    scale = scan(clip).times[1]
    edited = struct.pack(">Ii", duration * 15 // 20, start + 5 * int(scale))
    clip.write_bytes(data[: at + 12] + edited + data[at + 20 :])
    assert scan(clip).info.n_frames == 15
    assert [number_of(frame) for frame in frames(clip)] == list(range(5, 20))
    assert [number_of(frame) for frame in frames(clip, [3, 14], seek_frames=0)] == [8, 19]


def test_an_index_may_repeat_and_none_is_beyond_the_clip(clips):
    clip = clips / "b-frames.mp4"
    assert [number_of(frame) for frame in frames(clip, [0, 0, 7, 7, 7, 39])] == [0, 0, 7, 7, 7, 39]
    assert frames(clip, []) == []
    for wrong in ([40], [-1], [3, 2]):
        with pytest.raises(ValueError, match="frames"):
            frames(clip, wrong)


def test_what_is_sought_is_not_decoded_through(clips):
    clip = clips / "b-frames.mp4"
    scanned = scan(clip)
    packets = []
    list(videos.frames(view(clip), scanned, [35], lambda: packets.append(1), seek_frames=5))
    few = len(packets)
    packets.clear()
    list(videos.frames(view(clip), scanned, [35], lambda: packets.append(1), seek_frames=1000))
    assert few < 15 < 35 <= len(packets)


def test_an_index_of_key_frames_that_is_wrong_is_not_believed(tmp_path):
    """Every frame is said to be a key frame: behind such a one there is nothing that can be decoded, or rubbish."""
    clip = make_clip(
        tmp_path / "wrong.mov", count=40, codec="svq1", pixels="yuv410p", codec_options={"g": "100", "qscale": "1"}
    )
    data = clip.read_bytes()
    assert data.count(b"stss") == len(scan(clip).keys) == 1
    clip.write_bytes(data.replace(b"stss", b"free"))
    assert len(scan(clip).keys) == 40
    assert [number_of(frame) for frame in frames(clip, [20, 39], seek_frames=0)] == [20, 39]


def test_a_recording_that_begins_between_key_frames(tmp_path):
    """Frames that need what was cut off are replaced by the first one that does not."""
    clip = make_clip(tmp_path / "all.ts", count=40, codec_options={"qp": "0", "g": "10", "bf": "0"})
    data = clip.read_bytes()
    with av.open(str(clip)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.pos is not None]
    (tmp_path / "cut.ts").write_bytes(data[: 3 * 188] + data[starts[5] :])
    got = [number_of(frame) for frame in frames(tmp_path / "cut.ts")]
    assert got[-1] == 39
    assert got == sorted(got)
    assert 5 <= got[0] <= 10


def test_one_frame_at_a_time_is_in_memory(clips):
    """None while the next one is decoded, once its taker has let go of it."""
    clip = clips / "b-frames.mp4"
    given, alive = [], []
    steps = videos.frames(
        view(clip), scan(clip), range(40), lambda: alive.append(sum(one() is not None for one in given))
    )
    for frame in steps:
        given.append(weakref.ref(frame))
        del frame
    assert len(given) == 40
    assert set(alive) == {0}


def test_versions_need_no_import_of_the_reader():
    code = (
        "import sys; from qvsplit.sources import folders, videos; v = videos.reader_versions(); print(v['ffmpeg']);"
        "assert not {'av', 'numpy', 'importlib.metadata'} & set(sys.modules) - {'importlib.metadata'}, list(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    versions = reader_versions()
    assert versions["ffmpeg"] == done.stdout.strip()
    assert set(versions) == {"av", "ffmpeg", "architecture"}
    for library, numbers in av.library_versions.items():
        name = library.removeprefix("lib")
        if name in {"avcodec", "avfilter", "avformat", "avutil", "swscale"}:
            assert f"{name} {'.'.join(map(str, numbers))}" in versions["ffmpeg"]


def test_versions_where_the_libraries_are_the_systems(monkeypatch):
    import importlib.metadata

    expected = reader_versions()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    assert reader_versions() == expected


# --------------------------------------------------------------------------------------------------- kind by content


@pytest.mark.parametrize("name", [*CLIPS, "ogg.ogv", "plain.mov", "old.mov"])
def test_what_is_a_video_is_told_by_its_first_bytes(clips, tmp_path, name):
    if name == "old.mov":
        head = struct.pack(">I4sI4s", 8, b"wide", 5000, b"mdat") + b"x" * 5000
    elif name == "ogg.ogv":
        head = make_clip(
            tmp_path / name, codec="libvpx", codec_options={"deadline": "realtime"}, format="ogg"
        ).read_bytes()
    else:
        head = (clips / name if name in CLIPS else make_clip(tmp_path / name)).read_bytes()
    head = head[: videos.HEAD_BYTES]
    assert kind_of(head, gifs_are_videos=True) == "video"
    assert kind_of(head, gifs_are_videos=False) == ("image" if name.endswith(".gif") else "video")


def test_images_and_everything_else_are_no_videos(photos):
    for path in photos.iterdir():
        assert kind_of(path.read_bytes()[: videos.HEAD_BYTES], gifs_are_videos=True) == "image", path
    for brand in faults.AVIF_BRANDS | faults.HEIF_BRANDS:
        assert kind_of(b"\0\0\0\x18ftypmp42\0\0\0\0" + brand, gifs_are_videos=True) == "image", brand
    for other in (
        b"",
        b"G",
        b"const G = 1;\n" * 400,
        b"#EXTM3U\n",
        b"ffconcat version 1.0\n",
        b"RIFF\0\0\0\0WEBP",
        b"G" * 300,
    ):
        assert kind_of(other, gifs_are_videos=True) == "image", other


@pytest.mark.parametrize(("first", "length"), [(0, 188), (4, 192), (0, 204)])
def test_packets_of_a_transport_stream(first, length):
    packet = bytearray(length)
    packet[first] = 0x47
    assert kind_of(bytes(packet * 3), gifs_are_videos=False) == "video"
    assert kind_of(bytes(packet * 2), gifs_are_videos=False) == "image"
    assert kind_of(bytes(packet * 3 + bytearray(length)), gifs_are_videos=False) == "image"


# ------------------------------------------------------------------------------------------------- no other file or host


def opened(path: Path, act) -> bool:
    """Say whether anybody opens `path` while `act` runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(path), 0x20) > 0  # IN_OPEN
    try:
        act()
        return len(os.read(watch, 4096)) > 0
    except BlockingIOError:
        return False
    finally:
        os.close(watch)


@pytest.fixture
def server():
    """What was asked of a server on this machine."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(port=running.server_port, asked=asked)
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["playlist", "list of files"])
@pytest.mark.parametrize("barriers", ["both", "formats alone", "protocols alone"])
def test_a_file_that_names_others_opens_none_of_them(tmp_path, clips, server, monkeypatch, kind, barriers):
    """Neither the list of formats nor that of protocols lets it."""
    monkeypatch.chdir(tmp_path)  # what has no name has no folder
    if barriers == "formats alone":
        monkeypatch.setattr(videos, "_PROTOCOLS", "file,http,tcp")
    elif barriers == "protocols alone":
        monkeypatch.setattr(videos, "_FORMATS", f"{videos._FORMATS},hls,concat")
    neighbour = tmp_path / "neighbour.ts"
    neighbour.write_bytes((clips / "plain.ts").read_bytes())
    trap = tmp_path / "trap.mp4"
    if kind == "playlist":
        lines = [
            "#EXTM3U",
            "#EXT-X-TARGETDURATION:2",
            "#EXTINF:2,",
            "neighbour.ts",
            "#EXTINF:2,",
            f"http://127.0.0.1:{server.port}/a.ts",
            "#EXT-X-ENDLIST",
        ]
    else:
        lines = ["ffconcat version 1.0", "file neighbour.ts"]
    trap.write_text("\n".join(lines) + "\n")

    def careless():
        options = {
            "safe": "0",
            "allowed_extensions": "ALL",
            "extension_picky": "0",
            "protocol_whitelist": "file,http,tcp",
        }
        try:
            with av.open(str(trap), format="hls" if kind == "playlist" else None, options=options) as container:
                for _ in container.demux():
                    pass
        except av.error.FFmpegError:
            pass

    assert opened(neighbour, careless)
    assert bool(server.asked) is (kind == "playlist")
    server.asked.clear()
    assert not opened(neighbour, lambda: fails(trap, "is a video file that is|holds no video"))
    assert not server.asked


# ------------------------------------------------------------------------------------------------------------ bad clips


def test_sound_and_covers_are_no_videos(tmp_path):
    fails(make_sound(tmp_path / "sound.mp4"), "holds no video, only sound")
    fails(make_sound(tmp_path / "cover.mp4", cover=True), "holds no video, only a cover picture")


def test_a_clip_that_was_cut_off(tmp_path):
    index_last = make_clip(tmp_path / "last.mp4", count=40).read_bytes()
    (tmp_path / "last.mp4").write_bytes(index_last[: len(index_last) // 2])
    fails(tmp_path / "last.mp4", r"ends early: its last [\d,]+ bytes are missing")
    end = index_last.index(b"moov") - 4
    (tmp_path / "none.mp4").write_bytes(index_last[:end])
    fails(tmp_path / "none.mp4", r"MP4 file without its index \(moov\): writing it was never finished")
    first = make_clip(tmp_path / "first.mp4", count=40, muxer_options={"movflags": "+faststart"}).read_bytes()
    (tmp_path / "first.mp4").write_bytes(first[: len(first) * 2 // 3])
    fails(tmp_path / "first.mp4", r"ends early: its last [\d,]+ bytes are missing; copy it again")


def test_a_recording_that_was_cut_off_is_as_long_as_it_is(tmp_path):
    """Such formats have no index that would say how long it was to be."""
    for name in ("cut.mkv", "cut.ts"):
        whole = make_clip(tmp_path / name, count=40).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        got = [number_of(frame) for frame in frames(tmp_path / name)[:-1]]
        assert got == list(range(len(got)))
        assert 10 < len(got) < 39


def test_frames_that_cannot_be_decoded_are_missed(clips):
    """The scan counts more than the decoder gives."""
    scanned = scan(clips / "plain.ts")
    longer = videos.replace(scanned.info, n_frames=42)
    times = np.concatenate([scanned.times, scanned.times[-1] + np.array([3600, 7200])])
    wrong = Scan(longer, times, scanned.keys, False)
    given = []
    with pytest.raises(ItemError, match="ends early: its frame 41 of 42 cannot be decoded"):
        given.extend(number_of(frame) for frame in videos.frames(view(clips / "plain.ts"), wrong, [39, 40]))
    assert given == [39]


def test_a_clip_without_frames(tmp_path, clips):
    data = (clips / "fragments.mp4").read_bytes()
    (tmp_path / "none.mp4").write_bytes(data[: data.index(b"moof") - 4])
    fails(tmp_path / "none.mp4", "holds no frames")


def packet(**more) -> SimpleNamespace:
    given = {"size": 1, "pts": 0, "dts": 0, "duration": 1, "is_discard": False, "is_keyframe": True}
    return SimpleNamespace(**given | more, has_sidedata=lambda kind: False)


def packets(*given) -> Scan:
    """Scan packets that no file has."""
    stream = SimpleNamespace(
        time_base=Fraction(1, 25),
        index=0,
        codec=SimpleNamespace(canonical_name="h264"),
        average_rate=None,
        guessed_rate=None,
    )
    container = SimpleNamespace(format=SimpleNamespace(name="flv"), demux=lambda stream: iter(given))
    return videos._packets(None, container, stream, lambda: None)


def test_packets_without_times():
    with pytest.raises(ItemError, match="has frames without timestamps; to write it anew may help"):
        packets(packet(), packet(pts=None, dts=None))
    assert packets(packet(pts=None), packet(pts=None, dts=1)).in_order
    assert not packets(packet(), packet(pts=1)).in_order
    with pytest.raises(ItemError, match="all of its frames have the same"):
        packets(packet(duration=0), packet(duration=None))
    with pytest.raises(ItemError, match="all of its frames have the same"):
        packets(packet(duration=0))


def test_packets_that_are_not_shown_are_not_counted():
    end = packet(size=0, pts=None, dts=None)
    found = packets(packet(pts=2, is_keyframe=False), packet(pts=9, is_discard=True), packet(pts=1), end)
    assert found.times.tolist() == [1, 2]
    assert found.keys.tolist() == [0]
    assert found.info.duration == 2 / 25


def test_claims_beyond_all_reason(tmp_path, monkeypatch):
    fails(make_clip(tmp_path / "long.mkv", count=2, times=[0, 10**8]), r"claims to last 4,000,000 s, over the limit")
    fast = make_clip(tmp_path / "fast.mp4", rate=50_000, codec="mpeg4", codec_options=QUALITY)
    fails(fast, "claims 50,000 frames a second, over the limit of 10,000")
    monkeypatch.setattr(videos, "MAX_PACKETS", 11)
    fails(make_clip(tmp_path / "many.mp4"), "has more than 11 frames; cut it")


def test_more_pixels_in_all_than_may_be_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "MAX_DECODED_PIXELS", 12 * 96 * 64)
    assert scan(make_clip(tmp_path / "just.mp4")).info.n_frames == 12
    fails(make_clip(tmp_path / "over.mp4", count=13), "has 13 frames of 96×64 pixels, more than may be decoded")


def test_too_many_pixels(tmp_path):
    """Told before any memory is taken for them."""
    data = make_clip(tmp_path / "large.mkv", codec="ffv1", size=(320, 256)).read_bytes()
    assert data.count(b"\xb0\x82\x01\x40\xba\x82\x01\x00") == 1
    (tmp_path / "large.mkv").write_bytes(
        data.replace(b"\xb0\x82\x01\x40\xba\x82\x01\x00", b"\xb0\x82\x40\x00\xba\x82\x20\x00")
    )
    fails(tmp_path / "large.mkv", "is a Matroska file that is damaged, or has frames of over 40,000,000 pixels")
    with pytest.raises(ItemError, match=r"has frames of 16384×8192 pixels, over the limit of 40,000,000"):
        videos._check_size(16384, 8192)


def test_a_stream_that_grows_beyond_the_limit_is_not_decoded(tmp_path, monkeypatch):
    clip = make_clip(tmp_path / "a.mp4")
    monkeypatch.setattr(videos, "MAX_PIXELS", 96 * 64 - 1)
    monkeypatch.setattr(videos, "_check_size", lambda width, height: None)
    with pytest.raises(ItemError, match="damaged"):
        scan(clip)


def test_a_resolution_that_changes_is_refused(tmp_path):
    one = make_clip(tmp_path / "one.ts", codec="mpeg2video", codec_options=QUALITY)
    other = make_clip(tmp_path / "other.ts", codec="mpeg2video", codec_options=QUALITY, size=(128, 96))
    (tmp_path / "both.ts").write_bytes(one.read_bytes() + other.read_bytes())
    fails(tmp_path / "both.ts", "changes its resolution from 96×64 to 128×96; cut it there")


def test_an_encrypted_clip(tmp_path):
    scheme = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16, "encryption_kid": "a7" * 16}
    fails(make_clip(tmp_path / "a.mp4", muxer_options=scheme), "is encrypted")


def test_a_codec_that_nobody_knows(tmp_path):
    clip = make_clip(tmp_path / "a.mp4")
    clip.write_bytes(clip.read_bytes().replace(b"avc1", b"zzzz"))
    fails(clip, "in a codec that this FFmpeg cannot decode; a newer one may", "reader-missing")


@pytest.mark.parametrize("error", ["DecoderNotFoundError", "PatchWelcomeError"])
def test_a_variant_that_ffmpeg_lacks(clips, monkeypatch, error):
    def lacking(*args):
        raise getattr(av.error, error)(1, "lacking")

    monkeypatch.setattr(videos, "_packets", lacking)
    fails(clips / "one.mp4", r"is a video of a variant \(h264\) that this FFmpeg cannot decode", "reader-missing")


@pytest.mark.parametrize("name", ["b-frames.mp4", "odd-size.mkv", "vp9.webm", "plain.flv"])
def test_damage_within_a_clip(tmp_path, clips, name):
    """Whatever FFmpeg makes of it, it is frames or an error of the item."""
    data = (clips / name).read_bytes()
    raised = 0
    for seed in range(12):
        spoiled = bytearray(data)
        rng = np.random.default_rng(seed)
        for at in rng.integers(0, len(data), 20):
            spoiled[at] = int(rng.integers(256))
        (tmp_path / name).write_bytes(spoiled)
        try:
            frames(tmp_path / name)
        except ItemError as error:
            raised += 1
            assert error.kind in {"content", "reader-missing"}
    assert raised


@pytest.mark.parametrize(("name", "reason"), [
    ("MP4", b"\0\0\0\x18ftypmp42" + b"\xff" * 500), ("QuickTime", b"\0\0\0\x08wide" + b"\xff" * 500),
    ("Matroska", b"\x1aE\xdf\xa3" + b"\xff" * 500), ("ASF", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + b"x" * 50),
])  # fmt: skip
def test_rubbish_behind_a_signature(tmp_path, name, reason):
    (tmp_path / "a.bin").write_bytes(reason)
    fails(tmp_path / "a.bin", f"{name} file")


def test_claims_beyond_all_memory_are_damage(tmp_path):
    """FFmpeg says that memory has ended; with more of it the file would be no better."""
    clip = make_clip(tmp_path / "a.mp4", muxer_options={"movflags": "frag_keyframe+empty_moov"})
    data = clip.read_bytes()
    at = data.index(b"trun") + 8
    clip.write_bytes(data[:at] + b"\x7f\xff\xff\xff" + data[at + 4 :])  # so many frames
    tracks = tmp_path / "b.mp4"
    tracks.write_bytes(many_tracks(make_clip(tracks).read_bytes(), 2000))
    for file in (clip, tracks):
        fails(file, "MP4 file that is (cut off or )?damaged")


def test_no_reader_at_all(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    fails(clips / "one.mp4", "is a video, which needs PyAV: pip install av", "reader-missing")


def test_a_disk_that_fails(clips):
    class Failing(FileView):
        reads = 0

        def read(self, count: int) -> bytes:
            self.reads += 1
            if self.reads > 2:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(min(count, 500))

    with pytest.raises(ItemError, match="cannot be read: Input/output error") as caught:
        videos.scan(Failing(os.open(clips / "b-frames.mp4", os.O_RDONLY)))
    assert caught.value.kind == "permission"


def test_ffmpegs_remarks_do_not_reach_stderr(clips, tmp_path):
    data = bytearray((clips / "plain.ts").read_bytes())
    for at in range(2000, len(data), 500):
        data[at] ^= 0x55
    (tmp_path / "noisy.ts").write_bytes(data)
    code = (
        "import os, sys, av\nfrom qvsplit.sources import videos\nfrom qvsplit.errors import ItemError\n"
        "{before}\nfile = videos.FileView(os.open(sys.argv[1], os.O_RDONLY))\n"
        "try:\n    s = videos.scan(file)\n    list(videos.frames(file, s, range(s.info.n_frames)))\n"
        "except ItemError:\n    pass\n"
    )
    for before, quiet in (("", True), ("av.logging.restore_default_callback()", False)):
        words = [sys.executable, "-c", code.format(before=before), str(tmp_path / "noisy.ts")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert (done.stderr == "") is quiet, done.stderr


def test_a_file_has_a_position_for_each_reader_and_no_name(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    one, other = FileView(descriptor), FileView(descriptor)
    assert one.read(4) == b"0123"
    assert other.read(2) == b"01"
    assert one.seek(-2, os.SEEK_END) == one.tell() == 8
    assert one.read(9) == b"89"
    assert one.seek(-1, os.SEEK_CUR) == 9
    with pytest.raises(OSError, match="before"):
        one.seek(-20, os.SEEK_CUR)
    assert not hasattr(one, "name")
    os.close(descriptor)


def test_a_number_is_read_back_only_from_an_upright_frame():
    """The tests' own ruler."""
    assert [number_of(drawn(number)) for number in (0, 1, 511, 1023)] == [0, 1, 511, 1023]
    for turns in (1, 2, 3):
        with pytest.raises(AssertionError, match="upright"):
            number_of(np.rot90(drawn(0, 96, 96), turns))
    with pytest.raises(AssertionError, match="upright"):
        number_of(drawn(0)[::-1])
