"""What a filter selects, and what is said where it selects nothing."""

import pytest

from qvsplit.answering.selection import select
from qvsplit.errors import UsageError
from qvsplit.store.opening import read_store
from tests.support import rows
from tests.support.memory_storage import MemoryStorage


@pytest.fixture
def store():
    failed, gone = rows.failed("x/torn.jpg"), rows.deleted("gone.jpg")
    pairs = [rows.item("a.jpg"), rows.item("IMG_1.JPG"), (failed, None), (gone, None)]
    return read_store(rows.write_store(MemoryStorage(), pairs))


@pytest.mark.parametrize("names", [["torn.jpg"], ["x/*"], ["*torn*"]])
def test_what_has_failed_is_given_with_its_reason(store, names):
    selection = select(store, names)
    assert (selection.rows, [row.path for row in selection.failed]) == ([], ["x/torn.jpg"])
    assert selection.failed[0].error
    with pytest.raises(UsageError, match=f"x/torn.jpg has failed: {selection.failed[0].error}"):
        select(store, names, only=1)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["img_1.jpg"], r"`image` img_1\.jpg matches none of the store's 2 images; IMG_1\.JPG differs in upper and"),
        (["*.Jpg"], r"\*\.Jpg matches none of the store's 2 images; IMG_1\.JPG, a\.jpg, x/torn\.jpg differ in"),
        (["a.jpg", "img1.jpg"], r"`image` img1\.jpg matches none of .*; did you mean IMG_1\.JPG\?"),  # one of several
        (["*.nef"], r"\*\.nef matches none of the store's 2 images$"),
        (["gone.jpg"], r"gone\.jpg has been deleted from"),
    ],
)
def test_what_selects_nothing_is_said_with_what_may_have_been_meant(store, names, said):
    with pytest.raises(UsageError, match=said):
        select(store, names)
