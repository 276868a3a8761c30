"""A store whose folders have things that are left out: what is counted, what is kept, and that a quiet run stays quiet."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from qvsplit.errors import UsageError
from qvsplit.sources.exclusions import IGNORE_FILE
from qvsplit.sources.folders import LocalFolders
from qvsplit.store import layout
from qvsplit.store.opening import open_store
from qvsplit.store.storage import LocalStorage
from qvsplit.store.walked import Walk, walks
from tests.support.extracting import OLD, add, state


@pytest.fixture
def album(some_photos):
    """Four photographs, two more in each of two folders, and files that nothing reads."""
    for folder in ("raw", "#recycle"):
        (some_photos / folder).mkdir()
        for number in range(2):
            add(some_photos / folder, f"{number}.png", shift=10 * number + len(folder))
            os.utime(some_photos / folder / f"{number}.png", OLD)
    for name in ("a.CR2", "b.cr2", "raw/c.psd", "#recycle/d.psd"):
        (some_photos / name).write_bytes(b"x")
    return some_photos


@pytest.fixture
def taken(extract, album, monkeypatch):
    """A store that has all of it, as one of before anything was left out."""
    with monkeypatch.context() as patch:
        patch.setattr("qvsplit.sources.exclusions.is_left_out_by_default", lambda name: False)
        assert extract(album).new == 8
    return album


def counts(ran) -> tuple:
    return ran.found, ran.unchanged, ran.excluded, ran.not_found, ran.to_read


def test_what_is_left_out_is_counted(extract, album):
    for _ in range(2):  # the second run has nothing to do
        ran = extract(album)
        assert (ran.found, ran.excluded, ran.excluded_folders, ran.excluded_files) == (6, 0, 1, 0)
        assert ran.left_out == {".cr2": 2, ".psd": 1}
    assert not ran.did_anything
    tried = extract(album, exclude=["raw", "coins.*"], dry_run=True)
    assert (tried.left_out, tried.excluded_folders, tried.excluded_files) == ({".cr2": 2}, 2, 1)


def test_items_of_the_store_that_are_excluded_now_stay_as_they_are(extract, taken, out):
    before = {row.key for row in open_store(out)}
    ran = extract(taken, prune=True)
    assert (*counts(ran), ran.deleted) == (6, 6, 2, 0, 0, 0)
    assert {row.key for row in open_store(out)} == before
    quiet = state(out)
    assert counts(extract(taken, prune=True)) == (6, 6, 2, 0, 0)
    assert state(out) == quiet  # nothing was to be done
    add(taken, "new.png", shift=50)
    assert counts(extract(taken)) == (7, 6, 2, 0, 1)
    assert counts(extract(taken, exclude=["!#recycle"])) == (9, 9, 0, 0, 0)


@pytest.mark.parametrize("by_file", [False, True])
def test_a_change_of_what_is_excluded_is_seen_by_a_run_with_nothing_else_to_do(extract, taken, by_file):
    def run(*patterns):
        if not by_file:
            return extract(taken, exclude=patterns)
        (taken / IGNORE_FILE).write_text("\n".join(patterns))
        return extract(taken)

    assert counts(run()) == (6, 6, 2, 0, 0)
    for _ in range(2):
        assert counts(run("raw", "coins.png")) == (3, 3, 5, 0, 0)
    for _ in range(2):
        assert counts(run("coins.png")) == (5, 5, 3, 0, 0)
    for _ in range(2):
        assert counts(run()) == (6, 6, 2, 0, 0)
    with pytest.raises(
        UsageError, match=r"no images or videos .*; there are 2 \.cr2, 4 excluded files, 2 excluded folders\)"
    ):
        run("*.png", "*.jpg", "raw")


def test_of_excluded_files_those_that_are_gone_are_absent(extract, taken):
    extract(taken)
    (taken / "#recycle" / "0.png").unlink()
    add(taken, "new.png", shift=50)
    assert counts(extract(taken)) == (7, 6, 1, 1, 1)
    ran = extract(taken, prune=True)
    assert (*counts(ran), ran.deleted) == (7, 7, 1, 0, 0, 1)
    assert counts(extract(taken, prune=True)) == (7, 7, 1, 0, 0)


def test_an_excluded_item_whose_file_is_deleted_is_pruned_though_its_folder_is_otherwise_unchanged(extract, album, out):
    extract(album)
    for _ in range(2):
        assert counts(extract(album, exclude=["coin*", "raw"])) == (3, 3, 3, 0, 0)
    (album / "coins.png").unlink()
    (album / "raw" / "0.png").unlink()
    assert counts(extract(album, exclude=["coin*", "raw"], dry_run=True, prune=True)) == (3, 3, 1, 2, 0)
    ran = extract(album, exclude=["coin*", "raw"], prune=True)
    assert (*counts(ran), ran.deleted) == (3, 3, 1, 0, 0, 2)
    assert {row.path for row in open_store(out)}.isdisjoint({"coins.png", "raw/0.png"})
    quiet = state(out)
    for prune in (True, False):
        assert counts(extract(album, exclude=["coin*", "raw"], prune=prune)) == (3, 3, 1, 0, 0)
    assert state(out) == quiet


def test_a_run_that_looks_at_excluded_items_tallies_what_is_there(extract, album):
    extract(album)
    extract(album, exclude=["coins.png"])
    (album / "coins.png").unlink()
    add(album / "raw", "new.png", shift=50)  # something to do elsewhere
    for read in (1, 0):  # the second run has nothing to do
        ran = extract(album, exclude=["coins.png"])
        assert (ran.excluded, ran.not_found, ran.to_read) == (0, 1, read)


def test_a_file_that_moves_into_the_bin_is_deleted_and_not_met_again(extract, album, out):
    extract(album)
    shutil.move(album / "coins.png", album / "#recycle" / "coins.png")
    ran = extract(album, prune=True)
    assert (ran.deleted, ran.new, ran.moved, ran.excluded) == (1, 0, 0, 0)
    assert "coins.png" not in open_store(out)


def test_what_was_named_by_itself_is_taken_and_then_kept(extract, album, out):
    assert extract(album, album / "#recycle" / "0.png", exclude=["raw"]).new == 5
    for _ in range(2):
        assert counts(extract(album, exclude=["raw"])) == (4, 4, 1, 0, 0)
    add(album / "#recycle", "0.png", shift=99)  # changed, and named again
    assert extract(album, album / "#recycle" / "0.png", exclude=["raw"]).modified == 1


def test_a_file_beside_its_folder_is_counted_once(extract, some_photos):
    (some_photos / "x.dat").write_bytes((some_photos / "coins.png").read_bytes()[:-1] + b"\0")
    os.utime(some_photos / "x.dat", OLD)
    for _ in range(2):
        assert extract(some_photos, some_photos / "x.dat", checksum=True).found == 5


def test_a_rebuild_drops_nothing_that_is_excluded(extract, taken, out):
    with pytest.raises(UsageError, match=r"2 items of the store are excluded now \(#recycle/0\.png, .*purge"):
        extract(taken, rebuild=True, prune=True)
    assert extract(taken, rebuild=True, exclude=["!#recycle"]).encoded == 8


def test_a_known_folder_is_not_listed_out_though_something_in_it_is_left_out(extract, taken, monkeypatch):
    extract(taken, exclude=["coins.png"])
    listed = []
    real = LocalFolders.list
    monkeypatch.setattr(
        LocalFolders, "list", lambda self, known: (listed.append(one) or one for one in real(self, known))
    )
    extract(taken, exclude=["coins.png"])
    assert listed and all(listing.known for listing in listed if listing.number)


def test_a_run_with_nothing_to_do_says_nothing_and_json_says_it(extract, taken, out, run_cli):
    words = ["extract", taken, "--model", "fake", "--out", out]
    assert run_cli(*words) == (0, "", "")
    code, printed, said = run_cli(*words, "--json", "--exclude", "coins.*", "--exclude", "raw")
    summary = json.loads(printed)
    assert (code, said) == (0, "")
    assert [summary[name] for name in ("found", "excluded", "excluded_files", "excluded_folders")] == [3, 5, 1, 2]
    assert summary["left_out"] == {".cr2": 2}
    code, printed, _ = run_cli(*words, "--dry-run")
    assert code == 0
    assert "left out: 2 .cr2, 1 .psd, which nothing here reads\nexcluded: 1 folder\n" in printed
    assert "2 items of the store are excluded now, and left as they are; --exclude" not in printed
    add(taken, "new.png", shift=50)
    code, _, said = run_cli(*words)
    assert code == 0 and "qvsplit: left out: 2 .cr2, 1 .psd" in said and "2 items of the store are excluded now" in said
    assert run_cli(*words, "--exclude", "a[")[0] == 2


# ------------------------------------------------------------------------------------- which folders belong to a store


def noted(out):
    return walks(LocalStorage(out))


def test_a_run_with_nothing_to_do_notes_how_it_walks(extract, album, out):
    def run(**options):
        assert not extract(album, **options).did_anything
        return noted(out)

    extract(album, videos=False)
    assert noted(out) == [Walk((str(album),), videos=False)]
    assert run(videos=False, dry_run=True) == noted(out)
    assert run(dry_run=True) == [Walk((str(album),), videos=False)]  # it leaves all as it is
    assert run() == [Walk((str(album),))]
    assert run(exclude=["*.gif"]) == [Walk((str(album),), ("*.gif",))]
    quiet = state(out)
    run(exclude=["*.gif"])
    assert state(out) == quiet


@pytest.mark.parametrize("content", [None, "", "{}", '[{"folders": ["/a"]}]'])
def test_a_run_with_nothing_to_do_cures_a_list_of_folders_that_is_lost(extract, album, out, content):
    extract(album)
    file = out / layout.WALKED
    file.unlink() if content is None else file.write_text(content)
    assert not extract(album).did_anything
    assert noted(out) == [Walk((str(album),))]


def test_folders_of_one_run_are_noted_together_and_of_single_files_that_there_are_none(extract, album, out, tmp_path):
    extract(album / "coins.png")
    assert noted(out) == []
    (out / layout.WALKED).unlink()
    extract(album / "coffee.png")
    assert noted(out) is None  # there may have been others
    (tmp_path / "z").mkdir()
    shutil.copyfile(album / "coins.png", tmp_path / "z" / "copy.png")
    extract(tmp_path / "z", album, album / "raw" / ".." / "raw", album)
    assert noted(out) == [Walk((str(tmp_path / "z"), str(album), str(album / "raw")))]
