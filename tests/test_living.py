"""Living with an album: what a run does and does not do, and the commands that tidy, forget and make anew."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import run_process
from PIL import Image

from qvsplit import index, preview
from qvsplit.album import open_album, rebuild_folder, shards_in
from qvsplit.compact import ASIDE, damage_marks
from qvsplit.errors import AlbumDamaged, AlbumInUse, DiskError, RecipeError, ShardDamaged, UsageError
from qvsplit.extract import Settings, Watcher, extract_pictures
from qvsplit.index import INDEX_FILE
from qvsplit.lock import LOCK_FILE, locked
from qvsplit.runs import RUNS_FILE, last_runs

OLD = (1_600_000_000, 1_600_000_000)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "embeds"


@pytest.fixture
def extract(checkpoint, out):
    """One run into `out`; notes are on `.notes`, failures on `.heard`."""

    def run(*paths, **settings):
        notes: list[str] = []
        heard: list[str] = []
        settings.setdefault("model", str(checkpoint))
        watcher = Watcher(on_note=notes.append, on_failure=lambda path, reason: heard.append(path))
        summary = extract_pictures(list(paths), out=out, settings=Settings(**settings), watcher=watcher)
        summary.notes, summary.heard = notes, heard
        return summary

    return run


def contents(folder: Path) -> dict[tuple[str, str], tuple]:
    album = open_album(folder)
    return {
        row.key: (row.status, row.grid_thw, album.embeds(row).raw.tobytes() if row.status == "ok" else None)
        for row in album.rows
    }


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def add(folder: Path, name: str, source: Path, *, shift: int = 0) -> Path:
    """A picture of its own: a piece of a photograph."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        image.convert("RGB").crop((shift, shift, shift + 80, shift + 60)).save(folder / name)
    os.utime(folder / name, OLD)
    return folder / name


# ------------------------------------------------------------------------------------------------------ incremental


def test_every_change_is_counted_apart(extract, some_photos, photos, out):
    (some_photos / "bad.png").write_text("no picture")
    os.utime(some_photos / "bad.png", OLD)
    first = extract(some_photos)
    assert (first.new, first.encoded, first.failed) == (4, 4, 1)
    add(some_photos, "new.png", photos / "coffee.png")  # new
    add(some_photos, "chelsea.png", photos / "rocket.jpg")  # edited
    os.rename(some_photos / "coffee.png", some_photos / "renamed.png")  # moved
    shutil.copy2(some_photos / "coins.png", some_photos / "copy.png")  # copied
    os.utime(some_photos / "coins.png", (1_600_000_500, 1_600_000_500))  # touched
    (some_photos / "rocket.jpg").unlink()  # gone
    second = extract(some_photos, prune=True)
    told = {name: getattr(second, name) for name in
            ("found", "new", "edited", "moved", "copied", "touched", "gone", "skipped", "failed", "failed_before",
             "encoded", "recovered", "left", "missing")}  # fmt: skip
    assert told == {"found": 6, "new": 1, "edited": 1, "moved": 1, "copied": 1, "touched": 1, "gone": 1, "skipped": 0,
                    "failed": 0, "failed_before": 1, "encoded": 2, "recovered": 0, "left": 0, "missing": 0}  # fmt: skip
    again = extract(some_photos, prune=True)
    assert (again.skipped, again.failed_before, again.to_do, again.shards) == (5, 1, 0, 0)


def test_nothing_to_do_writes_nothing_and_imports_nothing_heavy(extract, some_photos, out):
    (some_photos / "bad.png").write_text("no picture")
    os.utime(some_photos / "bad.png", OLD)
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


@pytest.mark.parametrize("spoil", ["lost", "flipped", "of other shards"])
def test_the_index_is_only_a_cache(extract, some_photos, out, photos, spoil):
    extract(some_photos)
    if spoil == "lost":
        (out / INDEX_FILE).unlink()
    elif spoil == "flipped":
        data = bytearray((out / INDEX_FILE).read_bytes())
        data[-40] ^= 1
        (out / INDEX_FILE).write_bytes(data)
    else:
        kept = (out / INDEX_FILE).read_bytes()
        (some_photos / "coins.png").unlink()
        add(some_photos, "coins.png", photos / "coffee.png")
        extract(some_photos)
        (out / INDEX_FILE).write_bytes(kept)
    assert index.read_index(out, shards_in(out)) is None
    again = extract(some_photos)
    assert (again.skipped, again.to_do, again.shards) == (4, 0, 0)
    assert index.read_index(out, shards_in(out)) is not None


