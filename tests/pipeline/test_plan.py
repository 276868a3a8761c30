"""The plan: pure functions, by tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qvsplit.pipeline.plan import (
    Cures,
    Plan,
    PlanOptions,
    classify,
    failure_now,
    is_known,
    may_be_cured,
    nothing_to_do,
    plan,
    settle,
    tallies_after,
)  # fmt: skip
from qvsplit.sources.source import UNREADABLE, Listing, Presence, Scope, listing_digest
from qvsplit.store.catalogue import FolderTally
from qvsplit.store.row import deleted_row
from tests.support.fake_catalogue import FakeCatalogue, clip_rows, digest, failed_row, ok_row
from tests.support.fake_source import FakeSource, entry

ROOT = ("/photos", "")
SCOPE = Scope(("/photos",), ())


def listing(*names: str, path: str = "", size: int = 1, version: int = 1, **more) -> Listing:
    lines = tuple(f"{name}\0{size}\0{version}" for name in names)
    return Listing("/photos", path, lines, len(lines), **more)


def known(listed: Listing) -> Listing:
    return replace(listed, lines=(), known=True)


def paths(planned: Plan) -> list[str]:
    return [one.path for one in planned.to_read]


def planned_of(rows, *listings, options=PlanOptions(), tallies=None, scope=SCOPE) -> Plan:  # noqa: B008
    return plan(listings or [listing("a.png")], scope, FakeCatalogue(rows), tallies or {}, options)


# ------------------------------------------------------------------------------------------------ what is to be read


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (None, "to read"),
        (ok_row("a.png"), "unchanged"),
        (ok_row("a.png", size=2), "to read"),
        (ok_row("a.png", version="2"), "to read"),
        (ok_row("a.png", version=None), "to read"),  # it was too fresh to be trusted
        (ok_row("a.png", has_features=False), "to read"),  # they went with a shard
        (failed_row("a.png"), "failed before"),
        (failed_row("a.png", version="2"), "to read"),
        (failed_row("a.png", version=None, sha256=None), "to read"),
        (deleted_row(ok_row("a.png"), 2), "to read"),
        (ok_row("a.png", root="/other"), "to read"),  # another root's
    ],
)
def test_each_item_is_sorted_by_size_and_version(row, expected):
    planned = planned_of([row] if row is not None else [])
    counted = {"to read": len(planned.to_read), "unchanged": planned.unchanged, "failed before": planned.failed_before}
    assert counted == dict.fromkeys(counted, 0) | {expected: 1}
    assert planned.found == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (PlanOptions(), ["new.png"]),
        (PlanOptions(retry_failed=True), ["new.png", "bad.png"]),
        (PlanOptions(checksum=True), ["new.png", "bad.png", "known.png"]),  # what is tried again comes behind
    ],
)
def test_what_is_read_again_when_asked_for(options, expected):
    rows = [failed_row("bad.png"), ok_row("known.png")]
    planned = planned_of(rows, listing("bad.png", "known.png", "new.png"), options=options)
    assert paths(planned) == expected
    assert planned.found == len(planned.to_read) + planned.unchanged + planned.failed_before == 3


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_copys_features_may_be_anothers(version):
    copy = ok_row("a.png", content="same", has_features=False)
    home = ok_row("b.png", content="same", version=version)
    catalogue = FakeCatalogue([copy, home])
    assert is_known(copy, entry("a.png"), lambda content: catalogue.home(content) is not None)


CURES = Cures(("HEIF",), 60.0, 1000, "cpu")


@pytest.mark.parametrize(
    ("kind", "now", "expected"),
    [
        ("reader-missing", Cures(("HEIF", "JXL"), 60.0, 1000, "cpu"), True),
        ("reader-missing", Cures((), 60.0, 1000, "cpu"), False),
        ("reader-missing", Cures(("HEIF",), 90.0, 2000, "cuda"), False),
        ("timeout", Cures(("HEIF",), 60.1, 1000, "cpu"), True),
        ("timeout", Cures(("HEIF", "JXL"), 59.0, 2000, "cuda"), False),
        ("timeout", CURES, False),
        ("memory", Cures(("HEIF",), 60.0, 1001, "cpu"), True),
        ("memory", Cures(("HEIF",), 60.0, 1000, "cuda"), True),
        ("memory", Cures(("HEIF", "JXL"), 90.0, 999, "cpu"), False),
        ("content", Cures(("HEIF", "JXL"), 90.0, 2000, "cuda"), False),
    ],
)
def test_what_may_be_cured(kind, now, expected):
    row = failed_row("a.png", kind, media=json.dumps({"cures": CURES.to_json()}))
    assert may_be_cured(row, now) is expected
    assert paths(planned_of([row], options=PlanOptions(cures=now))) == (["a.png"] if expected else [])


@pytest.mark.parametrize(
    ("kind", "readers", "memory", "readable", "changed"),
    [
        ("reader-missing", ("HEIF", "JXL"), 1000, True, True),
        ("reader-missing", ("HEIF",), 2000, True, False),
        ("memory", (), 1001, True, True),
        ("memory", (), 1000, True, False),  # which device and which limit a run will have is not known
        ("timeout", ("JXL",), 2000, True, False),
        ("permission", (), 0, True, True),
        ("permission", (), 0, False, False),
        ("content", ("JXL",), 2000, True, False),
    ],
)
def test_advice_that_has_been_followed_is_not_given(kind, readers, memory, readable, changed):
    row = replace(failed_row("a.png", kind, media=json.dumps({"cures": CURES.to_json()})), error="install it")
    said = failure_now(row, readers, memory, readable=readable)
    assert said.startswith("failed for a reason that has changed since") if changed else said == "install it"


@pytest.mark.parametrize("media", [None, "no json", "[]", '{"cures": 3}', "[" * 60_000])
def test_a_failure_that_does_not_say_what_would_cure_it_is_told_as_it_is(media):
    row = replace(failed_row("a.png", "reader-missing", media=media), error="install it")
    assert failure_now(row, ("HEIF",), 1, readable=True) == "install it"


@pytest.mark.parametrize("readable", [False, True])
def test_what_may_not_be_read_is_tried_again_once_it_may(readable):
    row = failed_row("a.png", "permission")
    assert may_be_cured(row, CURES, readable=readable) is readable
    line = "a.png\0001\0001" + ("" if readable else UNREADABLE)
    planned = planned_of([row], Listing("/photos", "", (line,), 1))
    assert (paths(planned), planned.failed_before) == ((["a.png"], 0) if readable else ([], 1))


def test_what_is_known_stays_known_where_it_may_not_be_read_any_more():
    planned = planned_of([ok_row("a.png")], Listing("/photos", "", ("a.png\0001\0001" + UNREADABLE,), 1))
    assert (planned.to_read, planned.unchanged) == ((), 1)


@pytest.mark.parametrize(
    "media", [None, "{}", "no json", "[]", '{"cures": 3}', '{"cures": {"readers": 3}}', "[" * 60_000]
)
@pytest.mark.parametrize("kind", ["reader-missing", "timeout", "memory"])
def test_a_failure_that_does_not_say_what_would_cure_it(kind, media):
    """A foreign store's row must not end a run."""
    assert may_be_cured(failed_row("a.png", kind, media=media), Cures(("HEIF",), 1e9, 1 << 50, "cuda")) is False


