"""Living with a store: what a run does and does not do, damage, rebuilds, and what compact and purge leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image

from qvsplit.errors import ConfigError, ShardDamaged, StoreDamaged, UsageError
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.images import IMAGE_POLICY
from qvsplit.store import layout
from qvsplit.store.catalogue_file import known_catalogue
from qvsplit.store.history import last_runs
from qvsplit.store.opening import open_store
from qvsplit.store.repair import damage_marks
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import shard_files
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.clips import make_clip
from tests.support.extracting import LATER, OLD, add, add_bad, contents, extractor, flip, shards, state
from tests.support.fake_source import InThreadDecoders
from tests.support.processes import run_process

# ------------------------------------------------------------------------------------------------------ incremental


def test_every_change_is_counted_apart(extract, some_photos):
    add_bad(some_photos, "bad.png")
    first = extract(some_photos)
    assert (first.new, first.encoded, first.failed) == (4, 4, 1)
    add(some_photos, "new.png", "coffee.png")
    add(some_photos, "chelsea.png")  # modified
    os.rename(some_photos / "coffee.png", some_photos / "renamed.png")
    shutil.copy2(some_photos / "coins.png", some_photos / "copy.png")
    os.utime(some_photos / "coins.png", LATER)
    (some_photos / "rocket.jpg").unlink()
    second = extract(some_photos, prune=True)
    counts = {name: getattr(second, name) for name in
              ("found", "new", "modified", "moved", "copied", "metadata_changed", "deleted", "unchanged", "failed",
               "failed_before", "encoded", "re_encoded", "remaining", "not_found")}  # fmt: skip
    assert counts == {
        "found": 6, "new": 1, "modified": 1, "moved": 1, "copied": 1, "metadata_changed": 1, "deleted": 1,
        "unchanged": 0, "failed": 0, "failed_before": 1, "encoded": 2, "re_encoded": 0, "remaining": 0, "not_found": 0,
    }  # fmt: skip
    again = extract(some_photos, prune=True)
    assert (again.unchanged, again.failed_before, again.to_read, again.shards) == (5, 1, 0, 0)


def test_nothing_to_do_writes_nothing_and_imports_nothing_heavy(extract, some_photos, out):
    add_bad(some_photos, "bad.png")
    extract(some_photos)
    before = state(out)
    code = (
        "import sys\nfrom qvsplit.cli import main\n"
        f"sys.argv = ['qvsplit', 'extract', {str(some_photos)!r}, '--out', {str(out)!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert state(out) == before


def test_a_new_image_opens_no_shard_that_is_known(extract, some_photos, out, monkeypatch):
    extract(some_photos)
    add(some_photos, "second.png")
    extract(some_photos)
    opened = []
    real = Shard._read_footer
    monkeypatch.setattr(Shard, "_read_footer", lambda self: (opened.append(self.name), real(self))[1])
    add(some_photos, "third.png", shift=20)
    shutil.copy2(some_photos / "third.png", some_photos / "copy.png")
    (some_photos / "second.png").unlink()
    done = extract(some_photos, prune=True)
    assert (done.new, done.copied, done.deleted, done.unchanged) == (1, 1, 1, 4)
    assert opened == ["shard-000003.parquet"]  # its own, for the catalogue
    opened.clear()
    assert extract(some_photos, prune=True).to_read == 0 and opened == []


@pytest.mark.parametrize("spoil", ["lost", "flipped", "of other shards"])
def test_the_catalogue_is_only_a_cache(extract, some_photos, out, spoil):
    extract(some_photos)
    index, storage = out / layout.CATALOGUE, LocalStorage(out)
    if spoil == "lost":
        index.unlink()
    elif spoil == "flipped":
        data = bytearray(index.read_bytes())
        data[-40] ^= 1
        index.write_bytes(data)
    else:
        kept = index.read_bytes()
        (some_photos / "coins.png").unlink()
        add(some_photos, "coins.png", "coffee.png")
        extract(some_photos)
        index.write_bytes(kept)
    assert known_catalogue(storage, shard_files(storage)) is None
    again = extract(some_photos)
    assert (again.unchanged, again.to_read, again.shards) == (4, 0, 0)
    assert known_catalogue(storage, shard_files(storage)).tallies


def test_the_index_does_not_hide_what_changed(extract, some_photos):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        add(some_photos, name, shift=ord(name[2]))
    extract(some_photos)
    assert extract(some_photos).to_read == 0
    shutil.rmtree(some_photos / "b")  # a whole folder
    (some_photos / "a" / "1.png").unlink()
    missing = extract(some_photos)
    assert (missing.to_read, missing.not_found, missing.shards) == (0, 2, 0)
    assert extract(some_photos).not_found == 2  # from the index
    add(some_photos, "c/moved.png", shift=ord("3"))  # b/3.png under another name
    moved = extract(some_photos)
    assert (moved.moved, moved.encoded, moved.not_found) == (1, 0, 1)
    assert extract(some_photos, prune=True).deleted == 1
    assert extract(some_photos, prune=True).to_read == extract(some_photos).not_found == 0


def test_a_folder_that_vanishes_as_a_whole_is_noticed(extract, some_photos):
    add(some_photos, "b/3.png")
    extract(some_photos)
    shutil.rmtree(some_photos / "b")
    assert extract(some_photos).not_found == 1


def test_an_edit_that_keeps_size_and_time_is_found_by_checksum(extract, some_photos):
    bitmap = some_photos / "a.bmp"
    for colour in ("red", "blue"):
        Image.new("RGB", (60, 60), colour).save(bitmap)
        os.utime(bitmap, OLD)
        if colour == "red":
            extract(some_photos)
    assert extract(some_photos).to_read == 0
    reread = extract(some_photos, checksum=True)
    assert (reread.modified, reread.metadata_changed, reread.shards) == (1, 4, 1)
    assert extract(some_photos, checksum=True).shards == 0


def test_a_file_dated_in_the_future_is_not_read_again_for_ever(extract, some_photos):
    os.utime(some_photos / "coins.png", (2_500_000_000, 2_500_000_000))
    extract(some_photos)
    assert extract(some_photos).to_read == 0


def test_a_file_that_was_just_written_is_read_again(extract, some_photos):
    """It may change within its timestamp's resolution."""
    os.utime(some_photos / "coins.png")
    extract(some_photos)
    again = extract(some_photos)
    assert (again.to_read, again.metadata_changed, again.shards) == (1, 1, 0)