def test_the_index_does_not_hide_what_changed(extract, some_photos, out, photos):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        add(some_photos, name, photos / "rocket.jpg", shift=ord(name[2]))
    extract(some_photos)
    assert extract(some_photos).to_do == 0
    shutil.rmtree(some_photos / "b")  # a whole folder
    (some_photos / "a" / "1.png").unlink()
    missing = extract(some_photos)
    assert (missing.to_do, missing.missing, missing.shards) == (0, 2, 0)
    assert extract(some_photos).missing == 2  # from the index
    add(some_photos, "c/moved.png", photos / "rocket.jpg", shift=ord("3"))  # b/3.png under another name
    moved = extract(some_photos)
    assert (moved.moved, moved.encoded, moved.missing) == (1, 0, 1)
    assert extract(some_photos, prune=True).gone == 1
    assert extract(some_photos, prune=True).to_do == extract(some_photos).missing == 0


def test_a_folder_that_vanishes_as_a_whole_is_noticed(extract, some_photos, photos):
    add(some_photos, "b/3.png", photos / "rocket.jpg")
    extract(some_photos)
    shutil.rmtree(some_photos / "b")
    assert extract(some_photos).missing == 1


def test_an_edit_that_keeps_size_and_time_is_found_by_checksum(extract, some_photos):
    bitmap = some_photos / "a.bmp"
    Image.new("RGB", (60, 60), "red").save(bitmap)
    os.utime(bitmap, OLD)
    extract(some_photos)
    Image.new("RGB", (60, 60), "blue").save(bitmap)
    os.utime(bitmap, OLD)
    assert extract(some_photos).to_do == 0
    reread = extract(some_photos, checksum=True)
    assert (reread.edited, reread.touched, reread.shards) == (1, 4, 1)
    assert extract(some_photos, checksum=True).shards == 0


def test_a_file_dated_in_the_future_is_not_read_again_for_ever(extract, some_photos):
    os.utime(some_photos / "coins.png", (2_500_000_000, 2_500_000_000))
    extract(some_photos)
    assert extract(some_photos).to_do == 0


def test_a_time_beyond_64_bits(extract, some_photos, out):
    try:
        os.utime(some_photos / "coins.png", (15_000_000_000, 15_000_000_000))
    except OSError:
        pytest.skip("this file system does not keep such times")
    assert extract(some_photos).new == 4
    assert extract(some_photos).to_do == 0


def test_a_picture_has_one_name_however_it_was_come_by(extract, some_photos, photos, out):
    add(some_photos, "deep/x.png", photos / "coffee.png")
    extract(some_photos)
    for paths in ([some_photos / "deep"], [some_photos / "coins.png"], [some_photos / "deep" / "x.png", some_photos]):
        summary = extract(*paths)
        assert (summary.to_do, summary.encoded, summary.copied) == (0, 0, 0)
    assert {row.root for row in open_album(out).rows} == {str(some_photos)}
    add(some_photos, "other/y.png", photos / "rocket.jpg")
    shutil.rmtree(out)
    extract(some_photos / "deep")
    extract(some_photos)
    assert {row.root for row in open_album(out).rows} == {str(some_photos), str(some_photos / "deep")}
    assert len(open_album(out).rows) == 6
    below = extract(some_photos / "deep", prune=True)  # what lies outside it is none of its business
    assert (below.gone, below.missing) == (0, 0)


def test_a_file_named_one_by_one_is_not_forgotten_by_the_walk(extract, some_photos):
    odd = some_photos / "x.dat"
    shutil.copy2(some_photos / "coins.png", odd)
    os.utime(odd, OLD)
    extract(some_photos)
    extract(odd)
    for _ in range(2):
        summary = extract(some_photos)
        assert (summary.to_do, summary.skipped) == (0, 5)
    shutil.copy(some_photos / "rocket.jpg", odd)
    os.utime(odd, OLD)
    assert extract(some_photos).copied == 1
    odd.unlink()
    assert extract(some_photos, prune=True).gone == 1


