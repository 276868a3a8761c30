"""Frames of a video in a report: which, how they stand side by side, and what does not show."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qvsplit.errors import ItemError
from qvsplit.output import frames, thumbnails
from qvsplit.sources.decoder import Decoder
from qvsplit.sources.files import FileInfo
from tests.support import rows
from tests.support.report_pages import clip_row, data_of, generated, thumbnails_of, written


class FakePool:
    """Frames of one colour each, in one buffer that is overwritten; says what was asked of it."""

    def __init__(self, height=90, width=160, n_frames=100, error=None):
        self.shape, self.n_frames, self.error = (height, width, 3), n_frames, error
        self.reads: list[str] = []
        self.asked: list[list[int]] = []
        self.closed = False

    def __call__(self, **settings):
        assert settings == {"gifs_are_videos": True}
        return self

    def mine(self):
        return self

    def close(self):
        self.closed = True

    def read(self, entry):
        self.reads.append(entry.path)
        with open(entry.file, "rb") as file:
            data = file.read()
        return FileInfo(hashlib.sha256(data).hexdigest(), len(data), 5, "5", "video")

    def scan(self, entry, info):
        return SimpleNamespace(n_frames=self.n_frames, fps=10.0)

    def frames(self, entry, info, indices):
        self.asked.append(list(indices))
        buffer = np.empty(self.shape, np.uint8)
        for index in indices:
            if self.error is not None:
                raise ItemError(self.error)
            buffer[:] = 2 * index
            yield buffer
        buffer[:] = 255


@pytest.fixture
def pool(monkeypatch):
    fake = FakePool()
    monkeypatch.setattr(frames, "DecoderPool", fake)
    return fake


def film(folder, name="film.mp4", content=b"film", sampled=range(0, 40, 5), **changes):
    (folder / name).write_bytes(content)
    media = json.dumps({"frames_indices": list(sampled)}) if sampled is not None else None
    row = rows.row(name, kind="video", duration=10.0, width=160, height=90, media=media)
    return replace(row, root=str(folder), sha256=hashlib.sha256(content).hexdigest(), size=len(content), **changes)


def greys(data: bytes) -> list[int]:
    """Give the grey of each frame of a sheet of 2 × 2."""
    image = Image.open(io.BytesIO(data)).convert("L")
    return [image.getpixel((int(image.width * x), int(image.height * y))) for y in (0.25, 0.75) for x in (0.25, 0.75)]


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [(range(8), [1, 3, 5, 7]), (range(4), [0, 1, 2, 3]), ([9], [9]), ([3, 8], [3, 8]), (range(100), [12, 37, 62, 87])],
)
def test_a_few_frames_evenly_spread(numbers, shown):
    assert frames.spread(list(numbers), 4) == shown


@pytest.mark.parametrize(
    ("size", "number", "columns"),
    [((160, 90), 4, 2), ((90, 160), 4, 4), ((100, 100), 4, 2), ((160, 90), 1, 1), ((400, 90), 4, 1)],
)
def test_frames_stand_where_they_are_largest(size, number, columns):
    assert frames.columns_of(number, *size) == columns


def test_the_sheet_is_of_the_rows_own_frames(tmp_path, pool):
    page = written(tmp_path / "page.html", [generated(film(tmp_path), "What?", "x")])
    assert pool.asked == [[5, 15, 25, 35]] and pool.closed
    (sheet,) = thumbnails_of(page)
    image = Image.open(io.BytesIO(sheet))
    assert image.size == (2 * 160 + frames.GAP, 2 * 90 + frames.GAP) and len(sheet) < 16_000
    assert greys(sheet) == pytest.approx([10, 30, 50, 70], abs=4)  # none is of the buffer as it was left


def test_a_row_that_names_no_frames_shows_those_of_its_seconds(tmp_path, pool):
    whole = film(tmp_path, sampled=None)
    part = replace(whole, part=1, start=2.0, end=4.0)
    torn = replace(whole, media='{"frames_indices": ["x"]}', part=2, start=9.99, end=30.0)
    page = written(tmp_path / "page.html", [generated(row, "What?", "x") for row in (whole, part, torn)])
    assert sorted(pool.asked) == [[12, 37, 62, 87], [22, 27, 32, 37]]
    assert [item[3] for item in data_of(page)["items"]] == ["", "", "has no frames to be shown"]


def test_parts_of_one_video_are_cards_of_their_own_with_their_seconds(tmp_path, pool):
    parts = [
        film(tmp_path, sampled=range(10 * n, 10 * n + 10), part=n, start=10.0 * n, end=10.0 * n + 10, duration=72.5)
        for n in range(3)
    ]
    whole = film(tmp_path, "whole.mp4", b"whole")
    asked = [generated(row, question, "x") for row in (*parts, whole) for question in ("What?", "Where?")]
    data = data_of(written(tmp_path / "page.html", asked))
    assert [(card[0], len(card[2])) for card in data["cards"]] == [([0], 2), ([1], 2), ([2], 2), ([3], 2)]
    assert [item[0] for item in data["items"]] == ["film.mp4#0", "film.mp4#1", "film.mp4#2", "whole.mp4"]
    assert [item[2] for item in data["items"]] == [0, 1, 2, 3]  # a sheet each, though the file is one
    assert [item[6:] for item in data["items"]] == [
        ["0:00 to 0:10 of 1:12.5", 1], ["0:10 to 0:20 of 1:12.5", 1], ["0:20 to 0:30 of 1:12.5", 1], ["0:10", 0],
    ]  # fmt: skip


def test_a_file_of_many_parts_is_hashed_once_a_thread_and_again_when_it_changed(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(thumbnails, "MOST_THREADS", 1)
    parts = [film(tmp_path, part=n, start=10.0 * n, end=10.0 * n + 10) for n in range(5)]
    written(tmp_path / "page.html", [generated(row, "What?", "x") for row in parts])
    assert pool.reads == ["film.mp4"]
    pool.reads.clear()

    def changing():
        yield generated(parts[0], "What?", "x")
        while not pool.asked[-1:] or len(pool.asked) < 6:
            pass
        (tmp_path / "film.mp4").write_bytes(b"FILM")
        os.utime(tmp_path / "film.mp4", ns=(7, 7))
        yield generated(parts[1], "What?", "x")

    data = data_of(written(tmp_path / "page.html", changing()))
    assert pool.reads == ["film.mp4"] * 2
    assert [item[3] for item in data["items"]] == ["", "has changed since it was encoded"]


def test_why_a_video_is_not_shown(tmp_path, pool):
    gone, other, longer = (film(tmp_path, f"{name}.mp4", name.encode()) for name in ("gone", "other", "longer"))
    os.unlink(tmp_path / "gone.mp4")
    (tmp_path / "other.mp4").write_bytes(b"OTHER")
    (tmp_path / "longer.mp4").write_bytes(b"longer and longer")
    failed = rows.failed("torn.mp4", kind="video", sha256=None, error="is cut off")
    page = written(
        tmp_path / "page.html", [generated(row, "What?", "x") for row in (gone, other, longer)], failed=[failed]
    )
    assert [item[3] for item in data_of(page)["items"]] == [
        "is cut off", "was not found", "has changed since it was encoded", "has changed since it was encoded",
    ]  # fmt: skip
    assert pool.asked == [] and thumbnails_of(page) == []
    pool.error = "crashes its decoder (SIGSEGV)"
    page = written(tmp_path / "page.html", [generated(film(tmp_path), "What?", "x")])
    assert [item[3] for item in data_of(page)["items"]] == ["crashes its decoder (SIGSEGV)"]


def test_equal_videos_are_in_the_page_once(tmp_path, pool):
    copies = [film(tmp_path, name) for name in ("a.mp4", "b.mp4")]
    page = written(tmp_path / "page.html", [generated(row, "What?", "x") for row in copies])
    assert len(thumbnails_of(page)) == 1
    assert [item[2] for item in data_of(page)["items"]] == [0, 0]


def test_frames_of_a_real_clip_and_of_its_parts(tmp_path):
    whole, cut = (clip_row(tmp_path / name, range(40), frames=n) for name, n in (("film.mp4", 40), ("cut.mp4", 41)))
    parts = [replace(cut, part=n, start=2.0 * n, end=2.0 * n + 2, media=None) for n in range(2)]
    page = written(tmp_path / "page.html", [generated(row, "What?", "x") for row in (whole, *parts)])
    assert [item[3] for item in data_of(page)["items"]] == ["", "", ""]
    sheets = thumbnails_of(page)
    of_each = [5, 15, 25, 35], [2, 7, 12, 17], [22, 27, 32, 37]
    for sheet, numbers in zip(sheets, of_each, strict=True):
        assert greys(sheet) == pytest.approx([4 * number for number in numbers], abs=5)


def test_a_clip_that_is_none_says_so(tmp_path):
    row = clip_row(tmp_path / "film.mp4", range(40))
    data = (tmp_path / "film.mp4").read_bytes()[:100] + b"\0" * 900
    (tmp_path / "film.mp4").write_bytes(data)
    torn = replace(row, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    (item,) = data_of(written(tmp_path / "page.html", [generated(torn, "What?", "x")]))["items"]
    assert item[2] == -1
    assert len(item[3]) > 10 and "Error" not in item[3] and "cannot be shown" not in item[3]


def test_a_clip_that_kills_its_decoder_spoils_nothing_else(tmp_path, monkeypatch):
    bad, good = (clip_row(tmp_path / name, range(40), frames=n) for name, n in (("bad.mp4", 40), ("good.mp4", 41)))
    real = Decoder.frames

    def killing(self, entry, info, indices):
        if entry.path == "bad.mp4":
            self._child.kill()
            monkeypatch.setattr(Decoder, "_start", dying)
        return real(self, entry, info, indices)

    started = Decoder._start

    def dying(self):
        started(self)
        self._child.kill()

    monkeypatch.setattr(Decoder, "frames", killing)
    monkeypatch.setattr(thumbnails, "MOST_THREADS", 1)
    page = written(tmp_path / "page.html", [generated(row, "What?", "x") for row in (good, bad)])
    first, second = data_of(page)["items"]
    assert first[2] == 0
    assert (second[2], second[3].startswith("crashes its decoder")) == (-1, True), second
