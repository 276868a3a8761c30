"""The catalogue: what it says of a store is what the shards say, whatever became of its file."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys

import pytest

from qvsplit.errors import ConfigError, StoreDamaged
from qvsplit.store import catalogue_file, layout
from qvsplit.store.catalogue import FolderTally
from qvsplit.store.catalogue_file import Noted, catalogue_of, known_catalogue, read_published
from qvsplit.store.opening import open_store, read_store
from qvsplit.store.row import ROW_FIELDS
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import shard_files
from qvsplit.store.storage import LocalStorage
from tests.support import fuzz, rows
from tests.support.memory_storage import MemoryStorage

PARTS = [rows.part("c.mp4", number, 2) for number in range(2)]
SHARDS = (
    [rows.item("a.png"), rows.item("x/b.png", 8), (rows.failed("zz.png", error="is bad"), None), *PARTS],
    [rows.item("more.png", taken_at="2024-01-02T03:04:05", media='{"format": "PNG"}'),
     (rows.row("copy.png", sha256=rows.sha("a.png"), has_features=False), None)],
    [rows.item("x/b.png", 10, generation=2, sha256=rows.sha("b again")), (rows.deleted("a.png", generation=2), None)],
)  # fmt: skip


def brought_up(storage, **more):
    return catalogue_of(storage, shard_files(storage), **more)


def known(storage):
    return known_catalogue(storage, shard_files(storage))


@pytest.fixture
def storage(tmp_path) -> LocalStorage:
    """A store with superseded rows, a copy, a clip in two parts, a failure and a deletion; and its catalogue."""
    storage = rows.write_store(tmp_path / "embeds", *SHARDS)
    brought_up(storage).close()
    assert (storage.folder / layout.CATALOGUE).exists()
    return storage


@pytest.fixture
def opened_shards(monkeypatch) -> list[str]:
    """The names of the shards that are opened from here on."""
    names: list[str] = []
    real = Shard._read_footer
    monkeypatch.setattr(Shard, "_read_footer", lambda self: (names.append(self.name), real(self))[1])
    return names


def from_shards(storage) -> dict:
    return rows.contents(read_store(storage))


# --------------------------------------------------------------------------------------------------- what it says


def test_it_says_what_the_shards_say(storage, opened_shards):
    opened = open_store(storage.folder)
    assert [(row.path, row.part, row.status) for row in opened.rows] == [
        ("a.png", 0, "deleted"), ("c.mp4", 0, "ok"), ("c.mp4", 1, "ok"), ("copy.png", 0, "ok"), ("more.png", 0, "ok"),
        ("x/b.png", 0, "ok"), ("zz.png", 0, "failed"),
    ]  # fmt: skip
    written = {(row.path, row.part, row.generation): row for shard in SHARDS for row, _ in shard}
    for row in opened.rows:
        assert row == written[row.path, row.part, row.generation]
        assert all(type(getattr(row, name)) is type(getattr(row, name)) for name in ROW_FIELDS)
    assert opened_shards == []
    assert rows.contents(opened) == from_shards(storage)


def test_opening_a_store_opens_no_shard_and_reading_features_opens_theirs(storage, opened_shards):
    opened = open_store(storage.folder)
    opened.features("copy.png")
    opened.features(opened["copy.png"])
    assert opened_shards == ["shard-000001.parquet"]  # where its content is, once


def test_it_needs_no_pyarrow(storage):
    code = (
        "import sys; from qvsplit.store.opening import open_store; "
        "print(len(open_store(sys.argv[1])), [m for m in ('pyarrow', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(storage.folder)], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout == "5 []\n"


def test_rows_are_found_by_item_by_folder_by_status_and_by_content(storage):
    one = known(storage)
    assert [row.part for row in one.rows_of("/photos", "c.mp4")] == [0, 1]
    assert one.rows_of("/photos", "none.png") == one.rows_of("/other", "c.mp4") == []
    assert [row.path for row in one.rows_in(lambda folder: folder == ("/photos", "x"))] == ["x/b.png"]
    assert len(list(one.rows_in(lambda folder: True))) == 7 and list(one.rows_in(lambda folder: False)) == []
    assert [row.path for row in one.rows_with_status("failed")] == ["zz.png"]
    assert [row.path for row in one.rows_named(lambda root, path: path.startswith("x/"))] == ["x/b.png"]
    assert [row.path for row in one.rows_showing((rows.sha("a.png"), 0))] == ["copy.png"]  # a.png is deleted
    assert one.rows_showing((rows.sha("a.png"), 1)) == []
    by_item = one.folder_rows(("/photos", ""))
    assert [(path, row.part, held) for (_, path), (row, held) in sorted(by_item.items())] == [
        ("a.png", 0, True), ("c.mp4", 0, True), ("copy.png", 0, True), ("more.png", 0, True), ("zz.png", 0, False),
    ]  # fmt: skip
    assert list(one.folder_rows(("/photos", "x"))) == [("/photos", "x/b.png")]
    assert one.folder_rows(("/photos", "y")) == one.folder_rows(("/other", "")) == {}
    assert (one.home((rows.sha("b again"), 0)), one.home((rows.sha("x/b.png"), 0))) == ((3, 0), (1, 1))
    assert one.home((rows.sha("nothing"), 0)) is None
    assert one.current_places(1) == {2: ("/photos", "zz.png"), 3: ("/photos", "c.mp4"), 4: ("/photos", "c.mp4")}
    assert (one.homes(1), one.homes(3)) == ({0, 1, 3, 4}, {0})


def test_it_counts(storage):
    one = known(storage)
    assert one.counts() == {"/photos": {"ok": 4, "failed": 1, "deleted": 1}}
    assert one.counts_by_folder() == {("/photos", ""): 5, ("/photos", "x"): 1}
    assert (one.ok, one.copies(), one.generation) == (5, 1, 2)
    assert one.item_counts() == {
        ("deleted", "image"): (1, 1), ("failed", "image"): (1, 1), ("ok", "image"): (3, 3), ("ok", "video"): (1, 2),
    }  # fmt: skip
    assert one.tokens() == sum(row.n_tokens for row in read_store(storage))
    assert [shard.rows for shard in one.shards] == [5, 2, 2]
    assert [shard.feature_tokens for shard in one.shards] == [6 + 8 + 6 + 6, 6, 10]


def test_features_that_went_with_a_shard_are_missed(storage):
    (storage.folder / "shard-000001.parquet").unlink()
    opened = open_store(storage.folder)
    assert [row.path for row in opened.catalogue.rows_without_features()] == ["copy.png"]
    assert rows.contents_without_features(opened) == rows.contents_without_features(read_store(storage))


@pytest.mark.parametrize("seed", range(12))
def test_the_order_in_which_shards_come_makes_no_difference(tmp_path, seed):
    """Shard after shard, in any order, some rewritten by compactions cut short: as if all were read at once."""
    random_ = random.Random(seed)
    pairs = [
        rows.part(f"{random_.choice('abc')}.mp4", random_.randrange(3), 3,
                  generation=random_.randrange(1, 4), sha256=rows.sha(random_.choice("uvwxyz")))
        for _ in range(40)
    ]  # fmt: skip
    pairs = list({(row.path, row.part, row.generation): (row, features) for row, features in pairs}.values())
    storage = rows.write_store(tmp_path, *(pairs[start : start + 7] for start in range(0, len(pairs), 7)))
    files = shard_files(storage)
    random_.shuffle(files)
    for number in range(1, len(files) + 1):
        catalogue_of(storage, sorted(files[:number])).close()
    expected = read_store(storage)
    opened = open_store(storage.folder)
    assert opened.rows == expected.rows and opened.rows
    assert rows.contents(opened) == rows.contents(expected)
    generations = {}
    for row, _ in pairs:
        generations[row.path] = max(generations.get(row.path, 0), row.generation)
    assert {(row.path, row.part) for row in opened.rows} == {
        (row.path, row.part) for row, _ in pairs if row.generation == generations[row.path]
    }


# --------------------------------------------------------------------------------------- shards that it does not know


def test_only_shards_that_it_does_not_know_are_opened(storage, opened_shards):
    rows.write_shard(storage, "shard-000004.parquet", [rows.item("new.png")])
    opened_shards.clear()
    assert "new.png" in open_store(storage.folder)
    assert opened_shards == ["shard-000004.parquet"]
    opened_shards.clear()
    assert "new.png" in open_store(storage.folder)
    assert opened_shards == []  # the reader before has noted it
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)


def test_a_copied_store_is_known_by_the_checksums_of_its_footers(storage, tmp_path, opened_shards):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", storage.folder, copy], check=True)
    assert known(LocalStorage(copy)) is None
    assert len(open_store(copy)) == 5 and opened_shards == []


def test_a_shard_that_was_replaced_is_read_itself(storage):
    """Under the same name."""
    rows.write_shard(storage, "shard-000002.parquet", [rows.item("rocket.jpg")])
    assert "rocket.jpg" in open_store(storage.folder) and "more.png" not in open_store(storage.folder)
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)


def test_rows_that_a_removed_shard_superseded_are_current_again(storage):
    (storage.folder / "shard-000003.parquet").unlink()
    opened = open_store(storage.folder)
    assert opened["a.png"].status == "ok" and opened["x/b.png"].n_tokens == 8
    assert rows.contents(opened) == from_shards(storage)


def test_a_shard_whose_rows_no_longer_count_goes_without_a_look_at_the_others(storage, opened_shards):
    repeated = [pair for shard in SHARDS for pair in shard]
    rows.write_shard(storage, "shard-000004.parquet", repeated)
    brought_up(storage).close()
    for number in (1, 2, 3):
        (storage.folder / layout.shard_name(number)).unlink()
    opened_shards.clear()
    assert len(open_store(storage.folder)) == 5 and opened_shards == []
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)


def test_a_shard_that_changes_after_the_store_was_opened(storage):
    opened = open_store(storage.folder)
    row = opened["more.png"]
    first, second = (storage.folder / layout.shard_name(number) for number in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(StoreDamaged, match="no longer the shard"):
        opened.features(row)


def test_a_damaged_footer_is_noticed_on_opening(storage):
    second = storage.folder / "shard-000002.parquet"
    data = bytearray(second.read_bytes())
    data[-20] ^= 1
    second.write_bytes(data)
    with pytest.raises(StoreDamaged):
        open_store(storage.folder)


def test_a_damaged_shard_is_left_out_and_told_where_that_is_asked_for(storage):
    (storage.folder / "shard-000002.parquet").write_bytes(b"PAR1 no longer")
    told = {}
    one = brought_up(storage, on_damaged=lambda name, error: told.update({name: error.what}))
    assert list(told) == ["shard-000002.parquet"] and [shard.number for shard in one.shards] == [1, 3]


@pytest.mark.parametrize("name", fuzz.NEWER)
def test_a_shard_that_a_newer_version_wrote_is_not_hidden_by_it(storage, name):
    (storage.folder / "shard-000004.parquet").write_bytes(fuzz.written(fuzz.NEWER[name]()))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"shard-000004\.parquet.*made by a newer qvsplit"):
            open_store(storage.folder)


def test_a_name_that_only_looks_like_a_shards_is_none(storage):
    (storage.folder / "shard-0000001.parquet").write_bytes(b"seven digits where six would do")
    assert [number for number, _ in shard_files(storage)] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------ folders, cures


def test_tallies_stay_until_a_shard_with_rows_of_their_folder_comes(storage):
    tallies = {("/photos", ""): FolderTally("d", 3, 1, 0), ("/photos", "x"): FolderTally("e", 1, 0, 0)}
    brought_up(storage, noted=Noted(tallies, {"readers": ["heif"]})).close()
    one = known(storage)
    assert (one.tallies, one.cures, one.unsettled) == (tallies, {"readers": ["heif"]}, frozenset())
    rows.write_shard(storage, "shard-000004.parquet", [rows.item("x/new.png")])
    one = brought_up(storage)
    assert one.tallies == {("/photos", ""): tallies["/photos", ""]} and one.unsettled == {("/photos", "x")}
    brought_up(storage, noted=Noted({}, {})).close()
    assert known(storage).tallies == {} and known(storage).unsettled == {("/photos", ""), ("/photos", "x")}


def test_a_folder_whose_files_are_all_deleted_is_settled(storage):
    rows.write_shard(storage, "shard-000004.parquet", [(rows.deleted("x/b.png", generation=3), None)])
    brought_up(storage, noted=Noted({("/photos", ""): FolderTally("d", 4, 1, 0)}, {})).close()
    assert known(storage).unsettled == frozenset()


def test_without_its_file_nothing_is_known_of_folders(storage):
    brought_up(storage, noted=Noted({("/photos", ""): FolderTally("d", 4, 1, 0)}, {"readers": []})).close()
    (storage.folder / layout.CATALOGUE).unlink()
    one = brought_up(storage)
    assert one.tallies == {} and one.cures == {} and len(one.unsettled) == 2


# ---------------------------------------------------------------------------------------------------- its file


@pytest.mark.parametrize("what", ["emptied", "cut", "trailer", "longer", "text", "a folder", "a pipe", "unreadable"])
def test_a_file_that_is_not_what_was_written_counts_as_none(storage, what):
    expected, path = from_shards(storage), storage.folder / layout.CATALOGUE
    data = path.read_bytes()
    spoilt = {"emptied": b"", "cut": data[: len(data) // 2], "trailer": data[:-1] + bytes([data[-1] ^ 1]),
              "longer": data + b"\0", "text": b"{}"}.get(what)  # fmt: skip
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "unreadable":
        path.symlink_to(path)
    else:
        path.write_bytes(spoilt)
    assert read_published(storage) is None
    assert rows.contents(open_store(storage.folder)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_byte_is_found_out(storage, seed):
    path = storage.folder / layout.CATALOGUE
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << seed % 8
    path.write_bytes(data)
    assert read_published(storage) is None


def forged(storage, *statements: str) -> None:
    """Change the file as somebody would who knows how it is made."""
    path = storage.folder / layout.CATALOGUE
    pages = path.read_bytes()[: -catalogue_file._TRAILER_BYTES]
    staged = storage.folder / layout.STAGING / "forged"
    staged.write_bytes(pages)
    with sqlite3.connect(staged) as database:
        for statement in statements:
            database.execute(statement)
    database.close()
    catalogue_file._publish(storage, staged)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE facts SET value = 1 WHERE name = 'version'",
        "DROP TABLE contents",
        "CREATE VIEW more AS SELECT * FROM rows",
        "CREATE TRIGGER t AFTER INSERT ON facts BEGIN DELETE FROM facts; END",
        "UPDATE schemas SET content = '{}'",
        "UPDATE schemas SET content = 'no JSON'",
        "UPDATE shards SET schema = 77",
        "INSERT INTO facts VALUES('cures', 'no JSON')",
    ],
)
def test_tables_of_another_kind_count_as_none(storage, statement):
    expected = from_shards(storage)
    forged(storage, statement)
    assert read_published(storage) is None
    assert rows.contents(open_store(storage.folder)) == expected


@pytest.mark.parametrize(
    "change",
    ["path = '../../etc/passwd' WHERE path = 'more.png'", "n_tokens = 7", "status = 'skipped'", "kind = 'sculpture'",
     "size = NULL", "sha256 = x'00'", "placeholder = 999", "grid_thw = placeholder"],
)  # fmt: skip
def test_rows_that_no_writer_writes_are_refused(storage, change):
    forged(storage, f"UPDATE rows SET {change}")
    with pytest.raises(StoreDamaged, match=r"catalogue\.sqlite is not what qvsplit wrote .*remove that file"):
        rows.contents(open_store(storage.folder))


@pytest.mark.parametrize("change", ["row = 0", "row = 1000", "shard = 2", "row = -1"])
def test_features_are_those_of_the_content_whatever_it_says(storage, change):
    forged(storage, f"UPDATE contents SET {change} WHERE shard = 1 AND row = 4")
    opened = open_store(storage.folder)
    with pytest.raises(StoreDamaged):
        opened.features(opened.rows[2])


def test_what_was_purged_while_a_reader_made_it_is_not_published(storage):
    (storage.folder / layout.CATALOGUE).unlink()
    gone = storage.folder / "shard-000003.parquet"
    one = brought_up(storage, on_shard=lambda done, total: gone.unlink(missing_ok=True) if done == total else None)
    assert [shard.number for shard in one.shards] == [1, 2, 3]
    assert not (storage.folder / layout.CATALOGUE).exists() and storage.list(layout.STAGING) == []


def test_where_it_cannot_be_written_nothing_is_lost(storage, monkeypatch):
    (storage.folder / layout.CATALOGUE).unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", full)
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)
    assert not (storage.folder / layout.CATALOGUE).exists() and storage.list(layout.STAGING) == []


def test_a_full_disk_while_it_is_made_is_no_reason_to_stop(storage, monkeypatch):
    (storage.folder / layout.CATALOGUE).unlink()
    real = catalogue_file._empty

    def small(staged):
        connection = real(staged)
        if staged is not None:
            connection.execute("PRAGMA max_page_count = 4")  # SQLite says "database or disk is full"
        return connection

    monkeypatch.setattr(catalogue_file, "_empty", small)
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)
    assert storage.list(layout.STAGING) == []


def test_a_reader_makes_no_folder_in_a_store(tmp_path):
    """They would belong to whoever reads, and be in the way of whoever writes."""
    storage = rows.write_store(tmp_path / "embeds", *SHARDS)
    names = ("embeds", "copy")
    (tmp_path / "copy").mkdir()
    for _, file in shard_files(storage):
        (tmp_path / "copy" / file.name).write_bytes((storage.folder / file.name).read_bytes())
    found = [rows.contents(open_store(tmp_path / name)) for name in names]
    assert found[0] == found[1]
    assert sorted(os.listdir(tmp_path / "copy")) == [layout.shard_name(number) for number in (1, 2, 3)]


def test_a_store_that_may_not_be_written_is_read_without_its_file(storage, monkeypatch):
    (storage.folder / layout.CATALOGUE).unlink()
    monkeypatch.setattr("os.access", lambda *_: False)  # this may be root, to whom nothing is forbidden
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)
    assert not (storage.folder / layout.CATALOGUE).exists()


def test_a_store_that_is_not_on_a_local_disk_is_read_without_its_file():
    storage = rows.write_store(MemoryStorage(), *SHARDS)
    assert rows.contents(read_store(storage)) and brought_up(storage).ok == 5
    assert not any(name.endswith(".sqlite") for name in storage.files)


def test_many_shards_are_counted_while_they_are_read(storage):
    (storage.folder / layout.CATALOGUE).unlink()
    heard = []
    open_store(storage.folder, on_shard=lambda done, total: heard.append((done, total)))
    assert heard == [(0, 3), (1, 3), (2, 3), (3, 3)]
    heard.clear()
    open_store(storage.folder, on_shard=lambda done, total: heard.append((done, total)))
    assert heard == []


def test_a_store_that_is_closed_while_threads_ask_ends_them_with_an_error_and_no_more(tmp_path):
    """As when a run ends early: SQLite itself would take the process down. In a process of its own, for that reason."""
    rows.write_store(tmp_path, *SHARDS)
    code = (
        "import sys, threading\n"
        "from qvsplit.store.opening import open_store\n"
        "ended = []\n"
        "def ask(store):\n"
        "    try:\n"
        "        while True:\n"
        "            store.holds(('0' * 64, 0)), store.rows\n"
        "    except Exception as error:\n"
        "        ended.append(str(error))\n"
        "for _ in range(40):\n"
        "    store = open_store(sys.argv[1])\n"
        "    threads = [threading.Thread(target=ask, args=(store,)) for _ in range(4)]\n"
        "    [one.start() for one in threads]\n"
        "    store.close()\n"
        "    [one.join() for one in threads]\n"
        "print(len(ended), set(ended))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "160 {'Cannot operate on a closed database.'}\n"), done.stderr


def test_a_copy_of_several_parts_is_one_copy(tmp_path):
    clip = rows.parts("c.mp4", 3)
    storage = rows.write_store(tmp_path, [*clip, *rows.without_features(clip, path="copy.mp4")])
    assert brought_up(storage).copies() == 1


def test_a_catalogue_of_before_there_were_parts_is_made_anew(storage, opened_shards):
    path = storage.folder / layout.CATALOGUE
    forged(storage, "ALTER TABLE contents DROP COLUMN last", "UPDATE facts SET value = 1 WHERE name = 'version'")
    assert read_published(storage) is None
    opened = open_store(storage.folder)
    assert len(opened_shards) == 3 and opened.holds((rows.sha("c.mp4"), 0))
    assert path.exists()