def test_folders_that_are_known_are_counted_by_their_tallies():
    folders = [known(listing("a.png", "b.png")), listing("c.png", path="x")]
    planned = planned_of([ok_row("a.png"), failed_row("b.png")], *folders,
                         tallies={ROOT: FolderTally("d", 1, 1, 0)})  # fmt: skip
    assert (planned.found, planned.unchanged, planned.failed_before, paths(planned)) == (3, 1, 1, ["x/c.png"])
    assert planned.unseen == ()  # nothing is missing there


# --------------------------------------------------------------------------------------------- what no listing has


@pytest.mark.parametrize(
    ("row", "scope", "expected"),
    [
        (ok_row("gone.png"), SCOPE, True),
        (failed_row("gone.png"), SCOPE, True),
        (deleted_row(ok_row("gone.png"), 2), SCOPE, False),
        (ok_row("a.png"), SCOPE, False),  # listed
        (ok_row("x/gone.png"), Scope(("/photos/x",), ()), True),
        (ok_row("gone.png"), Scope(("/photos/x",), ()), False),
        (ok_row("gone.png"), Scope(("/phot",), ()), False),
        (ok_row("gone.png"), Scope(("/photos",), ("/photos",)), False),  # it may not be mounted
        (ok_row("gone.png", root="/other"), SCOPE, False),
        (ok_row("gone.png"), Scope(("/photos/gone.png",), ()), True),  # it was named itself
    ],
)
def test_rows_that_no_listing_has_are_looked_for_below_what_was_listed(row, scope, expected):
    assert planned_of([row], scope=scope).unseen == ((row,) if expected else ())