def test_a_time_beyond_64_bits(extract, some_photos):
    try:
        os.utime(some_photos / "coins.png", (15_000_000_000, 15_000_000_000))
    except OSError:
        pytest.skip("this file system does not keep such times")
    assert extract(some_photos).new == 4
    assert extract(some_photos).to_read == 0


def test_an_image_has_one_name_however_it_was_come_by(extract, some_photos, out):
    add(some_photos, "deep/x.png", "coffee.png")
    extract(some_photos)
    for paths in ([some_photos / "deep"], [some_photos / "coins.png"], [some_photos / "deep" / "x.png", some_photos]):
        ran = extract(*paths)
        assert (ran.to_read, ran.encoded, ran.copied) == (0, 0, 0)
    assert {row.root for row in open_store(out).rows} == {str(some_photos)}
    add(some_photos, "other/y.png")
    shutil.rmtree(out)
    extract(some_photos / "deep")
    extract(some_photos)
    assert {row.root for row in open_store(out).rows} == {str(some_photos), str(some_photos / "deep")}
    assert len(open_store(out).rows) == 6
    below = extract(some_photos / "deep", prune=True)  # what lies outside it is none of its business
    assert (below.deleted, below.not_found) == (0, 0)


def test_a_file_named_one_by_one_is_not_deleted_by_the_walk(extract, some_photos):
    odd = some_photos / "x.dat"
    shutil.copy2(some_photos / "coins.png", odd)
    os.utime(odd, OLD)
    extract(some_photos)
    extract(odd)
    for _ in range(2):
        ran = extract(some_photos)
        assert (ran.to_read, ran.unchanged, ran.found) == (0, 5, 5)
    shutil.copy(some_photos / "rocket.jpg", odd)
    os.utime(odd, OLD)
    assert extract(some_photos).copied == 1
    odd.unlink()
    assert extract(some_photos, prune=True).deleted == 1


def test_an_image_met_under_a_links_name_is_not_stale_under_its_own(extract, some_photos, tmp_path, out):
    add(tmp_path / "b", "x.png")
    (some_photos / "link").symlink_to(tmp_path / "b")
    extract(some_photos)
    extract(tmp_path / "b")
    add(tmp_path / "b", "x.png", "coffee.png")
    ran = extract(some_photos, tmp_path / "b")
    assert (ran.modified, ran.copied, ran.not_found) == (1, 1, 0)
    assert extract(some_photos, tmp_path / "b").to_read == 0
    hashes = {row.key: row.sha256 for row in open_store(out).rows}
    assert hashes[str(tmp_path / "b"), "x.png"] == hashes[str(some_photos), "link/x.png"]


def test_a_file_deleted_before_it_is_read_is_no_failure(extract, some_photos, monkeypatch):
    real = InThreadDecoders.read

    def read(decoders, entry):
        (some_photos / "coins.png").unlink(missing_ok=True)
        return real(decoders, entry)

    monkeypatch.setattr(InThreadDecoders, "read", read)
    ran = extract(some_photos, workers=1)
    assert (ran.new, ran.disappeared, ran.failed, ran.failures) == (3, 1, 0, [])


