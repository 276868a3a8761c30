"""Rows are found by what a user types or pastes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvsplit.errors import UsageError, escaped
from qvsplit.runtime.names import name_on_disk, stored_name
from qvsplit.store.finding import below, hint, matching, named
from qvsplit.store.opening import read_store
from tests.support import rows
from tests.support.memory_storage import MemoryStorage

NFC, NFD = "f\u00fcr dich.png", "fu\u0308r dich.png"
ODD = ["two  blanks.png", "nar\u202frow.png", "no\u00a0break.png", "wide\u3000.png", "line\nbreak.png", "tab\t.png",
       "back\\slash.png", "\\x41.png", "turn\u202e.png", "byte\udcff.png"]  # fmt: skip
PATHS = ["a.png", "x/a.png", "x/y/b.png", "[2024] c.png", "d*.png", "dd.png", "x/D.JPG", NFD, *map(stored_name, ODD)]


@pytest.fixture
def store():
    other = rows.item("a.png", root="/other")
    return read_store(rows.write_store(MemoryStorage(), [*map(rows.item, PATHS), other]))


def found(store, text, by=matching) -> list[str]:
    return [f"{row.root}:{row.path}" for row in by(store.catalogue, text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x/a.png", ["/photos:x/a.png"]),
        ("a.png", ["/other:a.png", "/photos:a.png"]),  # a path first, then file names
        ("b.png", ["/photos:x/y/b.png"]),
        ("/photos/a.png", ["/photos:a.png"]),
        ("/photos/x/y/b.png", ["/photos:x/y/b.png"]),
        ("[2024] c.png", ["/photos:[2024] c.png"]),  # the name itself, not the glob
        ("d*.png", ["/photos:d*.png"]),
        ("x/*", ["/photos:x/D.JPG", "/photos:x/a.png", "/photos:x/y/b.png"]),
        ("x/?.png", ["/photos:x/a.png"]),
        ("/photos/x/*", ["/photos:x/D.JPG", "/photos:x/a.png", "/photos:x/y/b.png"]),
        ("?.png", ["/other:a.png", "/photos:a.png", "/photos:x/a.png", "/photos:x/y/b.png"]),
        ("y/b.png", []),
        ("b", []),
        ("", []),
        ("A.PNG", []),
    ],
)
def test_a_name_a_path_or_a_glob(store, text, expected):
    assert found(store, text) == expected


@pytest.mark.parametrize("text", [NFC, NFD, "f?r dich.png", "*\u00fc*", "*u\u0308*"])
def test_either_form_of_unicode_matches(store, text):
    assert found(store, text) == [f"/photos:{NFD}"]


@pytest.mark.parametrize("name", ODD)
def test_what_was_printed_can_be_pasted(store, name):
    stored = stored_name(name)
    assert name_on_disk(stored) == name
    for text in (name, escaped(name)):
        assert found(store, text) == found(store, text, named) == [f"/photos:{stored}"]
        assert store[text].path == stored and text in store
    assert f"/photos:{stored}" in found(store, f"*{escaped(name)}")


def test_a_store_gives_a_row_by_its_name(store):
    assert store["x/a.png"].path == "x/a.png" and store["b.png"].path == "x/y/b.png"
    assert store["b.png"] in store and rows.row("b.png") not in store and 5 not in store
    with pytest.raises(KeyError, match="has no image named none.png"):
        store["none.png"]
    with pytest.raises(UsageError, match=r"several images named a.png \(/other/a.png, /photos/a.png\); give the whole"):
        store["a.png"]
    with pytest.raises(UsageError, match=r"store\[name\]: give the name of an image or video, not int 5"):
        store[5]


def test_a_deleted_image_is_not_in_the_store():
    store = read_store(rows.write_store(MemoryStorage(), [(rows.deleted("a.png"), None), (rows.failed("b.png"), None)]))
    assert "a.png" not in store and "b.png" in store and store["b.png"].status == "failed"
    with pytest.raises(KeyError):
        store["a.png"]
    assert found(store, "a.png") == ["/photos:a.png"]  # whoever selects hears that it was deleted


def test_thousands_that_match_are_found_like_a_few(store, monkeypatch):
    few = found(store, "*")
    monkeypatch.setattr("qvsplit.store.catalogue._MANY", 3)
    assert found(store, "*") == few and len(few) == len(PATHS) + 1


# ----------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def videos():
    """Videos cut into parts, one that is whole, and files whose names look like those of parts."""
    pairs = [*rows.parts("a.mp4", 12), *rows.parts("x/b.mp4", 2), rows.item("whole.mp4", kind="video"),
             *rows.parts("one.mp4", 1), rows.item("a.mp4#3"), rows.item("x/b.mp4#1.png"), *rows.parts("odd#5", 2),
             *rows.parts("[1] c.mp4", 2)]  # fmt: skip
    return read_store(rows.write_store(MemoryStorage(), pairs))


def names(store, text, by=matching) -> list[str]:
    return [row.name for row in by(store.catalogue, text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.mp4", [f"a.mp4#{part}" for part in range(12)]),
        ("a.mp4#11", ["a.mp4#11"]),
        ("/photos/a.mp4#0", ["a.mp4#0"]),
        ("b.mp4#1", ["x/b.mp4#1"]),
        ("a.mp4#3", ["a.mp4#3"]),  # the file
        ("odd#5", ["odd#5#0", "odd#5#1"]),
        ("odd#5#1", ["odd#5#1"]),
        ("[1] c.mp4#1", ["[1] c.mp4#1"]),
        ("[1] c.mp4#*", ["[1] c.mp4#0", "[1] c.mp4#1"]),
        ("whole.mp4", ["whole.mp4"]),
        ("one.mp4", ["one.mp4#0"]),
        ("one.mp4#0", ["one.mp4#0"]),
        ("x/*", ["x/b.mp4#0", "x/b.mp4#1", "x/b.mp4#1.png"]),
        ("*b.mp4#1*", ["x/b.mp4#1", "x/b.mp4#1.png"]),
        ("a.mp4#1?", ["a.mp4#10", "a.mp4#11"]),
        ("*.mp4#1", ["[1] c.mp4#1", "a.mp4#1", "x/b.mp4#1"]),
        ("a.mp4#[2-4]", ["a.mp4#2", "a.mp4#3", "a.mp4#4", "a.mp4#3"]),  # the part, and the file
        *((text, []) for text in ("a.mp4#12", "a.mp4#01", "a.mp4#", "a.mp4#-1", "whole.mp4#0", "#1", "#", "a.mp4#x")),
    ],
)
def test_a_part_has_its_number_behind_the_name(videos, text, expected):
    assert names(videos, text) == expected


def test_every_row_is_found_by_its_name_but_where_a_file_has_it(videos):
    for row in videos.rows:
        assert row.name in videos
        found = videos[row.name]
        assert found == row or (found.path == row.name == "a.mp4#3")


def test_a_store_gives_no_part_of_its_own_choice(videos):
    for name in ("a.mp4", "/photos/a.mp4"):
        with pytest.raises(
            UsageError, match=r"a\.mp4 has 12 parts, .*, a\.mp4#0 to a\.mp4#11, or take all with `store\.m"
        ):
            videos[name]
    assert videos["one.mp4"].name == "one.mp4#0"  # its only one
    assert len(videos.matching("a.mp4")) == 12
    assert rows.raws(videos.features("x/b.mp4#1")) == rows.raws(rows.parts("x/b.mp4", 2)[1][1])
    with pytest.raises(KeyError, match=r"has no image named a\.mp4#12"):
        videos["a.mp4#12"]


# ------------------------------------------------------------------------------------------------- what was not found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[2024]*", ["[2024] c.png"]),  # as a class it matches nothing
        ("*/[2024]*", ["[2024] c.png"]),  # by the whole path
        ("x/[2024]*", []),
        ("[2024]?c.*", ["[2024] c.png"]),
        ("[dx]*.png", ["d*.png", "dd.png", "x/a.png", "x/y/b.png"]),  # a class that matches is one
    ],
)
def test_brackets_that_match_nothing_as_a_class_are_themselves(store, text, expected):
    assert names(store, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("X/Y/B.PNG", "; x/y/b.png differs in upper and lower case, or in the kind of blanks, alone"),
        ("d.jpg", "; x/D.JPG differs"),
        ("*.jpg", "; x/D.JPG differs"),
        ("/PHOTOS/x/d.jpg", "; x/D.JPG differs"),
        ("F\u00dcR DICH.PNG", f"; {NFD} differs"),
        ("f\u00fcr\u00a0dich.png", f"; {NFD} differs"),
        ("nar row.png", "; nar\u202frow.png differs"),
        ("[2024] C.png", "; [2024] c.png differs"),
        ("[2024]\u3000*", "; [2024] c.png differs"),
        ("*A.PNG", "; a.png, x/a.png differ"),
        ("BYTE\\udcff.png", "; byte\\udcff.png differs"),
        ("two blank.png", "; did you mean two  blanks.png?"),
        ("x/y/c.png", "; did you mean x/y/b.png or x/a.png?"),
        ("ddd.png", "; did you mean dd.png or d*.png?"),
        ("holiday.mov", ""),
        ("*.nef", ""),
        ("", ""),
    ],
)
def test_what_names_nothing_may_have_meant(store, text, expected):
    assert matching(store.catalogue, text) == []
    found = hint(store.catalogue, text)
    assert found.startswith(expected) and bool(found) == bool(expected)


def test_a_hint_leaves_out_what_was_deleted_and_is_given_for_few_names_only(store, monkeypatch):
    gone = read_store(rows.write_store(MemoryStorage(), [(rows.deleted("a.png"), None), rows.item("b.png")]))
    assert hint(gone.catalogue, "A.PNG") == "; did you mean b.png?"
    monkeypatch.setattr("qvsplit.store.finding._MOST_COMPARED", len(PATHS))
    assert hint(store.catalogue, "ddd.png") == ""  # there is one more


@given(st.sampled_from(ODD + PATHS), st.data())
def test_whatever_is_printed_of_a_name_names_it(name, data):
    """In text and in TSV alike: both print `escaped`."""
    stored = stored_name(name)
    store = read_store(rows.write_store(MemoryStorage(), list(map(rows.item, dict.fromkeys([stored, *PATHS])))))
    printed = escaped(data.draw(st.sampled_from([name_on_disk(stored), f"/photos/{name_on_disk(stored)}"])))
    assert "\t" not in printed and "\n" not in printed
    assert stored in names(store, printed)


@pytest.mark.parametrize("name", [*PATHS, *ODD])
def test_a_path_from_where_the_command_runs_names_its_file(tmp_path, monkeypatch, name):
    stored = stored_name(name)
    root = tmp_path / "photos"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(root)
    store = read_store(
        rows.write_store(MemoryStorage(), [rows.item(stored, root=str(root)), rows.item("z", root="/r")])
    )
    for place, folder in (
        (tmp_path, "photos"),
        (tmp_path, "link"),
        (tmp_path / "elsewhere", "../photos"),
        (tmp_path, "./photos"),
    ):
        monkeypatch.chdir(place)
        assert found(store, escaped(f"{folder}/{name_on_disk(stored)}")) == [f"{root}:{stored}"]
    assert found(store, "elsewhere/nothing.png") == []


@pytest.mark.parametrize("name", ["z\u00fcrich", "zu\u0308rich", "/photos/z\u00fcrich/", "z\u00fcrich/a.png"])
@pytest.mark.parametrize("by_place", [True, False])
def test_a_folder_is_named_in_either_form_of_unicode_and_as_it_was_typed_first(name, by_place):
    nfc, nfd = "z\u00fcrich/a.png", "zu\u0308rich/a.png"
    if by_place:
        name = f"/photos/{name.removeprefix('/photos/')}"
    elif name.startswith("/"):
        return
    both = read_store(rows.write_store(MemoryStorage(), [rows.item(nfc), rows.item(nfd), rows.item("z")]))
    assert [row.path for row in below(both.catalogue, name, by_place=by_place)] == [nfd if "zu\u0308" in name else nfc]
    for there in (nfc, nfd):
        one = read_store(rows.write_store(MemoryStorage(), [rows.item(there), rows.item("z")]))
        assert [row.path for row in below(one.catalogue, name, by_place=by_place)] == [there]


def test_a_file_above_the_target_of_a_link_is_the_one_that_opens(tmp_path, monkeypatch):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    items = [rows.item("a.png", root=str(tmp_path)), rows.item("a.png", root=str(tmp_path / "real"))]
    store = read_store(rows.write_store(MemoryStorage(), items))
    monkeypatch.chdir(tmp_path)
    for name in ("link/../a.png", str(tmp_path / "link" / ".." / "a.png")):
        assert [row.root for row in below(store.catalogue, name, by_place=True)] == [str(tmp_path / "real")]
    assert [row.root for row in matching(store.catalogue, "link/../a.png")] == [str(tmp_path / "real")]