@pytest.mark.parametrize(("not_found", "expected"), [(0, []), (1, ["a.png", "b.png", "gone.png"])])
def test_in_a_known_folder_all_rows_are_looked_for_only_where_one_was_missing(not_found, expected):
    rows = [ok_row(name) for name in ("a.png", "b.png", "gone.png")]
    planned = planned_of(rows, known(listing("a.png", "b.png")), tallies={ROOT: FolderTally("d", 2, 0, not_found)})
    assert [row.path for row in planned.unseen] == expected


def settled(rows, presence, *listings, tallies=None, options=PlanOptions()) -> Plan:  # noqa: B008
    planned = planned_of(rows, *listings, tallies=tallies, options=options)
    found = {row.key: presence[row.path] for row in planned.unseen}
    return settle(planned, found, listings, FakeCatalogue(rows), options)


PRESENT = Presence("present", entry("odd.dat"))
CHANGED = Presence("present", entry("odd.dat", version="2"))


@pytest.mark.parametrize(
    ("presence", "counts"),
    [
        (Presence("absent"), {"absent": 1, "found": 1, "unchanged": 1}),
        (Presence("unknown"), {"found": 1, "unchanged": 1}),
        (Presence("unknown", empty_folder="/photos/disk"), {"absent": 1, "found": 1, "unchanged": 1, "empty": 1}),
        (PRESENT, {"found": 2, "unchanged": 2, "unlisted": 1}),
        (CHANGED, {"found": 2, "unchanged": 1, "to_read": 1, "unlisted": 1}),
    ],
)
def test_what_the_source_says_of_a_row_that_no_listing_has(presence, counts):
    planned = settled([ok_row("a.png"), ok_row("odd.dat")], {"odd.dat": presence}, listing("a.png"))
    got = {"found": planned.found, "unchanged": planned.unchanged, "to_read": len(planned.to_read),
           "absent": len(planned.absent), "unlisted": len(planned.unlisted), "empty": len(planned.empty_folders)}  # fmt: skip
    assert got == dict.fromkeys(got, 0) | counts


def test_a_file_in_a_known_folder_is_counted_by_its_tally_alone():
    """After a deletion the folder's rows are all looked for, and those that exist were counted already."""
    rows = [ok_row("1.png"), ok_row("2.png"), ok_row("3.png"), ok_row("x/4.png")]
    presence = {"1.png": Presence("absent"), "2.png": Presence("present", entry("2.png")),
                "3.png": Presence("present", entry("3.png"))}  # fmt: skip
    listings = [known(listing("2.png", "3.png")), listing("4.png", "5.png", path="x")]
    planned = settled(rows, presence, *listings, tallies={ROOT: FolderTally("d", 2, 0, 1)})
    assert (planned.found, planned.unchanged, paths(planned)) == (4, 3, ["x/5.png"])
    assert [row.path for row in planned.absent] == ["1.png"]
    assert planned.unlisted == frozenset()


def test_a_plan_by_a_source():
    source = FakeSource({("/photos", "a.png"): (1, 1), ("/photos", "x/b.png"): (1, 2)}, away=[("/photos", "away.png")])
    rows = [ok_row("a.png"), ok_row("x/b.png"), ok_row("gone.png"), ok_row("away.png")]
    listings = list(source.list({}))
    planned = plan(listings, source.scope, FakeCatalogue(rows), {})
    planned = settle(planned, source.stat([row.key for row in planned.unseen]), listings, FakeCatalogue(rows))
    assert (planned.found, planned.unchanged, paths(planned)) == (2, 1, ["x/b.png"])
    assert [row.path for row in planned.absent] == ["gone.png"]


# ----------------------------------------------------------------------------------------------- what has happened


SAME, OTHER = (digest("a.png"), 0), (digest("other"), 0)