def test_a_path_in_which_nothing_is_left_may_not_be_mounted(extract, some_photos, tmp_path, out):
    extract(some_photos)
    kept = contents(out)
    os.rename(some_photos, tmp_path / "unmounted")
    some_photos.mkdir()
    for options in ({}, {"prune": True}, {}, {"checksum": True}):  # every night, not the first alone
        with pytest.raises(UsageError, match="4 rows are left as they are, in case it is not mounted"):
            extract(some_photos, **options)
    add(tmp_path / "other", "a.png")
    for _ in range(2):
        both = extract(some_photos, tmp_path / "other", prune=True)
        assert (both.deleted, len(both.notes)) == (0, 1)
    some_photos.rmdir()
    os.rename(tmp_path / "unmounted", some_photos)
    assert extract(some_photos, prune=True).to_read == 0
    assert {key: held for key, held in contents(out).items() if key in kept} == kept


def test_nor_may_a_folder_below_it(extract, some_photos, tmp_path):
    for name in ("disk/a/1.png", "disk/2.png", "plain/3.png"):
        add(some_photos, name, shift=ord(name[-5]))
    extract(some_photos)
    os.rename(some_photos / "disk", tmp_path / "unmounted")
    (some_photos / "disk").mkdir()
    shutil.rmtree(some_photos / "plain")
    for _ in range(2):
        pruned = extract(some_photos, prune=True)
        assert "disk is empty: the 2 items that were below it are not marked deleted" in pruned.notes[0]
    assert pruned.not_found == 2
    (some_photos / "disk").rmdir()
    assert extract(some_photos, prune=True).deleted == 2


# ----------------------------------------------------------------------------------------------------------- limits


def test_limit_and_max_runtime_leave_the_rest_for_the_next_run(extract, some_photos):
    first = extract(some_photos, limit=1)
    assert (first.new, first.remaining, first.stopped) == (1, 3, "limit")
    second = extract(some_photos, max_runtime=0.0)
    assert (second.new, second.remaining, second.stopped) == (0, 3, "max-runtime")
    third = extract(some_photos)
    assert (third.new, third.remaining, third.stopped, third.unchanged) == (3, 0, "", 1)


def test_a_time_that_passes_with_nothing_left_stops_nothing(extract, some_photos):
    extract(some_photos)
    (some_photos / "coins.png").unlink()
    ran = extract(some_photos, max_runtime=0.0, prune=True)
    assert (ran.stopped, ran.deleted) == ("", 1)


def test_a_run_that_was_stopped_prunes_nothing(extract, some_photos):
    """What it has not read may be what has moved."""
    extract(some_photos)
    os.rename(some_photos / "coins.png", some_photos / "moved.png")
    add(some_photos, "a.png")
    stopped = extract(some_photos, limit=1, prune=True)
    assert (stopped.new, stopped.deleted, stopped.not_found) == (1, 0, 1)
    rest = extract(some_photos, prune=True)
    assert (rest.moved, rest.deleted, rest.not_found) == (1, 0, 0)


def test_what_failed_is_tried_again_behind_what_is_new(extract, some_photos):
    add_bad(some_photos, "a.png", "b.png")
    extract(some_photos)
    add(some_photos, "z.png")
    assert extract(some_photos, retry_failed=True, limit=1).new == 1


# -------------------------------------------------------------------------------------------- several tensors


def test_a_store_of_several_tensors_lives_as_any_other(family_checkpoint, some_photos, out, run_cli):
    """Extracted, changed, compacted, made again, verified and purged: every tensor is what it was, or gone."""
    extract = extractor(str(family_checkpoint("qwen3_vl")), out)

    def held() -> dict[str, dict[str, bytes]]:
        with open_store(out) as store:
            return {row.path: rows.raws(store.features(row)) for row in store}

    assert extract(some_photos, kernels="reference").new == 4  # whose bits do not depend on what else is in a batch
    first = held()
    assert {tuple(one) for one in first.values()} == {("pooler_output", "deepstack_features_0", "deepstack_features_1")}
    assert all(len(set(one.values())) == 3 for one in first.values())

    shutil.copy2(some_photos / "coins.png", some_photos / "copy.png")
    add(some_photos, "chelsea.png", "coffee.png", shift=33)
    (some_photos / "rocket.jpg").unlink()
    second = extract(some_photos, prune=True)
    assert (second.copied, second.modified, second.deleted, second.encoded) == (1, 1, 1, 1)
    changed = held()
    assert changed == {
        "coffee.png": first["coffee.png"], "coins.png": first["coins.png"], "copy.png": first["coins.png"],
        "chelsea.png": changed["chelsea.png"],
    }  # fmt: skip
    assert all(changed["chelsea.png"][name] != value for name, value in first["chelsea.png"].items())

    assert run_cli("compact", out)[0] == 0
    assert len(shards(out)) == 1 and held() == changed
    blobs = pq.read_table(shards(out)[0]).column("deepstack_features_1").to_pylist()
    assert len([blob for blob in blobs if blob is not None]) == 3  # of the copy none, nor what was superseded
    assert extract(some_photos, rebuild=True, prune=True).encoded == 3
    assert held() == changed
    code, said, _ = run_cli("verify", out, "--sample", 4)
    assert (code, said.count("no damage"), said.count(": same bits, same tokens")) == (0, 1, 4)

    assert run_cli("purge", "chelsea.png", "coins.png", "--embeds", out)[0] == 0
    assert held() == {name: changed[name] for name in ("coffee.png", "copy.png")}
    blobs = pq.read_table(shards(out)[0]).column("deepstack_features_1").to_pylist()
    assert len([blob for blob in blobs if blob is not None]) == 2
    (damaged,) = shards(out)
    flip(damaged, 0.9)
    assert run_cli("verify", out)[0] == 6
    # what was purged is still there, and encoded again as well; what is damaged says nothing of kernels
    extract(some_photos, kernels="reference")
    assert held() == changed


