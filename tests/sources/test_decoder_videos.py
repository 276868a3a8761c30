"""Clips in decoders: processes that a clip may crash, hang or fill without anybody else noticing."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from qvsplit.errors import ItemError, ItemNotFound
from qvsplit.sources import decoder_process, videos
from qvsplit.sources.decoder import Closed, Decoder, DecoderPool
from tests.sources.test_decoder import decoder_running, entry_of
from tests.support.clips import drawn, make_clip, number_of

COUNT = 40


@pytest.fixture
def decoder():
    one = Decoder(item_timeout=20)
    yield one
    one.close()


@pytest.fixture
def clip(tmp_path) -> Path:
    return make_clip(tmp_path / "clip.mp4", count=COUNT, codec_options={"qp": "0", "bf": "3", "g": "10"})


def opened(decoder: Decoder, path: Path, indices=range(COUNT)):
    entry = entry_of(path)
    return decoder.frames(entry, decoder.read(entry), indices)


def numbers(decoder: Decoder, path: Path, indices=range(COUNT)) -> list[int]:
    return [number_of(frame) for frame in opened(decoder, path, indices)]


# ------------------------------------------------------------------------------------------------------- what it gives


def test_frames_and_facts_are_those_of_this_process(decoder, clip):
    entry = entry_of(clip)
    info = decoder.read(entry)
    assert (info.kind, info.size) == ("video", clip.stat().st_size)
    view = videos.FileView(os.open(clip, os.O_RDONLY))
    scanned = videos.scan(view)
    assert decoder.scan(entry, info) == scanned.info
    wanted = [0, 3, 3, 17, 39]
    got = [frame.copy() for frame in decoder.frames(entry, info, wanted)]
    expected = [frame.copy() for frame in videos.frames(view, scanned, wanted)]
    assert [frame.dtype for frame in got] == [np.uint8] * 5
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))
    assert decoder.peak_memory > 0
    assert list(decoder.frames(entry, info, [])) == []


def test_two_buffers_are_shared_by_turns(decoder, clip):
    """A frame stays whole until the next is asked for, however far ahead the child is; nothing is copied."""
    held = []
    for number, frame in enumerate(opened(decoder, clip)):
        time.sleep(0.01)
        assert number_of(frame) == number
        held.append(frame)
        frame[:] = 7  # its own to write to; the child writes over it
    assert len({frame.ctypes.data for frame in held}) == 2
    assert held[0].flags.writeable  # as torch wants them


def test_content_decides_and_not_the_name(decoder, tmp_path, clip, photos):
    image = tmp_path / "image.mp4"
    image.write_bytes((photos / "coins.png").read_bytes())
    info = decoder.read(entry_of(image))
    assert info.kind == "image"
    assert decoder.decode(entry_of(image), info).width == 384
    with pytest.raises(ItemError, match="is an image, not a video"):
        decoder.scan(entry_of(image), info)
    video = tmp_path / "video.jpg"
    video.write_bytes(clip.read_bytes())
    info = decoder.read(entry_of(video))
    assert info.kind == "video"
    assert decoder.scan(entry_of(video), info).n_frames == COUNT
    for step in (lambda: decoder.decode(entry_of(video), info), lambda: decoder.measure(entry_of(video))):
        with pytest.raises(ItemError, match="is a video, not an image"):
            step()


def test_gifs_are_what_the_pool_says(tmp_path):
    gif = make_clip(tmp_path / "a.gif", codec="gif", pixels="rgb8")
    for pool, kind in ((DecoderPool(20), "image"), (DecoderPool(20, gifs_are_videos=True), "video")):
        for one in (pool, pickle.loads(pickle.dumps(pool))):
            info = one.mine().read(entry_of(gif))
            assert info.kind == kind
            if kind == "video":
                assert numbers(one.mine(), gif, [0, 11]) == [0, 11]
            one.close()


def test_a_file_that_was_read_stays_open(decoder, clip):
    """It need not even be there any more."""
    entry = entry_of(clip)
    info = decoder.read(entry)
    clip.unlink()
    assert decoder.scan(entry, info).n_frames == COUNT
    assert [number_of(frame) for frame in decoder.frames(entry, info, [5])] == [5]


def test_where_a_clip_is_not_held_it_is_hashed_again_and_must_be_the_same(decoder, tmp_path, clip, photos):
    entry = entry_of(clip)
    info = decoder.read(entry)
    decoder.read(entry_of(photos / "coins.png"))
    assert [number_of(frame) for frame in decoder.frames(entry, info, [5])] == [5]
    clip.write_bytes(make_clip(tmp_path / "other.mp4").read_bytes())
    decoder.read(entry_of(photos / "coins.png"))
    for step in (lambda: decoder.scan(entry, info), lambda: list(decoder.frames(entry, info, [5]))):
        with pytest.raises(ItemError, match="was changed while it was being read"):
            step()
    clip.unlink()
    decoder.read(entry_of(photos / "coins.png"))
    with pytest.raises(ItemNotFound):
        decoder.scan(entry, info)


def test_a_clip_that_changes_is_noticed(decoder, clip):
    """Before it is scanned, and between two of its frames."""
    entry = entry_of(clip)
    info = decoder.read(entry)
    later = time.time_ns() + 5_000_000_000
    os.utime(clip, ns=(later, later))
    with pytest.raises(ItemError, match="was changed while it was being read"):
        decoder.scan(entry, info)
    frames = opened(decoder, clip)
    given = [number_of(next(frames)), number_of(next(frames))]
    with clip.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ItemError, match="was changed while it was being read"):
        given.extend(map(number_of, frames))
    assert given == list(range(len(given)))
    assert len(given) <= 4
    assert numbers(decoder, clip, [1]) == [1]


def test_a_bad_clip_is_an_items_error_and_the_next_one_none_the_worse(decoder, tmp_path, clip):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(clip.read_bytes()[:-300])
    entry = entry_of(bad)
    info = decoder.read(entry)
    child = decoder._child
    for step in (lambda: decoder.scan(entry, info), lambda: list(decoder.frames(entry, info, [0]))):
        with pytest.raises(ItemError, match="ends early"):
            step()
    assert numbers(decoder, clip, [2, 3]) == [2, 3]
    assert decoder._child is child


def test_frames_that_end_early_are_given_up_to_there(decoder, tmp_path):
    """The error comes in the place of the frame, not of one before it that was still to be taken."""
    one, other = tmp_path / "one.ts", tmp_path / "other.ts"
    for path, size in ((one, (96, 64)), (other, (128, 96))):
        make_clip(path, codec="mpeg2video", codec_options={"qmin": "1", "qmax": "2"}, size=size)
    one.write_bytes(one.read_bytes() + other.read_bytes())
    given = []
    with pytest.raises(ItemError, match="changes its resolution"):
        given.extend(frame.shape for frame in opened(decoder, one, range(24)))
    assert given
    assert set(given) == {(64, 96, 3)}
    child = decoder._child
    assert numbers(decoder, other, [1]) == [1]
    assert decoder._child is child


def test_frames_that_do_not_exist_are_nobodys_bad_clip(decoder, clip):
    for wrong in ([COUNT], [3, 2], [-1]):
        with pytest.raises(RuntimeError, match="in a decoder: ValueError"):
            numbers(decoder, clip, wrong)


# ------------------------------------------------------------------------------------------------------ death and hangs


@pytest.mark.parametrize("after", [0, 1, 3, 39])
def test_a_decoder_that_is_killed_goes_on_where_it_was(decoder, clip, after):
    given, children = [], set()
    for frame in opened(decoder, clip):
        given.append(number_of(frame))
        if decoder._child is not None:
            children.add(decoder._child.pid)
            if len(given) == after + 1:
                os.kill(decoder._child.pid, signal.SIGKILL)
                decoder._child.wait()
                assert number_of(frame) == after  # its memory stays
    assert given == list(range(COUNT))
    assert len(children) == (1 if after == 39 else 2)
    assert numbers(decoder, clip, [7]) == [7]


@pytest.mark.parametrize(
    ("number", "reason", "kind"),
    [
        (signal.SIGSEGV, r"crashes its decoder \(SIGSEGV\)", "content"),
        (signal.SIGKILL, "killed: not enough memory", "memory"),
    ],
)
def test_a_clip_that_crashes_its_decoder_is_a_bad_clip(decoder, clip, monkeypatch, number, reason, kind):
    """Whichever frame it is, and whatever came before it."""
    real, begun = decoder._begin_clip, []

    def begin(entry, info, indices):
        begun.append(indices[0])
        clip_begun = real(entry, info, indices)
        if len(begun) > 1:
            os.kill(decoder._child.pid, number)
        return clip_begun

    monkeypatch.setattr(decoder, "_begin_clip", begin)
    frames = opened(decoder, clip)
    assert [number_of(next(frames)) for _ in range(3)] == [0, 1, 2]
    os.kill(decoder._child.pid, number)
    decoder._child.wait()
    given = []
    with pytest.raises(ItemError, match=reason) as caught:
        given.extend(map(number_of, frames))
    assert caught.value.kind == kind
    assert given == list(range(3, 3 + len(given)))  # what each had ready before it died
    assert begun[:2] == [0, 3]
    assert begun[-1] == 3 + len(given)
    monkeypatch.undo()
    assert numbers(decoder, clip, [7]) == [7]


def test_a_clip_that_crashes_its_decoder_while_it_is_scanned(clip):
    """A real one, at a frame of the file."""
    code = (
        "import os, signal, sys, qvsplit.sources.decoder_process as d\nfrom qvsplit.sources import videos\n"
        "videos.scan = lambda *args: os.kill(os.getpid(), signal.SIGABRT)\nd.main(int(sys.argv[1]), 60)"
    )
    decoder, child, _ = decoder_running(code)
    entry = entry_of(clip)
    info = decoder.read(entry)
    assert decoder.scan(entry, info).n_frames == COUNT  # by the second one, which is a usual one
    assert child.poll() == -signal.SIGABRT
    decoder.close()


def test_a_clip_that_makes_no_progress_is_a_bad_clip(clip):
    decoder = Decoder(item_timeout=1)
    frames = opened(decoder, clip)
    next(frames)
    os.kill(decoder._child.pid, signal.SIGSTOP)
    with pytest.raises(ItemError, match="made no progress for 1 s .*; `item_timeout` allows more") as caught:
        list(frames)
    assert caught.value.kind == "timeout"
    assert numbers(decoder, clip, [7]) == [7]
    entry = entry_of(clip)
    info = decoder.read(entry)
    os.kill(decoder._child.pid, signal.SIGSTOP)
    with pytest.raises(ItemError, match="made no progress for 1 s"):
        decoder.scan(entry, info)
    decoder.close()


SLOW = """
import sys, time, qvsplit.sources.decoder_process as d
real = d._Child._tell_progress
def slow(child):
    time.sleep({seconds})
    real(child)
