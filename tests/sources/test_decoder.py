"""Decoders: processes that an image may crash, hang or fill without anybody else noticing."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvsplit.errors import ItemError, ItemNotFound, QvsplitError
from qvsplit.sources import decoder as decoder_module
from qvsplit.sources import decoder_process, files, images
from qvsplit.sources.decoder import Closed, Decoder, DecoderPool
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.source import Entry
from tests.support.nasty_images import png
from tests.support.processes import start_python, stop_for


@pytest.fixture
def decoder():
    one = Decoder(item_timeout=20)
    yield one
    one.close()


def entry_of(path: Path) -> Entry:
    status = path.stat()
    return Entry(str(path.parent), path.name, status.st_size, str(status.st_mtime_ns), status.st_mtime_ns)


def decoded(decoder: Decoder, path: Path, **more) -> DecodedImage:
    entry = entry_of(path)
    return decoder.decode(entry, decoder.read(entry), **more)


def decoder_running(code: str) -> tuple[Decoder, subprocess.Popen, socket.socket]:
    """A decoder whose child runs `code` on the socket that it is given by number; child and our end of the socket."""
    ours, theirs = socket.socketpair()
    child = subprocess.Popen([os.sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    decoder = Decoder()
    decoder._child, decoder._socket = child, ours
    decoder_process.receive(ours, time.monotonic() + 60)
    return decoder, child, ours


@pytest.fixture
def coins(photos) -> Path:
    return photos / "coins.png"  # 384 × 303


# ------------------------------------------------------------------------------------------------------- what it gives


@pytest.mark.usefixtures("real_decoders")
def test_pixels_and_identity_are_those_of_this_process(decoder, photos):
    for path in sorted(photos.iterdir()):
        info = decoder.read(entry_of(path))
        file = files.read(entry_of(path))
        assert info == file.info
        image = decoder.decode(entry_of(path), info)
        expected, metadata = images.decode_with_metadata(file.data)
        assert np.array_equal(image.pixels, np.asarray(expected)), path
        assert image.pixels.dtype == np.uint8
        assert image.pixels.shape == (image.height, image.width, 3)
        assert (image.format, image.taken_at) == (metadata.format, metadata.taken_at)


def test_what_a_file_says_of_its_image_comes_along(decoder, tmp_path, coins):
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9003: "2024:01:31 12:30:59", 0x9011: "+02:00"}
    with Image.open(coins) as image:
        image.save(tmp_path / "taken.jpg", exif=exif)
    image = decoded(decoder, tmp_path / "taken.jpg")
    assert (image.width, image.height) == (303, 384)  # upright
    assert (image.format, image.taken_at) == ("JPEG", "2024-01-31T12:30:59+02:00")


def test_frames_are_counted_where_a_file_may_have_several(decoder, tmp_path, coins):
    with Image.open(coins) as image:
        image.save(tmp_path / "moving.gif", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
        image.save(tmp_path / "still.jpg")
    assert decoder.read(entry_of(tmp_path / "moving.gif")).frames == 3
    assert decoder.read(entry_of(tmp_path / "still.jpg")).frames == 1
    assert decoder.read(entry_of(coins)).frames == 1


def test_an_image_whose_frames_end_the_decoder_is_decoded_all_the_same(decoder, coins, monkeypatch):
    """How many there are is not known then, and that is said."""
    ask = decoder._ask

    def dying(message):
        if message["do"] == "count":
            decoder._child.kill()
            decoder._child.wait()
        return ask(message)

    monkeypatch.setattr(decoder, "_ask", dying)
    info = decoder.read(entry_of(coins))
    assert info.frames is None
    assert decoder.decode(entry_of(coins), info).width == 384


def test_pixels_are_shared_and_not_copied(decoder, coins):
    pixels = decoded(decoder, coins).pixels
    base = pixels
    while isinstance(base, np.ndarray):
        base = base.base
    assert "mmap" in repr(type(base.obj if isinstance(base, memoryview) else base))
    pixels[0, 0] = 255  # private to this process, and writable
    again = pickle.loads(pickle.dumps(decoded(decoder, coins)))
    assert again.pixels.shape == (303, 384, 3)


def test_a_file_that_was_read_is_not_read_again(decoder, tmp_path, coins):
    """The child has its bytes: it need not even be there any more."""
    own = tmp_path / "own.png"
    own.write_bytes(coins.read_bytes())
    entry = entry_of(own)
    info = decoder.read(entry)
    own.unlink()
    assert decoder.decode(entry, info).width == 384
    assert decoder.decode(entry, info).width == 384


def test_where_the_bytes_are_not_held_they_are_read_again_and_must_be_the_same(decoder, tmp_path, coins):
    own, other = tmp_path / "own.png", tmp_path / "other.png"
    own.write_bytes(coins.read_bytes())
    other.write_bytes(b"no image")
    entry = entry_of(own)
    info = decoder.read(entry)
    decoder.read(entry_of(other))
    assert decoder.decode(entry, info).width == 384
    elsewhere = Decoder(item_timeout=20)
    assert elsewhere.decode(entry, info).width == 384
    own.write_bytes(b"something else")
    decoder.read(entry_of(other))
    with pytest.raises(ItemError, match="was changed while it was being read") as caught:
        decoder.decode(entry, info)
    assert caught.value.kind == "content"
    own.unlink()
    with pytest.raises(ItemNotFound):
        decoder.decode(entry, info)
    elsewhere.close()


def test_an_older_reading_of_a_held_file_is_not_taken_for_it(decoder, tmp_path, coins):
    own = tmp_path / "own.png"
    own.write_bytes(coins.read_bytes())
    before = decoder.read(entry_of(own))
    Image.new("RGB", (5, 5)).save(own)
    after = decoder.read(entry_of(own))
    with pytest.raises(ItemError, match="was changed"):
        decoder.decode(entry_of(own), before)
    assert decoder.decode(entry_of(own), after).width == 5


def test_measuring_decodes_nothing(decoder, coins):
    assert decoder.measure(entry_of(coins)) == (384, 303)
    assert decoder.peak_memory == 0
    assert decoded(decoder, coins).pixels.shape == (303, 384, 3)
    assert decoder.peak_memory > 0


def test_a_bomb_is_refused_by_its_header(tmp_path, decoder):
    (tmp_path / "bomb.png").write_bytes(png(60000, 60000, colour=2, data=zlib.compress(b"")))
    asked = []
    with pytest.raises(ItemError, match="claims 60000×60000 pixels"):
        decoded(decoder, tmp_path / "bomb.png", on_size=lambda *size: asked.append(size))
    assert not asked


def test_whoever_hears_the_size_may_refuse(decoder, coins):
    """With an error of its own, which is not the image's; the next image is none the worse for it."""

    def refuse(width, height):
        raise error

    for error in (ItemError("is too large for us", "memory"), KeyboardInterrupt(), TimeoutError()):
        with pytest.raises(type(error)) as caught:
            decoded(decoder, coins, on_size=refuse)
        assert caught.value is error
        assert decoder.measure(entry_of(coins)) == (384, 303)
    sizes = []
    assert decoded(decoder, coins, on_size=lambda *size: sizes.append(size)).width == 384
    assert sizes == [(384, 303)]


