"""Decoders: processes that a picture may crash, hang or fill without anybody else noticing; and the nasty corpus."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from nasty_pictures import TOO_SLIM, expected, make_corpus, remove_corpus
from PIL import Image

from qvsplit import decoder as room
from qvsplit import images
from qvsplit.album import open_album
from qvsplit.decoder import Closed, Decoder, Decoders, PixelBudget
from qvsplit.errors import PictureError, PictureVanished, QvsplitError
from qvsplit.extract import Settings, Watcher, extract_pictures
from qvsplit.folders import Found, name_on_disk, walk


@pytest.fixture
def decoder():
    one = Decoder(seconds=20)
    yield one
    one.close()


def found(path: Path) -> Found:
    return Found(str(path.parent), path.name, path.stat().st_size, path.stat().st_mtime_ns)


def look(decoder: Decoder, path: Path) -> np.ndarray:
    picture = decoder.look(found(path), lambda *told: True)
    assert picture is not None
    return picture


def decoder_running(code: str) -> tuple[Decoder, subprocess.Popen, socket.socket]:
    """A decoder whose child runs `code` on the socket that it is given by number; child and our end of the socket."""
    ours, theirs = socket.socketpair()
    child = subprocess.Popen([os.sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    decoder = Decoder()
    decoder._child, decoder._socket = child, ours
    room._receive(ours, time.monotonic() + 60)
    return decoder, child, ours


def test_pixels_are_those_of_this_process(decoder, photos):
    for path in sorted(photos.iterdir()):
        on_file = Mock(return_value=True)
        picture = decoder.look(found(path), on_file)
        file = images.read(found(path))
        on_file.assert_called_once_with(file.sha256, file.size, file.mtime_ns)
        assert np.array_equal(np.asarray(picture), np.asarray(images.decode(file.data))), path


def test_what_is_not_wanted_is_not_decoded(decoder, photos):
    assert decoder.look(found(photos / "coins.png"), lambda *told: False) is None
    assert decoder.measure(found(photos / "coins.png")) == (384, 303)
    assert look(decoder, photos / "coins.png").shape == (303, 384, 3)


def test_a_decoder_that_dies_is_started_again_and_the_picture_tried_once_more(decoder, photos):
    look(decoder, photos / "coins.png")
    children = []

    def kill(*told) -> bool:
        children.append(decoder._child.pid)
        if len(children) == 1:
            os.kill(decoder._child.pid, signal.SIGSEGV)
            time.sleep(0.2)
        return True

    assert decoder.look(found(photos / "coins.png"), kill).shape == (303, 384, 3)
    assert len(set(children)) == 2


def test_a_picture_that_crashes_its_decoder_is_a_bad_picture(decoder, photos):
    def kill(*told) -> bool:
        os.kill(decoder._child.pid, signal.SIGSEGV)
        return True

    with pytest.raises(PictureError, match=r"crashes its decoder \(SIGSEGV\)"):
        decoder.look(found(photos / "coins.png"), kill)
    assert look(decoder, photos / "coins.png").shape == (303, 384, 3)


def test_a_picture_that_hangs_is_a_bad_picture(photos):
    decoder = Decoder(seconds=0.5)
    look(decoder, photos / "coins.png")

    def stop(*told) -> bool:
        os.kill(decoder._child.pid, signal.SIGSTOP)
        return True

    began = time.monotonic()
    with pytest.raises(PictureError, match="took longer than 0.5 s"):
        decoder.look(found(photos / "coins.png"), stop)
    assert time.monotonic() - began < 5
    assert look(decoder, photos / "coins.png").shape == (303, 384, 3)
    decoder.close()


def test_memory_has_a_limit(monkeypatch, tmp_path):
    """The largest picture there may be, of 32-bit greys, needs more than is allowed here; a small one does not."""
    monkeypatch.setattr(room, "_limit_memory", lambda: None)  # of this process
    Image.new("F", (9000, 9000)).save(tmp_path / "large.tif", compression="tiff_deflate")
    Image.new("F", (90, 90)).save(tmp_path / "small.tif")
    code = "import qvsplit.decoder as d, sys; d.MEMORY_BYTES = 200 << 20; d.main(int(sys.argv[1]), 60)"
    decoder, child, _ = decoder_running(code)
    with pytest.raises(PictureError, match="does not fit into memory"):
        look(decoder, tmp_path / "large.tif")
    assert look(decoder, tmp_path / "small.tif").shape == (90, 90, 3)
    assert decoder._child is child
    decoder.close()


def test_an_interrupt_from_the_keyboard_is_not_for_the_decoders(decoder, photos):
    look(decoder, photos / "coins.png")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(decoder._child.pid, number)
    child = decoder._child.pid
    look(decoder, photos / "coins.png")
    assert decoder._child.pid == child


def test_closing_ends_whoever_waits(photos):
    decoders = Decoders()
    ended = threading.Event()

    def wait(*told) -> bool:
        os.kill(decoders.mine()._child.pid, signal.SIGSTOP)
        return True

    def worker() -> None:
        with pytest.raises(Closed):
            decoders.mine().look(found(photos / "coins.png"), wait)
        ended.set()

    thread = threading.Thread(target=worker)
    thread.start()
    while not decoders._all or decoders._all[0]._child is None:
        time.sleep(0.01)
    time.sleep(0.7)
    decoders.close()
    assert ended.wait(10)
    thread.join()
    with pytest.raises(Closed):
        decoders.mine()._start()


def test_an_orphan_ends(photos):
    """Its parent killed, the decoder meets the end of its socket."""
    code = (
        "import sys, time\nfrom qvsplit.decoder import Decoder\nfrom qvsplit.folders import Found\n"
        f"d = Decoder()\nd.measure(Found({str(photos)!r}, 'coins.png', 1, 1))\nprint(d._child.pid, flush=True)\ntime.sleep(60)"
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


def test_an_orphan_that_hangs_ends_too(photos):
    """The clock runs in the child as well, from when it may take the memory."""
    code = (
        "import sys, time, qvsplit.decoder as d\nfrom qvsplit import images\n"
        "real = d.signal.alarm\nd.signal.alarm = lambda n: real(min(n, 1))\n"
        "images._upright = lambda image: time.sleep(60)\nd.main(int(sys.argv[1]), 60)"
    )
    decoder, child, ours = decoder_running(code)
    file = found(photos / "coins.png")
    decoder._ask({"do": "read", "root": file.root, "path": file.path, "size": file.size})
    decoder._ask({"do": "decode"})
    time.sleep(1.5)  # however long the leave takes, it does not count
    room._send(ours, {"do": "go on"})
    assert child.wait(20) == -signal.SIGALRM


def test_no_decoder_at_all_is_no_pictures_fault(monkeypatch, photos):
    monkeypatch.setattr(room.sys, "executable", "/bin/false")
    with pytest.raises(QvsplitError, match="did not start"):
        Decoder().look(found(photos / "coins.png"), lambda *told: True)
    monkeypatch.setattr(room.sys, "executable", "/no/such/python")
    with pytest.raises(QvsplitError, match="no process can be started"):
        Decoder().look(found(photos / "coins.png"), lambda *told: True)


def test_a_file_that_goes_and_one_that_changes_while_they_are_read(decoder, tmp_path, photos, monkeypatch):
    gone = Found(str(tmp_path), "gone.png", 5, 5)
    with pytest.raises(PictureVanished):
        decoder.look(gone, lambda *told: True)
    grown = tmp_path / "grown.png"
    grown.write_bytes((photos / "coins.png").read_bytes())
    os.utime(grown, (1_600_000_000, 1_600_000_000))
    plain = images._whole

    def growing(stream, size):
        grown.open("ab").write(b"more")
        return plain(stream, size)

    monkeypatch.setattr(images, "_whole", growing)
    file = images.read(found(grown))
    assert file.mtime_ns is None  # read again by the next run
    assert file.size == len(file.data) == (photos / "coins.png").stat().st_size + 4


def test_a_file_that_grows_beyond_what_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(b"x" * 1001)
    with pytest.raises(PictureError, match="is larger than"):
        images.read(found(tmp_path / "a.png"))
    (tmp_path / "a.png").write_bytes(b"x" * 1000)
    assert images.read(found(tmp_path / "a.png")).size == 1000


# ----------------------------------------------------------------------------------------------------- the budget


def test_the_first_in_line_gets_its_pixels_even_over_the_budget():
    budget = PixelBudget(100)
    budget.take(1, 60)
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (budget.take(0, 90), taken.set()))
    thread.start()
    assert not taken.wait(0.2)
    budget.serve(0)
    assert taken.wait(5)
    thread.join()
    later = threading.Event()
    thread = threading.Thread(target=lambda: (budget.take(2, 50), later.set()))
    thread.start()
    budget.give_back(60)
    assert not later.wait(0.2)
    budget.give_back(90)
    assert later.wait(5)
    thread.join()
    budget.close()
    with pytest.raises(Closed):
        budget.take(3, 1000)


# ----------------------------------------------------------------------------------------------------- the corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nasty") / "corpus"
    made = make_corpus(folder, flips=2000)
    for path in (folder / "bombs").rglob("*under_limit*"):  # a second or more each; `bench/nasty.py` takes them all
        if path.name not in {"under_limit_one_row.png", "under_limit.gif", "runs_of_line_ends.bmp"}:
            path.unlink()
    yield folder, made
    remove_corpus(folder)


def test_no_nasty_picture_stops_hangs_or_kills_the_run(corpus, checkpoint, tmp_path):
    """Every file ends as a row that is `ok`, or `failed` with a reason."""
    folder, made = corpus
    assert sum(made.values()) > 4000
    heard: list[tuple[str, str]] = []
    settings = Settings(model=str(checkpoint), picture_seconds=3.0, max_pixels=28 * 28 * 16, workers=2)
    watcher = Watcher(on_failure=lambda path, reason: heard.append((path, reason)))
    summary = extract_pictures([folder], out=tmp_path / "embeds", settings=settings, watcher=watcher)
    seen = {one.path for listing in walk([folder]).listings for one in listing.found()}
    rows = {row.path: row for row in open_album(tmp_path / "embeds").rows}
    assert rows.keys() == seen
    assert summary.failed == len(heard)
    wrong = []
    for path, row in rows.items():
        on_disk = name_on_disk(path)
        certain = expected(on_disk)
        slim = any(Path(on_disk).match(pattern) for pattern in TOO_SLIM)
        if certain is not None and (row.status == "ok") != (certain and not slim):
            wrong.append((path, row.status, row.error))
        if row.status == "failed" and (not row.error or "\n" in row.error or "b'" in row.error or len(row.error) > 200):
            wrong.append((path, row.error))
    assert not wrong
    reasons = Counter(row.error for row in rows.values() if row.status == "failed")
    assert len(reasons) < 120  # equal causes in equal words
    assert summary.encoded > 500
    again = extract_pictures([folder], out=tmp_path / "embeds", settings=settings)
    assert again.failed == 0
    assert again.encoded <= sum("took longer" in (row.error or "") for row in rows.values())  # on a busy machine


def test_a_bomb_is_refused_by_its_header(tmp_path, decoder):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + b"\0" * 4)
    asked = []
    with pytest.raises(PictureError):
        decoder.look(found(tmp_path / "bomb.png"), lambda *told: True, asked.append)
    assert not asked