@pytest.mark.parametrize(
    ("current", "content", "held", "moved", "change"),
    [
        (None, OTHER, False, False, "new"),
        (deleted_row(ok_row("a.png"), 2), OTHER, False, False, "new"),
        (ok_row("a.png"), OTHER, False, False, "modified"),
        (ok_row("a.png"), SAME, False, False, "re-encoded"),  # its features were lost
        (failed_row("a.png"), OTHER, False, False, "re-encoded"),
        (failed_row("a.png"), SAME, False, False, "re-encoded"),
        (ok_row("a.png"), SAME, True, False, "metadata changed"),
        (ok_row("a.png"), SAME, True, True, "metadata changed"),
        (None, OTHER, True, False, "copied"),
        (None, OTHER, True, True, "moved"),
        (ok_row("a.png"), OTHER, True, False, "copied"),
        (ok_row("a.png"), OTHER, True, True, "moved"),
        (failed_row("a.png"), SAME, True, False, "copied"),
        (deleted_row(ok_row("a.png"), 2), SAME, True, False, "copied"),
        (clip_rows("a.png", 3)[1], SAME, True, False, "metadata changed"),  # whichever part it is
        (clip_rows("a.png", 3)[1], SAME, False, False, "re-encoded"),
        (clip_rows("a.png", 3)[1], OTHER, False, False, "modified"),
    ],
)
def test_what_has_happened_to_an_item(current, content, held, moved, change):
    assert classify(current, content, held=held, moved=moved) == change


# ------------------------------------------------------------------------------------------------- nothing to do


def tallies_of(**folders: tuple) -> dict[tuple[str, str], FolderTally]:
    return {("/photos", path.strip("_")): FolderTally(*tally) for path, tally in folders.items()}


TWO = {"_": ("d", 2, 1, 0), "x": ("e", 4, 0, 0)}
BOTH = [known(listing("a.png", "b.png", "c.png")), known(listing(*"1234", path="x"))]


@pytest.mark.parametrize(
    ("folders", "listings", "scope", "prune", "expected"),
    [
        (TWO, BOTH, SCOPE, False, (6, 1, 0)),
        (TWO, BOTH, SCOPE, True, (6, 1, 0)),
        (TWO, BOTH[1:], Scope(("/photos/x",), ()), False, (4, 0, 0)),  # other paths are none of its business
        (TWO, [BOTH[0], listing("1.png", path="x")], SCOPE, False, None),  # one has changed
        (TWO, BOTH[:1], SCOPE, False, None),  # one is no longer there
        (TWO, BOTH, Scope(("/photos", "/disk"), ("/disk",)), False, None),  # a path holds nothing
        (TWO, [*BOTH, listing(path="y")], SCOPE, False, (6, 1, 0)),  # an empty folder
        (TWO, [*BOTH, listing("n.png", path="y")], SCOPE, False, None),  # a new one
        (TWO | {"y": ("d", 1, 0, 0)}, [*BOTH, listing(path="y")], SCOPE, False, None),  # emptied
        (TWO | {"y": ("", 0, 0, 2)}, BOTH, SCOPE, False, (6, 1, 2)),  # of a folder that was not found
        (TWO | {"y": ("", 0, 0, 2)}, BOTH, SCOPE, True, None),  # which may go now
        ({}, [], SCOPE, False, (0, 0, 0)),
    ],
)
def test_nothing_to_do(folders, listings, scope, prune, expected):
    total = nothing_to_do(tallies_of(**folders), (), listings, scope, prune=prune)
    assert total == (None if expected is None else FolderTally("", *expected))


# ------------------------------------------------------------------------------------------------------ tallies


def tallied(rows, *listings, planned=None, before=None, scope=SCOPE):
    catalogue = FakeCatalogue(rows)
    planned = planned or Plan(0, (), 0, 0)
    return tallies_after(
        planned, listings, scope, before or {}, lambda key: catalogue.current(*key), catalogue.holds
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ok_row("a.png"), (1, 0)),
        (failed_row("a.png"), (0, 1)),
        (None, None),  # left for another run
        (ok_row("a.png", version=None), None),  # too fresh: to be read again
        (ok_row("a.png", size=7), None),
        (ok_row("a.png", version="7"), None),
        (ok_row("a.png", has_features=False), None),
        (deleted_row(ok_row("a.png"), 2), None),
        (failed_row("a.png", version=None), None),  # could not be opened
    ],
)
def test_a_folder_is_tallied_where_nothing_is_left_to_do(row, expected):
    listed = listing("a.png")
    tallies = tallied([row] if row else [], listed)
    assert tallies == ({} if expected is None else {ROOT: FolderTally(listed.digest, *expected, 0)})
    if expected:
        assert listed.digest == listing_digest(listed.lines)