# ------------------------------------------------------------------------------------- crashes, hangs, memory and kinds


def test_a_decoder_that_dies_is_started_again_and_the_image_tried_once_more(decoder, coins):
    children = []

    def kill_once(width, height):
        children.append(decoder._child.pid)
        if len(children) == 1:
            os.kill(decoder._child.pid, signal.SIGSEGV)

    assert decoded(decoder, coins, on_size=kill_once).pixels.shape == (303, 384, 3)
    assert len(set(children)) == 2


def test_one_that_died_between_the_steps_is_started_again(decoder, coins):
    info = decoder.read(entry_of(coins))
    os.kill(decoder._child.pid, signal.SIGKILL)
    assert decoder.decode(entry_of(coins), info).width == 384
    os.kill(decoder._child.pid, signal.SIGKILL)
    assert decoder.read(entry_of(coins)).sha256 == info.sha256  # its version is trusted once it is not fresh


@pytest.mark.parametrize(
    ("number", "reason", "kind"),
    [
        (signal.SIGSEGV, r"crashes its decoder \(SIGSEGV\)", "content"),
        (signal.SIGABRT, r"crashes its decoder \(SIGABRT\)", "content"),
        (signal.SIGKILL, r"crashes its decoder \(killed: not enough memory\? fewer `workers` take less\)", "memory"),
    ],
)
def test_an_image_that_crashes_its_decoder_is_a_bad_image(decoder, coins, number, reason, kind):
    with pytest.raises(ItemError, match=reason) as caught:
        decoded(decoder, coins, on_size=lambda width, height: os.kill(decoder._child.pid, number))
    assert caught.value.kind == kind
    assert decoded(decoder, coins).width == 384


BUSY = """
import sys, time, qvsplit.sources.decoder_process as d
from qvsplit.sources import images
def busy(data, max_pixels):
    print("busy", flush=True)
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
    return 384, 303
images.measure, alarm = busy, d.signal.alarm
d.signal.alarm = lambda seconds: alarm(min(seconds, {alarm}))
d.main(int(sys.argv[1]), 60)
"""
MEASURES = """
import socket, subprocess, sys
from qvsplit.sources.decoder import Decoder, decoder_process
from qvsplit.sources.source import Entry
from tests.sources.test_decoder import decoder_running
decoder, _, _ = decoder_running({busy!r})
decoder.item_timeout = 3.0
try:
    print(*decoder.measure(Entry({folder!r}, "coins.png", 1, None, 1)), flush=True)
finally:
    decoder.close()
"""


