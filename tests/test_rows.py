"""The rows of all shards in one file: a cache that may be lost, stale or forged, and is never believed against a shard."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from qvsplit import rows, store
from qvsplit.album import Album, open_album, shards_in
from qvsplit.errors import AlbumDamaged
from qvsplit.extract import Settings, extract_pictures
from qvsplit.store import Shard


@pytest.fixture
def album(checkpoint, some_photos, photos, tmp_path):
    """A folder with an album of two shards."""
    out = tmp_path / "embeds"
    extract_pictures([some_photos], out=out, settings=Settings(model=str(checkpoint)))
    (some_photos / "more.png").write_bytes((photos / "page.png").read_bytes())
    (some_photos / "zz.png").write_text("this is no picture")
    extract_pictures([some_photos], out=out, settings=Settings())
    assert (out / rows.ROWS_FILE).exists()
    return out


def contents(album: Album) -> dict:
    return {row.key: (row, album.embeds(row).raw.tobytes() if row.status == "ok" else None) for row in album.rows}


def from_shards(folder) -> dict:
    return contents(Album([Shard(path) for path in shards_in(folder)]))


def test_opening_an_album_opens_no_shard(album, monkeypatch):
    expected = from_shards(album)
    read = []
    real = Shard._read_footer
    monkeypatch.setattr(Shard, "_read_footer", lambda self: (read.append(self.path.name), real(self))[1])
    opened = open_album(album)
    assert {row.key: row for row in opened.rows} == {key: row for key, (row, _) in expected.items()}
    assert read == []
    assert contents(opened) == expected
    assert sorted(read) == ["shard-000001.parquet", "shard-000002.parquet"]  # each once, for embeddings


def test_it_needs_no_pyarrow(album):
    code = "import sys, qvsplit; print(len(qvsplit.open_album(sys.argv[1])), 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(album)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "False"]


def spoil(folder, change) -> None:
    """Change the file's content, and head it with the right hash."""
    path = folder / rows.ROWS_FILE
    lines = path.read_bytes().partition(b"\n")[2].split(b"\n")
    name, _, content = lines[0].partition(b"\t")
    told = json.loads(content)
    change(told)
    payload = b"\n".join([name + b"\t" + json.dumps(told).encode(), *lines[1:]])
    path.write_bytes(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.pop("columns"),
        lambda told: told.pop("recipe"),
        lambda told: told["columns"].pop(),
        lambda told: told["columns"][0].pop(),
        lambda told: told["columns"].__setitem__(2, ["nonsense"] * 4),
        lambda told: told["columns"][1].__setitem__(0, "../../etc/passwd"),
        lambda told: told["columns"][11].__setitem__(0, 7),
        lambda told: told.update(hidden_size="wide"),
        lambda told: told.update(columns="none"),
    ],
)
def test_nonsense_in_it_is_passed_over(album, change):
    expected = from_shards(album)
    spoil(album, change)
    assert contents(open_album(album)) == expected


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe", b"0" * 64 + b"\n{}", b"[" * 100_000])
def test_so_is_what_is_no_such_file(album, data):
    expected = from_shards(album)
    (album / rows.ROWS_FILE).write_bytes(data)
    assert contents(open_album(album)) == expected


def test_rows_that_the_shard_does_not_have_are_found_out(album):
    def add_one(told):
        for column in told["columns"]:
            column.append(column[-1])
        told["columns"][1][-1] = "zebra.png"

    spoil(album, add_one)
    opened = open_album(album)
    with pytest.raises(AlbumDamaged, match="another number of rows"):
        opened.embeds(next(row for row in opened if row.path == "zebra.png"))


def test_another_width_is_found_out(album):
    spoil(album, lambda told: told.update(hidden_size=64))
    with pytest.raises(AlbumDamaged):
        contents(
            Album([shard for shard in rows.open_shards(shards_in(album)) if shard.path.name.endswith("1.parquet")])
        )


def test_a_shard_that_was_replaced_is_read_itself(album, checkpoint, some_photos, photos, tmp_path):
    """Under the same name: only its seal tells."""
    _, second = shards_in(album)
    extract_pictures([photos / "rocket.jpg"], out=tmp_path / "other", settings=Settings(model=str(checkpoint)))
    second.write_bytes(shards_in(tmp_path / "other")[0].read_bytes())
    assert "rocket.jpg" in [row.path for row in open_album(album)]
    assert contents(open_album(album)) == from_shards(album)


def test_a_shard_that_changes_after_the_album_was_opened(album):
    opened = open_album(album)
    row = next(row for row in opened if row.path == "more.png")
    first, second = shards_in(album)
    second.write_bytes(first.read_bytes())
    with pytest.raises(AlbumDamaged, match="no longer the shard"):
        opened.embeds(row)


def test_a_damaged_footer_is_noticed_on_opening(album):
    second = shards_in(album)[1]
    data = bytearray(second.read_bytes())
    data[-20] ^= 1
    second.write_bytes(data)
    with pytest.raises(AlbumDamaged):
        open_album(album)


def test_a_run_reads_only_shards_that_it_does_not_know(album, some_photos, photos, monkeypatch):
    (some_photos / "new.png").write_bytes((photos / "camera.png").read_bytes())
    opened = []
    real = rows.Shard
    monkeypatch.setattr(rows, "Shard", lambda path, *told: (opened.append(path.name), real(path, *told))[1])
    extract_pictures([some_photos], out=album, settings=Settings())
    assert opened == ["shard-000003.parquet"]
    assert contents(open_album(album)) == from_shards(album)


def test_forget_leaves_no_name_in_it(album, some_photos, run_cli):
    assert b"coffee.png" in (album / rows.ROWS_FILE).read_bytes()
    assert run_cli("forget", str(some_photos / "coffee.png"), "--embeds", album)[0] == 0
    assert not (album / rows.ROWS_FILE).exists()
    assert "coffee.png" not in [row.path for row in open_album(album)]


def test_where_it_cannot_be_written_nothing_is_lost(album, monkeypatch):
    (album / rows.ROWS_FILE).unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    rows.leave_rows(album, shards_in(album))
    assert not [name for name in album.iterdir() if name.name.startswith(rows.ROWS_FILE)]
    assert contents(open_album(album)) == from_shards(album)