def test_a_picture_met_under_a_links_name_is_not_stale_under_its_own(extract, some_photos, tmp_path, photos, out):
    file = add(tmp_path / "b", "x.png", photos / "rocket.jpg")
    (some_photos / "link").symlink_to(tmp_path / "b")
    extract(some_photos)
    extract(tmp_path / "b")
    add(tmp_path / "b", "x.png", photos / "coffee.png")
    assert file.exists()
    done = extract(some_photos, tmp_path / "b")
    assert (done.edited, done.copied, done.missing) == (1, 1, 0)
    assert extract(some_photos, tmp_path / "b").to_do == 0
    here = {row.key: row.sha256 for row in open_album(out).rows}
    assert here[str(tmp_path / "b"), "x.png"] == here[str(some_photos), "link/x.png"]


def test_a_file_deleted_before_it_is_read_is_no_failure(extract, some_photos, monkeypatch):
    from qvsplit import extract as room

    plain = room._Run._take

    def take(run, number, found):
        (some_photos / "coins.png").unlink(missing_ok=True)
        return plain(run, number, found)

    monkeypatch.setattr(room._Run, "_take", take)
    summary = extract(some_photos)
    assert (summary.new, summary.vanished, summary.failed, summary.heard) == (3, 1, 0, [])


def test_a_path_in_which_nothing_is_left_may_not_be_mounted(extract, some_photos, tmp_path, photos, out):
    extract(some_photos)
    kept = contents(out)
    os.rename(some_photos, tmp_path / "unmounted")
    some_photos.mkdir()
    for settings in ({}, {"prune": True}, {}, {"checksum": True}):  # every night, not the first alone
        with pytest.raises(UsageError, match="4 rows are left as they are, in case it is not mounted"):
            extract(some_photos, **settings)
    add(tmp_path / "other", "a.png", photos / "rocket.jpg")
    for _ in range(2):
        both = extract(some_photos, tmp_path / "other", prune=True)
        assert (both.gone, len(both.notes)) == (0, 1)
    some_photos.rmdir()
    os.rename(tmp_path / "unmounted", some_photos)
    assert extract(some_photos, prune=True).to_do == 0
    assert {key: what for key, what in contents(out).items() if key in kept} == kept


def test_nor_may_a_folder_below_it(extract, some_photos, photos, tmp_path):
    for name in ("disk/a/1.png", "disk/2.png", "plain/3.png"):
        add(some_photos, name, photos / "rocket.jpg", shift=ord(name[-5]))
    extract(some_photos)
    os.rename(some_photos / "disk", tmp_path / "unmounted")
    (some_photos / "disk").mkdir()
    shutil.rmtree(some_photos / "plain")
    for _ in range(2):
        pruned = extract(some_photos, prune=True)
        assert "disk is empty: the 2 pictures that were below it are not pruned" in pruned.notes[0]
    assert pruned.missing == 2
    (some_photos / "disk").rmdir()
    assert extract(some_photos, prune=True).gone == 2


# ----------------------------------------------------------------------------------------------------------- limits


def test_limit_and_max_runtime_leave_the_rest_for_the_next_run(extract, some_photos, out):
    with pytest.raises(UsageError, match="--checksum reads everything"):
        extract(some_photos, limit=1, checksum=True)
    first = extract(some_photos, limit=1)
    assert (first.new, first.left, first.stopped) == (1, 3, "limit")
    second = extract(some_photos, max_runtime=0.0)
    assert (second.new, second.left, second.stopped) == (0, 3, "max-runtime")
    third = extract(some_photos)
    assert (third.new, third.left, third.stopped, third.skipped) == (3, 0, "", 1)


def test_a_time_that_passes_with_nothing_left_stops_nothing(extract, some_photos):
    extract(some_photos)
    (some_photos / "coins.png").unlink()
    done = extract(some_photos, max_runtime=0.0, prune=True)
    assert (done.stopped, done.gone) == ("", 1)


def test_what_failed_is_tried_again_behind_what_is_new(extract, some_photos, photos):
    for name in ("a.png", "b.png"):
        (some_photos / name).write_text("no picture")
        os.utime(some_photos / name, OLD)
    extract(some_photos)
    add(some_photos, "z.png", photos / "rocket.jpg")
    assert extract(some_photos, retry_failed=True, limit=1).new == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("90m", 5400), ("2h30m", 9000), ("1h", 3600), ("7", 7), ("1.5", 1.5)]
)
def test_durations(text, seconds):
    from qvsplit.cli import _duration

    assert _duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "tomorrow", "-5", "5d"])
