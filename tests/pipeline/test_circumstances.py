"""Extractions under odd circumstances: files that may not be read, disks that go in the middle, clocks set back."""

from __future__ import annotations

import calendar
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from qvsplit.errors import ItemError, UsageError
from qvsplit.store import layout
from qvsplit.store.history import last_runs
from qvsplit.store.opening import open_store
from qvsplit.store.storage import LocalStorage
from tests.support.extracting import OLD, add, add_bad, by_path
from tests.support.fake_source import InThreadDecoders
from tests.support.processes import as_nobody

# ------------------------------------------------------------------------------------------------ what may be cured


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_is_tried_again_once_it_may_and_not_before(extract, some_photos):
    with tempfile.TemporaryDirectory() as temporary:
        photos, out = Path(temporary) / "photos", Path(temporary) / "store"
        extract(some_photos, out=Path(temporary) / "imports")  # nobody may not read the libraries
        shutil.copytree(some_photos, photos)
        for path in (Path(temporary), photos, *photos.iterdir()):
            shutil.chown(path, 65534, 65534)

        def nights() -> list:
            def night(**options) -> list[int]:
                ran = extract(photos, out=out, **options)
                return [ran.to_read, ran.unchanged, ran.failed, ran.failed_again, ran.failed_before, ran.encoded]

            (photos / "coins.png").chmod(0)
            counts = [night(), night(), night(retry_failed=True)]
            (photos / "coffee.png").chmod(0)  # known, and not read again
            counts.append(night(prune=True))
            (photos / "coins.png").chmod(0o400)
            counts += [night(), night()]
            photos.chmod(0)
            try:
                night(prune=True)
            except UsageError as error:
                counts.append(str(error))
            photos.chmod(0o755)
            return [*counts, night(prune=True)]

        assert as_nobody(nights) == [
            [4, 0, 1, 0, 0, 3],
            [0, 3, 0, 0, 1, 0],
            [1, 3, 0, 1, 0, 0],
            [0, 3, 0, 0, 1, 0],
            [1, 3, 0, 0, 0, 1],
            [0, 4, 0, 0, 0, 0],
            f"{photos} holds no images any more; its 4 rows are left as they are, in case it is not mounted (if they "
            "were deleted, `qvsplit purge` takes them out)",
            [0, 4, 0, 0, 0, 0],
        ]


def test_another_build_of_a_reader_tries_again_what_the_last_could_not_read(extract, some_photos, monkeypatch):
    add_bad(some_photos, "x.avif")
    readers = ["PIL 1"]
    monkeypatch.setattr("qvsplit.pipeline.view.optional_readers", lambda **_: tuple(readers))
    real = InThreadDecoders.decode

    def decode(decoders, entry, info, on_size):
        if entry.path == "x.avif":
            raise ItemError("is an AVIF file, for which this Pillow has no decoder", "reader-missing")
        return real(decoders, entry, info, on_size)

    monkeypatch.setattr(InThreadDecoders, "decode", decode)
    assert extract(some_photos).failed == 1
    assert extract(some_photos).to_read == 0
    for build in ("PIL 2", "PIL 1"):  # an older one is another one
        readers[:] = [build]
        assert extract(some_photos).failed_again == 1
        assert extract(some_photos).to_read == 0


def test_an_image_over_the_limit_of_pixels_is_tried_again_once_that_is_raised(extract, some_photos, out):
    large = add(some_photos, "large.png")
    Image.new("RGB", (2000, 2000)).save(large)
    os.utime(large, OLD)
    failed = extract(some_photos, max_image_pixels=3_999_999)
    (row,) = [row for row in open_store(out).rows if row.path == "large.png"]
    assert (failed.failed, row.error_kind) == (1, "memory")
    assert row.error == (
        "claims 2000×2000 pixels, over the limit of 3,999,999, as a decompression bomb would; `max_image_pixels` allows more"
    )
    assert extract(some_photos, max_image_pixels=3_999_999).to_read == 0
    assert extract(some_photos, max_image_pixels=3_000_000).to_read == 0
    assert extract(some_photos, max_image_pixels=4_000_000).re_encoded == 1
    assert [row.status for row in open_store(out).rows if row.path == "large.png"] == ["ok"]


# ------------------------------------------------------------------------------------------------- disks that go away