# -------------------------------------------------------------------------------------------------- compact, purge


@pytest.fixture
def lived_in(extract, some_photos, out):
    """A store of seven shards, with superseded rows, a copy, a move and an image that was deleted."""
    for number in range(4):
        add(some_photos, f"n{number}.png", shift=20 * number)
        extract(some_photos)
    os.rename(some_photos / "coffee.png", some_photos / "moved.png")
    extract(some_photos)
    add(some_photos, "chelsea.png", "coffee.png", shift=33)
    shutil.copy2(some_photos / "n1.png", some_photos / "copy.png")
    extract(some_photos)
    (some_photos / "n2.png").unlink()
    extract(some_photos, prune=True)
    assert len(shards(out)) == 7
    return out


def test_compact_changes_nothing_but_shards(lived_in, extract, some_photos, run_cli):
    before, rows = contents(lived_in), sum(len(shard.rows) for shard in open_store(lived_in).shards)
    code, _, said = run_cli("compact", lived_in)
    assert code == 0
    assert "7 → 1 shard" in said
    store = open_store(lived_in)
    assert contents(lived_in) == before
    assert sum(len(shard.rows) for shard in store.shards) == len(before) < rows
    held = [row.sha256 for row in store.shards[0].rows if row.has_features]
    assert len(held) == len(set(held)) == 7  # neither the modified nor the deleted image's
    assert extract(some_photos).to_read == 0
    kept = state(lived_in)
    code, printed, _ = run_cli("compact", lived_in, "--json")
    assert (code, json.loads(printed)["rows_dropped"]) == (0, 0)
    assert state(lived_in) == kept


def test_compact_keeps_what_only_an_older_row_of_another_name_holds(extract, some_photos, out, run_cli):
    """The copy stands in a shard before that of its features, whose own name shows something else by now."""
    shutil.copy2(some_photos / "coins.png", some_photos / "z.png")
    extract(some_photos / "coins.png")
    extract(some_photos)
    shards(out)[0].unlink()
    extract(some_photos / "coins.png")  # encoded again: its home comes behind z.png's row
    add(some_photos, "coins.png")
    extract(some_photos)
    before = contents(out)
    assert run_cli("compact", out)[0] == 0
    assert len(shards(out)) == 1
    assert contents(out) == before


def test_purge_leaves_no_row_and_no_byte(lived_in, some_photos, run_cli, monkeypatch):
    before = contents(lived_in)
    store = open_store(lived_in)
    (moved,) = [row for row in store.rows if row.path == "moved.png"]
    home = store.home(moved.content)
    assert home.path == "coffee.png"  # under its old name the bytes lie in the first shard
    raw = store.features(moved).tensors["pooler_output"].raw.tobytes()
    monkeypatch.chdir(some_photos)
    code, _, said = run_cli("purge", "moved.png", "--embeds", lived_in)
    assert code == 0
    assert "1 item purged" in said
    assert "the file still exists" in said
    after = open_store(lived_in)
    assert not [row for shard in after.shards for row in shard.rows if row.sha256 == moved.sha256]
    assert not [row for shard in after.shards for row in shard.rows if row.path in {"moved.png", "coffee.png"}]
    assert raw not in [held for _, _, held in contents(lived_in).values()]
    deleted = {key for key in before if key[1] in {"moved.png", "coffee.png"}}
    assert contents(lived_in) == {key: held for key, held in before.items() if key not in deleted}


def test_purge_of_no_name_and_of_one_that_two_roots_have(extract, some_photos, tmp_path, out, run_cli):
    add(tmp_path / "other", "coins.png")
    extract(some_photos, tmp_path / "other")
    for name, expected in (("", "empty name"), (" ", "empty name"), ("coins.png", "more than one root")):
        code, _, line = run_cli("purge", name, "--embeds", out)
        assert (code, expected in line) == (2, True), line
    assert len(open_store(out)) == 5