d._Child._tell_progress = slow
d.main(int(sys.argv[1]), 60)
"""


def test_what_advances_slowly_may_take_longer_than_a_step(clip):
    """Each of its packets takes a tenth of a second, all of them several times what a step may take without one."""
    decoder, child, _ = decoder_running(SLOW.format(seconds=0.1))
    decoder.item_timeout = 2.0
    entry = entry_of(clip)
    info = decoder.read(entry)
    began = time.monotonic()
    assert decoder.scan(entry, info).n_frames == COUNT
    assert time.monotonic() - began > decoder.item_timeout
    assert decoder._child is child
    decoder.close()


def test_frames_that_nobody_takes_any_more(decoder, clip, photos):
    frames = opened(decoder, clip)
    next(frames)
    child = decoder._child
    frames.close()
    assert child.poll() is not None
    assert numbers(decoder, clip, [7]) == [7]
    entry = entry_of(clip)
    info = decoder.read(entry)
    whole = decoder.frames(entry, info, [1])
    assert number_of(next(whole)) == 1
    child = decoder._child
    whole.close()  # nothing was left to be given
    assert decoder._child is child
    assert decoder.scan(entry, info).n_frames == COUNT


def test_another_step_between_two_frames(decoder, clip, photos):
    """It is answered, and the frames go on where they were."""
    frames = opened(decoder, clip)
    given = [number_of(next(frames)) for _ in range(3)]
    image = photos / "coins.png"
    assert decoder.decode(entry_of(image), decoder.read(entry_of(image))).width == 384
    given += [number_of(next(frames)) for _ in range(3)]
    assert decoder.measure(entry_of(image)) == (384, 303)
    assert numbers(decoder, clip, [9, 10]) == [9, 10]
    assert given + [number_of(frame) for frame in frames] == list(range(COUNT))


def test_an_interrupt_between_two_frames_leaves_nothing_for_the_next_clip(decoder, clip, monkeypatch):
    frames = opened(decoder, clip)
    next(frames)
    real = decoder_process.receive

    def interrupted(connection, deadline=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder_process, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(frames)
    monkeypatch.setattr(decoder_process, "receive", real)
    assert numbers(decoder, clip, [7]) == [7]


@pytest.mark.parametrize("step", ["descriptors", "mapping"])
def test_memory_for_frames_that_cannot_be_had(decoder, clip, monkeypatch, step):
    from qvsplit.sources import decoder as decoder_module

    def refuse(*args, **more):
        raise OSError(12, "Cannot allocate memory") if step == "mapping" else KeyboardInterrupt

    target = (decoder_module.mmap, "mmap") if step == "mapping" else (decoder_module.socket, "recv_fds")
    with monkeypatch.context() as patched:
        patched.setattr(*target, refuse)
        with pytest.raises(ItemError if step == "mapping" else KeyboardInterrupt) as caught:
            numbers(decoder, clip)
    if step == "mapping":
        assert caught.value.kind == "memory"
    assert numbers(decoder, clip, [7]) == [7]


def test_closing_ends_frames(clip):
    pool = DecoderPool(20)
    frames = opened(pool.mine(), clip)
    next(frames)
    pool.close()
    with pytest.raises(Closed):
        list(frames)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.mp4"
    return make_clip(path, count=3, size=(3840, 2160), codec_options={"preset": "ultrafast", "refs": "4"})


@pytest.mark.parametrize("megabytes", [40, 60, 80, 100])
def test_memory_has_a_limit_whatever_ffmpeg_says_of_it(clip, large, megabytes):
    """Beyond it, FFmpeg says that the file is broken, or gives nothing, or that memory ended."""
    code = (
        "import sys, av, qvsplit.sources.decoder_process as d\nav.VideoFrame(16, 16, 'yuv420p').to_ndarray(format='rgb24')\n"
        f"d.MEMORY_BYTES = {megabytes} << 20\nd.main(int(sys.argv[1]), 60)"
    )
    decoder, child, _ = decoder_running(code)
    with pytest.raises(ItemError, match="does not fit into memory") as caught:
        numbers(decoder, large, range(3))
    assert caught.value.kind == "memory"
    assert numbers(decoder, clip, [1]) == [1]
    assert decoder._child is child
    decoder.close()


def test_the_ruler_is_read_from_a_shared_frame(decoder, clip):
    (frame,) = (frame.copy() for frame in opened(decoder, clip, [21]))
    assert frame.shape == drawn(21).shape