@pytest.mark.parametrize(
    ("group", "alarm"), [(False, 100), (True, 100), (True, 2)], ids=["parent", "both", "both beyond the child's alarm"]
)
def test_a_pause_is_no_time_that_an_image_took(coins, group, alarm):
    """Its process alone is stopped, or, as by Ctrl-Z, that of its decoder too, for longer than a step may take."""
    code = MEASURES.format(busy=BUSY.format(alarm=alarm), folder=str(coins.parent))
    process = start_python(code, start_new_session=True)
    assert process.stdout.readline() == "busy\n", process.stderr.read()
    stop_for(process, 3.6, group=group)
    printed, said = process.communicate(timeout=60)
    assert printed == "384 303\n", said


@pytest.mark.parametrize("step", ["read", "decode", "leave"])
def test_an_image_that_hangs_is_a_bad_image(coins, step):
    """Each step has its own time."""
    decoder = Decoder(item_timeout=0.5)
    entry = entry_of(coins)
    info = decoder.read(entry)

    def stop(*size):
        os.kill(decoder._child.pid, signal.SIGSTOP)

    if step != "leave":
        stop()
    began = time.monotonic()
    with pytest.raises(ItemError, match="took longer than 0.5 s .*; `item_timeout` allows more") as caught:
        decoder.read(entry) if step == "read" else decoder.decode(entry, info, stop)
    assert time.monotonic() - began < 5
    assert caught.value.kind == "timeout"
    assert decoded(decoder, coins).width == 384
    decoder.close()


def test_memory_has_a_limit(tmp_path):
    """The largest image there may be, of 32-bit greys, needs more than is allowed here; a small one does not."""
    Image.new("F", (9000, 9000)).save(tmp_path / "large.tif", compression="tiff_deflate")
    Image.new("F", (90, 90)).save(tmp_path / "small.tif")
    code = (
        "import qvsplit.sources.decoder_process as d, sys; d.MEMORY_BYTES, d.PIXEL_BYTES = 200 << 20, 0; "
        "d.main(int(sys.argv[1]), 60)"
    )
    decoder, child, _ = decoder_running(code)
    with pytest.raises(ItemError, match="does not fit into memory") as caught:
        decoded(decoder, tmp_path / "large.tif")
    assert caught.value.kind == "memory"
    assert decoded(decoder, tmp_path / "small.tif").pixels.shape == (90, 90, 3)
    assert decoder._child is child
    decoder.close()


@pytest.mark.parametrize(
    ("data", "reason", "kind"),
    [
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "needs pillow-heif", "reader-missing"),
        (b"no image", "is not an image", "content"),
        (None, "cannot be opened: No such file", "permission"),
    ],
)
def test_the_kind_of_an_error_comes_from_the_child(decoder, tmp_path, data, reason, kind):
    if data is None:
        (tmp_path / "a.png").symlink_to("nothing")
    else:
        (tmp_path / "a.png").write_bytes(data)
    entry = Entry(str(tmp_path), "a.png", -1, None, None)
    with pytest.raises(ItemError, match=reason) as caught:
        decoder.decode(entry, decoder.read(entry))
    assert caught.value.kind == kind


def test_a_file_that_no_longer_exists_is_not_found(decoder, tmp_path):
    deleted = Entry(str(tmp_path), "deleted.png", 5, None, 5)
    with pytest.raises(ItemNotFound):
        decoder.read(deleted)
    with pytest.raises(ItemNotFound):
        decoder.measure(deleted)


def test_what_nobody_expected_is_a_bug_and_no_bad_image(coins):
    code = (
        "import sys, qvsplit.sources.decoder_process as d\nfrom qvsplit.sources import images\n"
        "images.measure = lambda data, max_pixels: 1 / 0\nd.main(int(sys.argv[1]), 60)"
    )
    decoder, _, _ = decoder_running(code)
    with pytest.raises(RuntimeError, match="in a decoder: ZeroDivisionError"):
        decoder.measure(entry_of(coins))
    assert decoded(decoder, coins).width == 384
    decoder.close()


@pytest.mark.usefixtures("real_decoders")
def test_an_interrupt_from_the_keyboard_is_not_for_the_decoders(decoder, coins):
    decoded(decoder, coins)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(decoder._child.pid, number)
    child = decoder._child.pid
    decoded(decoder, coins)
    assert decoder._child.pid == child