def test_durations_that_are_none(text):
    from qvsplit.cli import _duration

    with pytest.raises(UsageError, match="--max-runtime"):
        _duration(text)


def test_a_dry_run_counts_tokens_as_the_run_then_has_them(extract, some_photos, photos, out):
    shutil.copy(photos / "turned.jpg", some_photos)
    (some_photos / "bad.png").write_text("no picture")
    for name in ("turned.jpg", "bad.png"):
        os.utime(some_photos / name, OLD)
    before = extract(some_photos, dry_run=True)
    assert not out.exists()
    assert (before.to_do, before.preview.pictures, before.preview.bad) == (6, 6, 1)
    assert before.preview.seconds_by == "arithmetic"
    assert before.preview.seconds > 0
    done = extract(some_photos)
    assert before.preview.tokens == done.tokens
    assert 0.6 < before.preview.bytes / done.bytes < 1.6
    for number in range(9):
        add(some_photos, f"{number}.png", photos / "rocket.jpg", shift=number)
    extract(some_photos)
    (some_photos / "more.png").write_bytes((some_photos / "8.png").read_bytes() + b" ")
    after = extract(some_photos, dry_run=True)
    assert (after.to_do, after.preview.seconds_by) == (1, "earlier runs")


def test_the_rule_of_sizes_is_the_processors():
    from random import Random

    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    chance = Random(0)
    for _ in range(3000):
        height, width = chance.randint(1, 6000), chance.randint(1, 6000)
        if max(height, width) > 199 * min(height, width):
            continue
        low, high = chance.choice([(3136, 1003520), (784, 784 * 4), (100_000, 2_000_000)])
        theirs = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
        assert preview.resized(height, width, 28, low, high) == tuple(theirs), (height, width)


# ---------------------------------------------------------------------------------------------------------- two runs


def test_a_second_run_waits_if_asked_to(extract, some_photos, out):
    extract(some_photos, limit=1)
    began = time.monotonic()
    with locked(out) as held:
        held.announce()
        with pytest.raises(AlbumInUse, match=rf"process {os.getpid()} on .* since .*--wait"):
            extract(some_photos)
        assert time.monotonic() - began < 5
        ended = threading.Event()

        def waiting() -> None:
            summary = extract(some_photos, wait=True)
            assert summary.notes[0].startswith(f"waiting for process {os.getpid()}")
            assert summary.new == 3
            ended.set()

        thread = threading.Thread(target=waiting)
        thread.start()
        time.sleep(1)
        assert not ended.is_set()
    thread.join(60)
    assert ended.is_set()


