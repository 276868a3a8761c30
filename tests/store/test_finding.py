"""Rows are found by what a user types or pastes."""

from __future__ import annotations

import pytest

from qvsplit.errors import UsageError, escaped
from qvsplit.runtime.names import name_on_disk, stored_name
from qvsplit.store.finding import matching, named
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
    with pytest.raises(UsageError, match=r"store\[name\]: give the name of an image, not int 5"):
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