def test_purge_reaches_what_is_half_rebuilt_or_quarantined(extract, some_photos, out, run_cli):
    extract(some_photos)
    extract(some_photos, rebuild=True, limit=2)
    _flip_features(shards(out)[0])
    assert run_cli("verify", out)[0] == 6
    extract(some_photos)
    assert list((out / layout.QUARANTINE).iterdir())
    code, _, said = run_cli("purge", some_photos / "chelsea.png", "--embeds", out)
    assert code == 0
    assert "unfinished rebuild" in said
    assert not (out / layout.REBUILD).exists()
    own = {name for name in state(out) if not name.startswith("shard-")}
    assert {os.path.dirname(name) for name in own} == {".qvsplit", ".qvsplit/generations"}
    assert {os.path.basename(name) for name in own if name.count("/") == 1} == {
        "lock",
        "history.jsonl",
        "catalogue.sqlite",
        "walked.json",
    }
    assert b"chelsea" not in (out / layout.CATALOGUE).read_bytes()


def test_purge_keeps_what_another_image_shows(lived_in, some_photos, run_cli):
    before = contents(lived_in)
    code, _, said = run_cli("purge", some_photos / "n1.png", "--embeds", lived_in)
    assert code == 0
    assert "features kept" in said
    after = contents(lived_in)
    assert before.keys() - after.keys() == {(str(some_photos), "n1.png")}
    assert after[str(some_photos), "copy.png"] == before[str(some_photos), "copy.png"]


def test_purge_a_root_after_the_photos_have_moved(extract, some_photos, tmp_path, out, run_cli):
    extract(some_photos)
    before = {key[1]: held for key, held in contents(out).items()}
    os.rename(some_photos, tmp_path / "elsewhere")
    moved = extract(tmp_path / "elsewhere")
    assert (moved.copied, moved.encoded) == (4, 0)
    assert run_cli("purge", some_photos, "--embeds", out)[0] == 0
    after = contents(out)
    assert {key[0] for key in after} == {str(tmp_path / "elsewhere")}
    assert {key[1]: held for key, held in after.items()} == before


def test_purge_and_compact_of_what_does_not_exist(lived_in, tmp_path, run_cli):
    for words, expected in (
        (["purge", "nothing.png", "--embeds", lived_in], "knows no item at nothing.png"),
        (["purge", "x", "--embeds", tmp_path / "nowhere"], "no store at"),
        (["compact", tmp_path], "no store at"),
    ):
        code, _, line = run_cli(*words)
        assert (code, expected in line, line.count("\n")) == (2, True, 1), line
    assert not (tmp_path / layout.OWN_FOLDER).exists()


# ----------------------------------------------------------------------------------------------------------- damage