def test_a_run_with_nothing_to_do_is_told_too_that_the_album_is_in_use(extract, some_photos, out):
    extract(some_photos)
    with locked(out), pytest.raises(AlbumInUse):
        extract(some_photos)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(extract, some_photos, out, monkeypatch, code):
    def flock(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("qvsplit.lock.fcntl.flock", flock)
    with pytest.raises(DiskError, match="without locks, where two runs could spoil") as refused:
        extract(some_photos)
    assert refused.value.exit_code == 7
    assert not shards_in(out)


# -------------------------------------------------------------------------------------------------- compact, forget


@pytest.fixture
def lived_in(extract, some_photos, photos, out):
    """An album of seven shards, with superseded rows, a copy, a move and a picture that is gone."""
    for number in range(4):
        add(some_photos, f"n{number}.png", photos / "rocket.jpg", shift=20 * number)
        extract(some_photos)
    os.rename(some_photos / "coffee.png", some_photos / "moved.png")
    extract(some_photos)
    add(some_photos, "chelsea.png", photos / "coffee.png", shift=33)
    shutil.copy2(some_photos / "n1.png", some_photos / "copy.png")
    extract(some_photos)
    (some_photos / "n2.png").unlink()
    extract(some_photos, prune=True)
    assert len(shards_in(out)) == 7
    return out


def test_compact_changes_nothing_but_shards(lived_in, extract, some_photos, run_cli):
    before, rows = contents(lived_in), sum(len(shard.rows) for shard in open_album(lived_in).shards)
    code, _, said = run_cli("compact", lived_in)
    assert code == 0
    assert "7 → 1 shards" in said
    album = open_album(lived_in)
    assert contents(lived_in) == before
    assert sum(len(shard.rows) for shard in album.shards) == len(before) < rows
    held = [row.sha256 for row in album.shards[0].rows if row.has_embeds]
    assert len(held) == len(set(held)) == 7  # neither the edited nor the deleted picture's
    assert extract(some_photos).to_do == 0
    kept = state(lived_in)
    code, told, _ = run_cli("compact", lived_in, "--json")
    assert (code, json.loads(told)["rows_dropped"]) == (0, 0)
    assert {name: what for name, what in state(lived_in).items() if "shard" in name} == {
        name: what for name, what in kept.items() if "shard" in name
    }


def test_compact_keeps_what_only_an_older_row_of_another_name_holds(extract, some_photos, photos, out, run_cli):
    """The copy stands in a shard before that of its embeddings, whose own name shows something else by now."""
    shutil.copy2(some_photos / "coins.png", some_photos / "z.png")
    extract(some_photos / "coins.png")
    extract(some_photos)
    shards_in(out)[0].unlink()
    extract(some_photos / "coins.png")  # encoded again: its home comes behind z.png's row
    add(some_photos, "coins.png", photos / "rocket.jpg")
    extract(some_photos)
    before = contents(out)
    assert run_cli("compact", out)[0] == 0
    assert len(shards_in(out)) == 1
    assert contents(out) == before


def test_forget_leaves_no_row_and_no_byte(lived_in, some_photos, run_cli, monkeypatch):
    before = contents(lived_in)
    album = open_album(lived_in)
    (moved,) = [row for row in album.rows if row.path == "moved.png"]
    blobs = [album.home(moved.sha256)]
    assert blobs[0].path == "coffee.png"  # under its old name the bytes lie in the first shard
    monkeypatch.chdir(some_photos)
    code, _, said = run_cli("forget", "moved.png", "--embeds", lived_in)
    assert code == 0
    assert "1 picture forgotten" in said
    assert "the file is still there" in said
    after = open_album(lived_in)
    assert not [row for shard in after.shards for row in shard.rows if row.sha256 == moved.sha256]
    assert not [row for shard in after.shards for row in shard.rows if row.path in {"moved.png", "coffee.png"}]
    gone = {key for key in before if key[1] in {"moved.png", "coffee.png"}}
    assert contents(lived_in) == {key: what for key, what in before.items() if key not in gone}


def test_forget_of_no_name_and_of_one_that_two_roots_have(extract, some_photos, tmp_path, photos, out, run_cli):
    add(tmp_path / "other", "coins.png", photos / "rocket.jpg")
    extract(some_photos, tmp_path / "other")
    for name, said in (("", "empty name"), (" ", "empty name"), ("coins.png", "more than one root")):
        code, _, line = run_cli("forget", name, "--embeds", out)
        assert (code, said in line) == (2, True), line
    assert len(open_album(out)) == 5


def test_forget_reaches_what_is_half_made_or_set_aside(extract, some_photos, out, run_cli):
    extract(some_photos)
    extract(some_photos, rebuild=True, limit=2)
    flip(shards_in(out)[0], 0.5)
    run_cli("verify", out)
    extract(some_photos)
    assert [name for name in os.listdir(out) if name.endswith(ASIDE)]
    code, _, said = run_cli("forget", some_photos / "chelsea.png", "--embeds", out)
    assert code == 0
    assert "unfinished rebuild" in said
    assert not rebuild_folder(out).exists()
    assert sorted(os.listdir(out)) == sorted([LOCK_FILE, RUNS_FILE, *(path.name for path in shards_in(out))])


def test_forget_keeps_what_another_picture_shows(lived_in, some_photos, run_cli):
    before = contents(lived_in)
    code, _, said = run_cli("forget", some_photos / "n1.png", "--embeds", lived_in)
    assert code == 0
    assert "embeddings kept" in said
    after = contents(lived_in)
    assert before.keys() - after.keys() == {(str(some_photos), "n1.png")}
    assert after[str(some_photos), "copy.png"] == before[str(some_photos), "copy.png"]


def test_forget_a_root_after_the_photos_have_moved(extract, some_photos, tmp_path, out, run_cli):
    extract(some_photos)
    before = {key[1]: what for key, what in contents(out).items()}
    os.rename(some_photos, tmp_path / "elsewhere")
    moved = extract(tmp_path / "elsewhere")
    assert (moved.copied, moved.encoded) == (4, 0)
    assert run_cli("forget", some_photos, "--embeds", out)[0] == 0
    after = contents(out)
    assert {key[0] for key in after} == {str(tmp_path / "elsewhere")}
    assert {key[1]: what for key, what in after.items()} == before


def test_forget_and_compact_of_what_is_not_there(lived_in, tmp_path, run_cli):
    for words, said in (
        (["forget", "nothing.png", "--embeds", lived_in], "knows no picture at nothing.png"),
        (["forget", "x", "--embeds", tmp_path / "nowhere"], "no album at"),
        (["compact", tmp_path], "no album at"),
    ):
        code, _, line = run_cli(*words)
        assert (code, said in line, line.count("\n")) == (2, True, 1), line
    assert not (tmp_path / LOCK_FILE).exists()


# ----------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, at: float) -> None:
    """Change one byte, `at` that part of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    path.write_bytes(data)


def test_damage_that_verify_finds_is_mended_by_the_next_run(extract, some_photos, out, run_cli):
    extract(some_photos)
    before = contents(out)
    (shard,) = shards_in(out)
    flip(shard, 0.5)  # in a page of embeddings
    assert extract(some_photos).to_do == 0  # nobody has looked
    code, _, said = run_cli("verify", out)
    assert code == 6
    assert "column embeds" in said
    assert list(damage_marks(out)) == [shard]
    mended = extract(some_photos)
    assert mended.mended == 1
    assert mended.recovered >= 1
    assert "set aside as shard-000001.parquet.damaged" in mended.notes[0]
    assert contents(out) == before
    assert run_cli("verify", out)[0] == 0
    assert extract(some_photos).to_do == 0
    assert (out / f"shard-000001.parquet{ASIDE}").exists()
    assert "set aside shard-000001.parquet.damaged" in run_cli("inspect", out)[1]


def test_of_a_damaged_shard_what_is_sound_is_saved(extract, some_photos, out, monkeypatch, run_cli):
    monkeypatch.setattr("qvsplit.store.ROW_GROUP_ROWS", 1)  # a row group a picture
    extract(some_photos)
    before = contents(out)
    (shard,) = shards_in(out)
    flip(shard, 0.1)
    run_cli("verify", out)
    os.remove(some_photos / "rocket.jpg")  # its embeddings are all there is of it
    mended = extract(some_photos)
    assert mended.recovered == 1
    assert contents(out) == before


def test_a_shard_that_does_not_open_is_set_aside(extract, some_photos, photos, out):
    extract(some_photos)
    add(some_photos, "more.png", photos / "rocket.jpg")
    extract(some_photos)
    before = contents(out)
    first, _ = shards_in(out)
    flip(first, 0.999)
    with pytest.raises(AlbumDamaged):
        open_album(out)
    mended = extract(some_photos, model=None)  # the other shard tells which
    assert (mended.mended, mended.recovered + mended.new) == (1, 4)
    assert contents(out) == before


def test_where_no_shard_is_sound_the_model_must_be_named(extract, some_photos, out):
    extract(some_photos)
    (shard,) = shards_in(out)
    flip(shard, 0.999)
    with pytest.raises(ShardDamaged, match="name its model with --model"):
        extract(some_photos, model=None)
    assert shards_in(out) == [shard]
    assert extract(some_photos).new == 4


def test_a_deleted_shard_is_made_anew(extract, some_photos, photos, out):
    extract(some_photos)
    before = contents(out)
    add(some_photos, "more.png", photos / "rocket.jpg")
    extract(some_photos)
    shards_in(out)[0].unlink()
    assert extract(some_photos).encoded == 4
    assert {key: what for key, what in contents(out).items() if key[1] != "more.png"} == before


# ---------------------------------------------------------------------------------------------------------- rebuild


def test_another_recipe_is_refused_and_rebuild_is_the_way_on(extract, some_photos, out):
    extract(some_photos)
    with pytest.raises(RecipeError, match="--rebuild"):
        extract(some_photos, store="bfloat16")
    half = extract(some_photos, store="bfloat16", rebuild=True, limit=2)
    assert (half.new, half.left) == (2, 2)
    assert open_album(out).recipe.stored_dtype == "float32"  # until the new one is whole
    assert len(open_album(out)) == 4
    rest = extract(some_photos, store="bfloat16", rebuild=True)
    assert (rest.new, rest.skipped) == (2, 2)
    album = open_album(out)
    assert (album.recipe.stored_dtype, len(album)) == ("bfloat16", 4)
    assert not rebuild_folder(out).exists()
    assert extract(some_photos).to_do == 0


def test_a_rebuild_that_is_not_finished_tells_the_old_album_nothing(extract, some_photos, photos):
    add(some_photos, "b/late.png", photos / "rocket.jpg")
    extract(some_photos)
    add(some_photos, "new.png", photos / "coffee.png")
    assert extract(some_photos, rebuild=True, limit=5).left == 1  # of the first folder nothing
    assert extract(some_photos).new == 1


def test_a_rebuild_is_taken_up_after_ordinary_runs(extract, some_photos, photos, out):
    extract(some_photos)
    extract(some_photos, rebuild=True, store="bfloat16", limit=1)
    for number in range(3):
        add(some_photos, f"n{number}.png", photos / "rocket.jpg", shift=20 * number)
        extract(some_photos)
    assert extract(some_photos, rebuild=True, store="bfloat16").left == 0
    album = open_album(out)
    assert {shard.recipe.stored_dtype for shard in album.shards} == {"bfloat16"}
    assert len(album) == 7


def test_a_rebuild_of_another_recipe_begins_anew(extract, some_photos, out):
    extract(some_photos)
    extract(some_photos, rebuild=True, store="bfloat16", limit=1)
    done = extract(some_photos, rebuild=True, store="float16")
    assert "given up, and begun anew" in done.notes[0]
    assert open_album(out).recipe.stored_dtype == "float16"
    assert len(open_album(out)) == 4


def test_a_rebuild_drops_only_what_may_go(extract, some_photos, out):
    extract(some_photos)
    (some_photos / "coins.png").unlink()
    with pytest.raises(UsageError, match="1 pictures of the album cannot be seen now"):
        extract(some_photos, rebuild=True)
    assert len(open_album(out)) == 4
    assert extract(some_photos, rebuild=True, prune=True).new == 3
    assert len(open_album(out)) == 3


def test_a_rebuild_does_not_lose_pictures_of_other_paths(extract, some_photos, tmp_path, photos, out):
    add(tmp_path / "other", "a.png", photos / "rocket.jpg")
    extract(some_photos, tmp_path / "other")
    with pytest.raises(UsageError, match="other, which --rebuild would lose"):
        extract(some_photos, rebuild=True)
    assert extract(some_photos, tmp_path / "other", rebuild=True).new == 5


# ------------------------------------------------------------------------------------------------------------- told


def test_inspect_tells_states_roots_and_the_last_runs(lived_in, some_photos, run_cli):
    told = json.loads(run_cli("inspect", lived_in, "--json")[1])
    assert (told["pictures"], told["copies"], told["failed"], told["gone"], told["lost"]) == (8, 2, 0, 2, 0)
    assert told["superseded"] > 0
    assert told["roots"] == {str(some_photos): {"ok": 8, "failed": 0, "gone": 2}}
    assert len(told["runs"]) == 5
    assert "run       20" in run_cli("inspect", lived_in)[1]
    assert not any("png" in line for line in (lived_in / RUNS_FILE).read_text().split('"'))  # no names of pictures


def test_the_record_of_runs_is_cut_back(tmp_path):
    from qvsplit import runs

    for number in range(2 * runs._KEPT + 5):
        runs.note(tmp_path, 0.0, {"encoded": number + 1})
    (tmp_path / RUNS_FILE).open("a").write('{"began": "half a l')
    kept = last_runs(tmp_path)
    assert runs._KEPT <= len(kept) <= 2 * runs._KEPT
    assert kept[-1]["encoded"] == 2 * runs._KEPT + 5


def test_stderr_is_quiet_when_nothing_happened(extract, some_photos, checkpoint, out):
    words = ["extract", some_photos, "--model", checkpoint, "--out", out]
    (some_photos / "bad.png").write_text("no picture")
    os.utime(some_photos / "bad.png", OLD)
    first = run_process(*words)
    assert first.returncode == 1
    assert first.stderr.count("failed: bad.png") == 1
    os.remove(some_photos / "coins.png")
    second = run_process(*words)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    summary = json.loads(run_process(*words, "--json").stdout)
    assert (summary["skipped"], summary["failed_before"], summary["missing"]) == (3, 1, 1)