def test_a_folder_of_which_only_some_files_were_looked_at_is_not_tallied():
    one, some = ok_row("a.png"), listing("a.png", complete=False)
    assert tallied([one], some) == {}
    planned = plan([some], SCOPE, FakeCatalogue([one]), {})
    assert planned.settled == {ROOT: (1, 0)} and tallied([one], some, planned=planned) == {}
    assert tallied([one], listing("a.png"), planned=planned)[ROOT].ok == 1
    assert tallied([], listing()) == {}  # nor is an empty one


def test_rows_whose_file_was_not_found_are_tallied():
    gone, pruned = ok_row("gone.png"), ok_row("x/pruned.png")
    rows = [ok_row("a.png"), gone, deleted_row(pruned, 2), ok_row("y/gone.png")]
    planned = Plan(0, (), 0, 0, absent=(gone, pruned, ok_row("y/gone.png")))
    listed = listing("a.png")
    assert tallied(rows, listed, planned=planned) == {
        ROOT: FolderTally(listed.digest, 1, 0, 1),
        ("/photos", "y"): FolderTally("", 0, 0, 1),  # which no listing has
    }


def test_tallies_of_known_folders_and_of_other_paths_stay():
    before = {ROOT: FolderTally("d", 2, 1, 5), ("/other", ""): FolderTally("o", 1, 0, 0),
              ("/photos", "x"): FolderTally("x", 1, 0, 0)}  # fmt: skip
    tallies = tallied([], known(listing("a.png", "b.png", "c.png")), before=before)
    assert tallies == {ROOT: FolderTally("d", 2, 1, 0), ("/other", ""): FolderTally("o", 1, 0, 0)}


def test_a_folder_of_another_path_in_which_a_row_was_written_is_not_tallied():
    """The file was named by itself, and the walk may not list it."""
    catalogue, before = FakeCatalogue([ok_row("odd.dat")]), {ROOT: FolderTally("d", 2, 1, 0)}
    for touched, expected in (((), before), ({ROOT}, {})):
        listed = [listing("odd.dat", complete=False)]
        assert tallies_after(Plan(1, (), 0, 0), listed, Scope(("/photos/odd.dat",), ()), before,
                             lambda key: catalogue.current(*key), lambda content: True, touched) == expected  # fmt: skip


def test_a_folder_with_a_file_that_no_listing_has_is_listed_every_time():
    planned = Plan(0, (), 0, 0, unlisted=frozenset({ROOT}))
    tallies = tallied([ok_row("a.png")], listing("a.png"), planned=planned)
    assert tallies[ROOT].digest not in ("", listing("a.png").digest)
    assert nothing_to_do(tallies_of(_=("unlisted", 0, 0, 0)), (), [listing("a.png")], SCOPE, prune=False) is None


def test_what_a_plan_tallies_is_nothing_to_do_for_the_next():
    """The circle: listings, plan, rows, tallies; and the listings of the next run."""
    source = FakeSource({("/photos", "a.png"): (1, 1), ("/photos", "bad.png"): (1, 1), ("/photos", "x/b.png"): (1, 1)})
    rows = [ok_row("a.png"), failed_row("bad.png"), ok_row("x/b.png"), ok_row("x/gone.png")]
    planned = plan(list(source.list({})), source.scope, FakeCatalogue(rows), {})
    listings = list(source.list({}))
    planned = settle(planned, source.stat([row.key for row in planned.unseen]), listings, FakeCatalogue(rows))
    tallies = tallied(rows, *listings, planned=planned)
    again = list(source.list({folder: tally.digest for folder, tally in tallies.items()}))
    assert [one.known for one in again] == [True, True]
    assert nothing_to_do(tallies, (), again, source.scope, prune=False) == FolderTally("", 2, 1, 1)
    assert nothing_to_do(tallies, [("/photos", "y")], again, source.scope, prune=False) is None
    assert nothing_to_do(tallies, [("/other", "y")], again, source.scope, prune=False) is not None
    source.items["/photos", "x/b.png"] = (1, 2)
    again = list(source.list({folder: tally.digest for folder, tally in tallies.items()}))
    assert nothing_to_do(tallies, (), again, source.scope, prune=False) is None