def _flip_features(shard) -> None:
    """Change a byte in a page of features."""
    metadata = pq.ParquetFile(shard).metadata
    column = metadata.row_group(0).column(metadata.num_columns - 1)
    assert column.path_in_schema == "embeds"
    flip(shard, (column.data_page_offset + column.total_compressed_size // 2) / shard.stat().st_size)


def test_damage_that_verify_finds_is_repaired_by_the_next_run(extract, some_photos, out, run_cli):
    extract(some_photos)
    before = contents(out)
    (shard,) = shards(out)
    _flip_features(shard)
    assert extract(some_photos).to_read == 0  # nobody has looked
    code, _, said = run_cli("verify", out)
    assert code == 6
    assert "is damaged: features" in said
    assert "run `qvsplit extract` again" in said
    assert list(damage_marks(LocalStorage(out))) == [shard.name]
    repaired = extract(some_photos)
    assert repaired.repaired == 1
    assert repaired.re_encoded >= 1
    assert f"quarantined as {layout.QUARANTINE}/shard-000001.parquet" in repaired.notes[0]
    assert contents(out) == before
    assert run_cli("verify", out)[0] == 0
    assert extract(some_photos).to_read == 0
    assert (out / layout.QUARANTINE / "shard-000001.parquet").exists()
    assert "shard-000001.parquet" in run_cli("inspect", out)[1]


def test_of_a_damaged_shard_what_is_sound_is_saved(extract, some_photos, out, monkeypatch, run_cli):
    monkeypatch.setattr("qvsplit.store.shard_writer.ROW_GROUP_ROWS", 1)  # a row group an image
    extract(some_photos)
    before = contents(out)
    (shard,) = shards(out)
    _flip_features(shard)
    assert run_cli("verify", out)[0] == 6
    os.remove(some_photos / "rocket.jpg")  # its features are all there is of it
    assert extract(some_photos).re_encoded == 1
    assert contents(out) == before


def test_a_shard_that_does_not_open_is_quarantined(extract, some_photos, out):
    extract(some_photos)
    add(some_photos, "more.png")
    extract(some_photos)
    before = contents(out)
    flip(shards(out)[0], 0.999)
    with pytest.raises(StoreDamaged):
        open_store(out)
    repaired = extract(some_photos, model=None)  # the other shard says which
    assert (repaired.repaired, repaired.re_encoded + repaired.new) == (1, 4)
    assert contents(out) == before


def test_where_no_shard_is_sound_the_model_must_be_named(extract, some_photos, out):
    extract(some_photos)
    (shard,) = shards(out)
    flip(shard, 0.999)
    with pytest.raises(ShardDamaged, match="name its `model`"):
        extract(some_photos, model=None)
    assert shards(out) == [shard]
    assert extract(some_photos).new == 4


def test_a_dry_run_of_a_damaged_store_says_so_and_changes_nothing(extract, some_photos, out):
    extract(some_photos)
    flip(shards(out)[0], 0.999)
    (out / layout.CATALOGUE).unlink()
    before = state(out)
    with pytest.raises(ShardDamaged):
        extract(some_photos, dry_run=True)
    assert state(out) == before


def test_a_deleted_shard_is_encoded_again(extract, some_photos, out):
    extract(some_photos)
    before = contents(out)
    add(some_photos, "more.png")
    extract(some_photos)
    shards(out)[0].unlink()
    assert extract(some_photos).encoded == 4
    assert {key: held for key, held in contents(out).items() if key[1] != "more.png"} == before


# ---------------------------------------------------------------------------------------------------------- rebuild


def test_another_config_is_refused_and_rebuild_is_the_way_on(extract, some_photos, out):
    extract(some_photos)
    with pytest.raises(ConfigError, match="`rebuild=True`"):
        extract(some_photos, storage_dtype="bfloat16")
    half = extract(some_photos, storage_dtype="bfloat16", rebuild=True, limit=2)
    assert (half.new, half.remaining) == (2, 2)
    assert open_store(out).config.storage_dtype == "float32"  # until the new one is whole
    assert len(open_store(out)) == 4
    rest = extract(some_photos, storage_dtype="bfloat16", rebuild=True)
    assert (rest.new, rest.unchanged) == (2, 2)
    store = open_store(out)
    assert (store.config.storage_dtype, len(store)) == ("bfloat16", 4)
    assert not (out / layout.REBUILD).exists()
    assert {row.generation for row in store.rows} == {2, 3}  # above the old store's
    assert extract(some_photos).to_read == 0


def test_a_store_of_other_rules_for_images_is_refused_though_nothing_has_changed(extract, some_photos, monkeypatch):
    with monkeypatch.context() as before:
        for module in ("tests.support.fake_encoder", "qvsplit.pipeline.options"):
            before.setattr(f"{module}.IMAGE_POLICY", IMAGE_POLICY | {"transparency": "over white"})
        extract(some_photos)
    with pytest.raises(ConfigError, match=r"by other rules \(transparency\); make it again with `rebuild=True`"):
        extract(some_photos)
    assert extract(some_photos, rebuild=True).new == 4
    assert extract(some_photos).to_read == 0


def test_a_rebuild_that_is_not_finished_changes_nothing_for_the_old_store(extract, some_photos):
    add(some_photos, "b/late.png")
    extract(some_photos)
    add(some_photos, "new.png", "coffee.png")
    assert extract(some_photos, rebuild=True, limit=5).remaining == 1  # of the second folder nothing
    assert extract(some_photos).new == 1


def test_a_rebuild_is_taken_up_after_ordinary_runs(extract, some_photos, out):
    extract(some_photos)
    extract(some_photos, rebuild=True, storage_dtype="bfloat16", limit=1)
    for number in range(3):
        add(some_photos, f"n{number}.png", shift=20 * number)
        extract(some_photos)
    assert extract(some_photos, rebuild=True, storage_dtype="bfloat16").remaining == 0
    store = open_store(out)
    assert {shard.config.storage_dtype for shard in store.shards} == {"bfloat16"}
    assert len(store) == 7


def test_a_rebuild_of_another_config_begins_again(extract, some_photos, out):
    extract(some_photos)
    extract(some_photos, rebuild=True, storage_dtype="bfloat16", limit=1)
    ran = extract(some_photos, rebuild=True, storage_dtype="float16")
    assert "given up, and begun again" in ran.notes[0]
    assert open_store(out).config.storage_dtype == "float16"
    assert len(open_store(out)) == 4


def test_a_rebuild_drops_only_what_may_go(extract, some_photos, out):
    extract(some_photos)
    (some_photos / "coins.png").unlink()
    with pytest.raises(UsageError, match="1 items of the store cannot be found now"):
        extract(some_photos, rebuild=True)
    assert len(open_store(out)) == 4
    assert extract(some_photos, rebuild=True, prune=True).new == 3
    assert len(open_store(out)) == 3


def test_a_rebuild_does_not_lose_images_of_other_paths(extract, some_photos, tmp_path):
    add(tmp_path / "other", "a.png")
    extract(some_photos, tmp_path / "other")
    with pytest.raises(UsageError, match="other, which `rebuild=True` would lose"):
        extract(some_photos, rebuild=True)
    assert extract(some_photos, tmp_path / "other", rebuild=True).new == 5


def test_there_must_be_something_to_rebuild(extract, some_photos):
    with pytest.raises(UsageError, match="nothing to rebuild"):
        extract(some_photos, rebuild=True)


# --------------------------------------------------------------------------------------------------- what is said


def test_inspect_gives_statuses_roots_and_the_last_runs(lived_in, some_photos, run_cli):
    description = json.loads(run_cli("inspect", lived_in, "--json")[1])
    counts = [description[name] for name in ("images", "copies", "failed", "deleted", "without_features")]
    assert counts == [8, 2, 0, 2, 0]
    assert description["superseded"] > 0
    assert description["roots"] == {str(some_photos): {"ok": 8, "failed": 0, "deleted": 2}}
    assert len(description["runs"]) == 5
    assert "1 encoded, 1 copied in " in run_cli("inspect", lived_in)[1]
    runs = last_runs(LocalStorage(lived_in))
    assert [run.get("moved", 0) for run in runs] == [0, 0, 0, 0, 1, 0, 0]
    assert not any("png" in line for line in (lived_in / layout.HISTORY).read_text().split('"'))  # no names of images


def test_stderr_is_quiet_when_nothing_happened(extract, some_photos, out, run_cli):
    words = ["extract", some_photos, "--model", "fake", "--out", out]
    add_bad(some_photos, "bad.png")
    code, _, said = run_cli(*words)
    assert code == 1
    assert said.count("failed: bad.png") == 1
    os.remove(some_photos / "coins.png")
    assert run_cli(*words) == (0, "", "")
    done = run_process(*words, "--json")  # a process of its own, which the fakes do not reach
    summary = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert (summary["unchanged"], summary["failed_before"], summary["not_found"]) == (3, 1, 1)


# ------------------------------------------------------------------------------------------ videos, by real decoders


@pytest.fixture
def extract_videos(extract, monkeypatch):
    """Extract with the fake encoder, which takes every frame as it is, and real decoders."""
    monkeypatch.setattr("qvsplit.pipeline.runner.DecoderPool", DecoderPool)
    return extract


@pytest.fixture
def films(tmp_path):
    """A folder of two clips of 10 and 20 frames, of a second and two, and a photograph."""
    folder = tmp_path / "films"
    folder.mkdir()
    add(folder, "still.png")
    film(folder / "a.mp4", 10)
    film(folder / "b.mkv", 20)
    return folder


def film(path, count: int, **how):
    """Write a clip of 10 frames a second, each one token, not fresh."""
    make_clip(path, count, rate=10, size=(60, 60), **how)
    os.utime(path, OLD)
    return path


def shown(out) -> dict[str, list[int]]:
    """How many tokens each part of a video has, by its path: one a frame."""
    found: dict[str, list[int]] = {}
    for row in open_store(out):
        if row.kind == "video":
            found.setdefault(row.path, []).append(row.n_tokens)
    return found


def test_every_change_of_a_video_is_counted_apart(extract_videos, films, out):
    """New, modified, touched, moved, copied, deleted, failed, cured, tried again: with all parts."""
    (films / "bad.mp4").write_bytes((films / "a.mp4").read_bytes()[:-100])
    os.utime(films / "bad.mp4", OLD)
    first = extract_videos(films, clip_seconds=1.0)
    assert (first.new, first.videos, first.clips, first.failed) == (3, 2, 3, 1)
    assert shown(out) == {"a.mp4": [10], "b.mkv": [10, 10]}
    assert first.failures == [("bad.mp4", "ends early: its last 100 bytes are missing; copy it again")]
    known = extract_videos(films)
    assert (known.to_read, known.unchanged, known.failed_before, known.shards) == (0, 3, 1, 0)

    film(films / "a.mp4", 15)  # modified
    (films / "b.mkv").rename(films / "moved.mkv")
    shutil.copy2(films / "moved.mkv", films / "copy.mkv")
    (films / "still.png").unlink()
    film(films / "bad.mp4", 12)  # cured
    film(films / "new.mov", 5)
    second = extract_videos(films, prune=True)
    counts = {name: getattr(second, name) for name in
              ("new", "modified", "moved", "copied", "deleted", "failed", "failed_again", "re_encoded", "encoded",
               "videos", "clips", "remaining", "not_found")}  # fmt: skip
    assert counts == {
        "new": 1, "modified": 1, "moved": 1, "copied": 1, "deleted": 1, "failed": 0, "failed_again": 0,
        "re_encoded": 1, "encoded": 3, "videos": 3, "clips": 5, "remaining": 0, "not_found": 0,
    }  # fmt: skip
    assert shown(out) == {
        "a.mp4": [10, 5], "bad.mp4": [10, 2], "copy.mkv": [10, 10], "moved.mkv": [10, 10], "new.mov": [5]
    }  # fmt: skip

    os.utime(films / "moved.mkv", LATER)
    touched = extract_videos(films, prune=True)
    assert (touched.metadata_changed, touched.to_read, touched.encoded) == (1, 1, 0)
    for name in ("moved.mkv", "copy.mkv"):  # also with its features' first name
        (films / name).unlink()
    deleted = extract_videos(films, prune=True)
    assert (deleted.deleted, deleted.unchanged) == (2, 3)
    assert {row.status for row in open_store(out).rows if row.path == "moved.mkv"} == {"deleted"}
    assert extract_videos(films, prune=True).to_read == 0


def test_a_video_that_failed_is_tried_again_when_asked_to(extract_videos, films):
    (films / "bad.mp4").write_bytes((films / "a.mp4").read_bytes()[:-100])
    os.utime(films / "bad.mp4", OLD)
    assert extract_videos(films).failed == 1
    assert extract_videos(films).failed_before == 1
    again = extract_videos(films, retry_failed=True)
    assert (again.failed, again.failed_again, again.failures) == (0, 1, [])


def test_a_limit_and_a_time_leave_videos_for_the_next_run(extract_videos, films, out):
    first = extract_videos(films, limit=1, clip_seconds=1.0)
    assert (first.encoded, first.remaining, first.stopped) == (1, 2, "limit")
    second = extract_videos(films, max_runtime=0.0)
    assert (second.encoded, second.remaining, second.stopped) == (0, 2, "max-runtime")
    assert extract_videos(films).encoded == 2
    assert shown(out) == {"a.mp4": [10], "b.mkv": [10, 10]}


def test_gifs_are_images_or_videos_as_a_store_began(extract_videos, films, tmp_path, out):
    film(films / "c.gif", 8, codec="gif", pixels="rgb8")
    extract_videos(films)
    assert open_store(out)["c.gif"].kind == "image"
    films_out = tmp_path / "films-embeds"
    extract_videos(films, out=films_out, gif="video")
    assert shown(films_out)["c.gif"] == [8]
    film(films / "d.gif", 6, codec="gif", pixels="rgb8")
    for store, kind in ((out, "image"), (films_out, "video")):
        assert extract_videos(films, out=store).encoded == 1
        assert open_store(store)["d.gif"].kind == kind
    with pytest.raises(ConfigError, match="`gif`"):
        extract_videos(films, out=films_out, gif="image", checksum=True)


def test_without_videos_and_then_with_them(extract_videos, films, out):
    without = extract_videos(films, videos=False)
    assert (without.found, without.encoded, shown(out)) == (1, 1, {})
    with_them = extract_videos(films)
    assert (with_them.encoded, with_them.unchanged, with_them.videos) == (2, 1, 2)
    again = extract_videos(films, videos=False, prune=True)
    assert (again.encoded, again.failed) == (0, 0)
    assert shown(out) == {"a.mp4": [10], "b.mkv": [20]}  # what is there is not deleted for not being looked for


def test_content_decides_what_a_file_is_whatever_its_name(extract_videos, films, out):
    add(films, "photo.png", shift=9)
    (films / "photo.png").rename(films / "photo.mp4")
    (films / "a.mp4").rename(films / "a.jpg")
    ran = extract_videos(films)
    assert (ran.encoded, ran.videos, ran.failed) == (4, 2, 0)
    store = open_store(out)
    assert {row.path: row.kind for row in store} == {
        "a.jpg": "video", "b.mkv": "video", "photo.mp4": "image", "still.png": "image"
    }  # fmt: skip
    assert extract_videos(films).to_read == 0


def test_a_live_photo_is_a_still_and_a_clip(extract_videos, films, out):
    add(films, "IMG_0001.jpg", shift=5)
    film(films / "IMG_0001.MOV", 12, codec="libx264", format="mov")
    ran = extract_videos(films)
    assert (ran.encoded, ran.videos) == (5, 3)
    pair = [row for row in open_store(out) if row.path.startswith("IMG_0001.")]
    assert {row.path: row.kind for row in pair} == {"IMG_0001.jpg": "image", "IMG_0001.MOV": "video"}
    (films / "IMG_0001.MOV").unlink()
    assert extract_videos(films, prune=True).deleted == 1
    assert open_store(out)["IMG_0001.jpg"].status == "ok"