def test_an_interrupt_of_ours_leaves_no_answer_for_the_next_image(decoder, coins, monkeypatch):
    """It comes between a question and its answer: that answer is another image's."""
    decoded(decoder, coins)
    real = decoder_process.receive
    calls = []

    def interrupted(connection, deadline=None):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(connection, deadline)

    monkeypatch.setattr(decoder_process, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.read(entry_of(coins))
    assert decoder.measure(entry_of(coins)) == (384, 303)


@pytest.mark.usefixtures("real_decoders")
def test_no_decoder_at_all_is_no_images_fault(monkeypatch, coins):
    monkeypatch.setattr(decoder_module.sys, "executable", "/bin/false")
    with pytest.raises(QvsplitError, match="did not start"):
        Decoder().read(entry_of(coins))
    monkeypatch.setattr(decoder_module.sys, "executable", "/no/such/python")
    with pytest.raises(QvsplitError, match="no process can be started"):
        Decoder().read(entry_of(coins))


# --------------------------------------------------------------------------------------------- the pool, and its ends


def test_every_thread_has_its_own(coins):
    pool = DecoderPool(20)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append((pool.mine(), pool.mine()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(first is again for first, again in seen)
    assert len({id(first) for first, _ in seen}) == 3
    for first, _ in seen:
        decoded(first, coins)
    assert pool.peak_memory() == sum(first.peak_memory for first, _ in seen) > 0
    pool.close()
    assert all(first._child.poll() is not None for first, _ in seen)


def use_pool(pool: DecoderPool, path: str) -> tuple[int, tuple[int, int], float]:
    """What another process does with a pool that it was sent."""
    entry = entry_of(Path(path))
    image = pool.mine().decode(entry, pool.mine().read(entry))
    pool.close()
    return os.getpid(), (image.width, image.height), pool.item_timeout


def test_a_pool_is_picklable_and_works_in_another_process(coins):
    """It leaves its children behind, which go on; the copy starts its own."""
    pool = DecoderPool(7)
    info = pool.mine().read(entry_of(coins))
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        process, size, item_timeout = workers.apply(use_pool, (pool, str(coins)))
    assert process != os.getpid()
    assert (size, item_timeout) == ((384, 303), 7)
    child = pool.mine()._child
    assert pool.mine().decode(entry_of(coins), info).width == 384
    assert pool.mine()._child is child
    pool.close()
    copy = pickle.loads(pickle.dumps(pool))
    assert decoded(copy.mine(), coins).width == 384
    copy.close()


def test_closing_ends_whoever_waits(coins):
    pool = DecoderPool()
    ended = threading.Event()
    stopped = threading.Event()

    def stop(width, height):
        os.kill(pool.mine()._child.pid, signal.SIGSTOP)
        stopped.set()

    def worker() -> None:
        with pytest.raises(Closed):
            decoded(pool.mine(), coins, on_size=stop)
        ended.set()

    thread = threading.Thread(target=worker, daemon=True)
    thread.start()
    assert stopped.wait(60)
    assert not ended.wait(0.3)
    pool.close()
    assert ended.wait(10)
    thread.join()
    with pytest.raises(Closed):
        pool.mine()


def test_a_closed_decoder_starts_nothing(coins, monkeypatch):
    monkeypatch.setattr(decoder_module, "_start_child", lambda *args: pytest.fail("started a child"))
    decoder = Decoder()
    decoder.close()
    with pytest.raises(Closed):
        decoder.read(entry_of(coins))
    assert decoder._child is None


def test_an_orphan_ends(coins):
    """Its parent killed, the decoder meets the end of its socket."""
    code = (
        "import sys, time\nfrom qvsplit.sources.decoder import Decoder\nfrom qvsplit.sources.source import Entry\n"
        f"d = Decoder()\nd.measure(Entry({str(coins.parent)!r}, 'coins.png', 1, None, 1))\n"
        "print(d._child.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([os.sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_an_orphan_that_hangs_ends_too(coins):
    """The clock runs in the child as well, from when it may take the memory."""
    code = (
        "import sys, time, qvsplit.sources.decoder_process as d\nfrom qvsplit.sources import pixels\n"
        "real = d.signal.alarm\nd.signal.alarm = lambda n: real(min(n, 1))\n"
        "pixels.upright = lambda image: time.sleep(60)\nd.main(int(sys.argv[1]), 60)"
    )
    decoder, child, ours = decoder_running(code)
    decoder.read(entry_of(coins))
    decoder._ask({"do": "decode", "max_pixels": 10**9})
    time.sleep(1.5)  # however long the leave takes, it does not count
    decoder_process.send(ours, {"do": "go on"})
    assert child.wait(20) == -signal.SIGALRM