# ------------------------------------------------------------------------------------------------------ several parts


def without(rows: list, lost: int) -> list:
    """Rows of which one has no features of its own."""
    return [replace(row, has_features=row.has_features and row.part != lost) for row in rows]


CLIP = clip_rows("c.mp4", 3)
BROKEN = failed_row("c.mp4", kind="content", part=1, start=1.0, end=2.0, duration=3.0)
EXPECTED_OF_A_VIDEO = [
    (CLIP, "unchanged"),
    (clip_rows("c.mp4", 3, version="2"), "to read"),
    *((without(CLIP, lost), "to read") for lost in range(3)),  # features of one part went with a shard
    (CLIP[:2], "to read"),  # a row did
    (CLIP[1:], "to read"),
    ([CLIP[0], CLIP[2]], "to read"),
    ([CLIP[0], BROKEN, CLIP[2]], "failed before"),
    ([failed_row("c.mp4")], "failed before"),
    ([deleted_row(row, 2) for row in CLIP], "to read"),
]


@pytest.mark.parametrize(("rows", "expected"), EXPECTED_OF_A_VIDEO)
def test_a_video_in_several_parts_is_one_item(rows, expected):
    planned = planned_of(rows, listing("c.mp4"))
    counted = {"to read": len(planned.to_read), "unchanged": planned.unchanged, "failed before": planned.failed_before}
    assert counted == dict.fromkeys(counted, 0) | {expected: 1} and planned.found == 1
    settled_as = {"unchanged": {ROOT: (1, 0)}, "failed before": {ROOT: (0, 1)}, "to read": {}}
    assert planned.settled == settled_as[expected]


@pytest.mark.parametrize(("rows", "expected"), EXPECTED_OF_A_VIDEO)
def test_and_it_is_tallied_as_one(rows, expected):
    listed, counts = listing("c.mp4"), {"unchanged": (1, 0), "failed before": (0, 1)}
    tallies = tallied(rows, listed)
    assert tallies == ({ROOT: FolderTally(listed.digest, *counts[expected], 0)} if expected in counts else {})


@pytest.mark.parametrize("order", [1, -1])
def test_a_video_that_no_listing_has_is_looked_for_once(order):
    rows = [*clip_rows("gone.mp4", 3), *clip_rows("x/gone.mp4", 2)][::order]
    planned = planned_of([ok_row("a.png"), *rows])
    assert [(row.path, row.part) for row in planned.unseen] == [("gone.mp4", 0), ("x/gone.mp4", 0)]
    found = settle(planned, {row.key: Presence("absent") for row in planned.unseen}, [listing("a.png")],
                   FakeCatalogue(rows))  # fmt: skip
    assert len(found.absent) == 2
    tallies = tallied([ok_row("a.png"), *rows], listing("a.png"), planned=found)
    assert [tally.not_found for tally in tallies.values()] == [1, 1]


@pytest.mark.parametrize(("rows", "expected"), [(CLIP, "unchanged"), (without(CLIP, 2), "to_read")])
def test_a_video_that_exists_and_no_listing_has_is_counted_once(rows, expected):
    presence = {"c.mp4": Presence("present", entry("c.mp4"))}
    planned = settled([ok_row("a.png"), *rows], presence, listing("a.png"))
    assert (planned.found, planned.unchanged, len(planned.to_read)) == {"unchanged": (2, 2, 0), "to_read": (2, 1, 1)}[
        expected
    ]


def test_a_video_of_which_all_parts_are_copies_is_known():
    copy = [replace(row, has_features=False) for row in clip_rows("copy.mp4", 3, content="c.mp4")]
    assert planned_of([*CLIP, *copy], listing("c.mp4", "copy.mp4")).unchanged == 2
    assert paths(planned_of([*without(CLIP, 2), *copy], listing("c.mp4", "copy.mp4"))) == ["c.mp4", "copy.mp4"]