@pytest.mark.parametrize("how", ["empty", "removed"])
def test_a_disk_that_goes_between_listing_and_reading_costs_nothing(extract, tmp_path, out, monkeypatch, how):
    """Its place is empty then, or an automounter removes it."""
    disk = tmp_path / "photos" / "disk"
    add(tmp_path / "photos", "here.png")
    add(disk, "known.png", shift=3)
    extract(tmp_path / "photos")
    for number in range(3):
        add(disk, f"new-{number}.png", shift=5 + number)
    real, away, one_at_a_time = InThreadDecoders.read, tmp_path / "away", threading.Lock()

    def read(decoders, entry):
        with one_at_a_time:
            if not away.exists():
                disk.rename(away)
                if how == "empty":
                    disk.mkdir()
        return real(decoders, entry)

    with monkeypatch.context() as going:
        going.setattr(InThreadDecoders, "read", read)
        gone = extract(tmp_path / "photos", prune=True)
    assert (gone.disappeared, gone.failed, gone.deleted) == (3, 0, 0)
    assert by_path(out).keys() == {"here.png", "disk/known.png"}
    shutil.rmtree(disk, ignore_errors=True)
    away.rename(disk)
    healed = extract(tmp_path / "photos", prune=True)
    assert (healed.encoded, healed.unchanged, healed.deleted) == (3, 2, 0)


def test_a_disk_that_goes_between_the_walks_of_two_folders_is_not_pruned(extract, tmp_path, out, monkeypatch):
    photos = tmp_path / "photos"
    add(photos, "a/one.png")
    add(photos, "b/two.png", shift=3)
    extract(photos)
    from qvsplit.sources import folders

    real = folders.open_long_path

    def open_long_path(path, flags):
        if Path(path).name == "b" and (photos / "b").exists():
            (photos / "b").rename(tmp_path / "away")
        return real(path, flags)

    with monkeypatch.context() as going:
        going.setattr(folders, "open_long_path", open_long_path)
        gone = extract(photos, prune=True)
    assert (gone.deleted, by_path(out)["b/two.png"][0]) == (0, "ok")
    assert any(
        "cannot be read (No such file or directory): its items are left as they are" in one for one in gone.notes
    )
    (tmp_path / "away").rename(photos / "b")
    healed = extract(photos, prune=True)
    assert (healed.to_read, healed.unchanged) == (0, 2)
    shutil.rmtree(photos / "b")  # really deleted
    assert extract(photos, prune=True).deleted == 1


def test_a_disk_that_answers_no_more_fails_what_was_to_be_read_and_the_next_run_heals(
    extract, some_photos, monkeypatch
):
    def read(decoders, entry):
        raise ItemError("cannot be opened: Transport endpoint is not connected", "permission")

    with monkeypatch.context() as going:
        going.setattr(InThreadDecoders, "read", read)
        gone = extract(some_photos, prune=True)
    assert (gone.failed, gone.deleted) == (4, 0)
    assert gone.failures[0][1] == "cannot be opened: Transport endpoint is not connected"
    assert extract(some_photos).encoded == 4


# -------------------------------------------------------------------------------------------------------------- clocks


@pytest.fixture
def clock(monkeypatch):
    """What time.time() gives, moved by so many seconds."""
    by, real, real_ns = [0], time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + by[0])
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + by[0] * 10**9)
    return by


YEAR = 365 * 24 * 3600


@pytest.mark.parametrize(
    "moved", [-YEAR, YEAR, -55 * YEAR, 100 * YEAR], ids=["back", "ahead", "to the seventies", "far"]
)
def test_a_clock_that_was_set_changes_nothing(extract, some_photos, out, clock, moved):
    """The later run is the later one, by generation and in the history; nothing is read again."""
    extract(some_photos)
    clock[0] = moved
    assert extract(some_photos).to_read == 0
    add(some_photos, "coins.png", shift=9)  # modified, with an old time of its own
    later = extract(some_photos)
    assert (later.modified, later.seconds >= 0, min(later.stages.values()) >= 0) == (1, True, True)
    assert {row.path: row.generation for row in open_store(out).rows}["coins.png"] == 2
    runs = last_runs(LocalStorage(out))
    assert [run["encoded"] for run in runs] == [4, 1]
    began = [calendar.timegm(time.strptime(run["began"], "%Y-%m-%dT%H:%M:%SZ")) for run in runs]
    assert abs(began[1] - began[0] - moved) < 600
    assert extract(some_photos).to_read == 0


def test_a_clock_that_is_set_back_while_a_run_goes_on(extract, some_photos, out, clock):
    ran = extract(some_photos, on_item=lambda path: clock.__setitem__(0, clock[0] - YEAR))
    assert ran.encoded == 4 and ran.seconds >= 0
    assert json.loads((out / layout.HISTORY).read_text())["seconds"] >= 0


def test_files_from_the_future_are_read_once(extract, some_photos, clock):
    """With a clock that has lost its time all files are."""
    clock[0] = -20 * YEAR
    assert min(path.stat().st_mtime for path in some_photos.iterdir()) == OLD[0] > time.time()
    assert extract(some_photos).encoded == 4
    assert extract(some_photos).to_read == 0
