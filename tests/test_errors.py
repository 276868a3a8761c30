"""Errors: one line, an exit code, and they may be passed between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvsplit import errors

EVERY = [
    errors.QvsplitError("what"), errors.QvsplitWarning("what"), errors.UsageError("what"), errors.ModelError("what"), errors.OutOfMemory("what"),
    errors.RequestError("what"),
    errors.WeightsError("/m", missing=["b", "a"], unexpected=["c"], misshapen={"d": "is 2, not 3"}),
    errors.ConfigError("what"), errors.StoreInUse("what"), errors.StoreDamaged("what"),
    errors.ShardDamaged("what", "/store/shard-000001.parquet", "its footer"), errors.ShardNotFound("what"), errors.DiskError("what"), errors.ProcessError("what"),
    errors.ItemError("what", "timeout"), errors.ItemError("what"), errors.ItemNotFound("what"),
]  # fmt: skip


def test_no_error_is_left_out():
    classes = {one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, Exception)}
    assert classes == {type(one) for one in EVERY}


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_it_survives_pickling_with_all_it_says(error):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        survives_pickling(error, protocol)


def survives_pickling(error, protocol):
    for back in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(back) is type(error) and str(back) == str(error)
        for name in ("exit_code", "kind", "path", "what", "missing", "unexpected", "misshapen"):
            assert getattr(back, name, None) == getattr(error, name, None)
        assert pickle.dumps(back, protocol) == pickle.dumps(error, protocol)


def test_exit_codes():
    codes = {type(one).__name__: one.exit_code for one in EVERY if isinstance(one, errors.QvsplitError)}
    assert codes == {
        "QvsplitError": 70, "UsageError": 2, "ModelError": 3, "OutOfMemory": 3, "RequestError": 3, "WeightsError": 3,
        "ConfigError": 4, "StoreInUse": 5, "StoreDamaged": 6, "ShardDamaged": 6, "ShardNotFound": 6, "DiskError": 7, "ProcessError": 70,
    }  # fmt: skip
    assert (errors.ITEMS_FAILED, errors.CHECKS_FLAGGED, errors.BUG) == (1, 8, 70)
    assert (errors.INTERRUPTED, errors.TERMINATED) == (130, 143)


@pytest.mark.parametrize("make", [errors.QvsplitError, errors.ItemError])
def test_a_message_is_one_printable_line(make):
    assert str(make("a\n  b\x1b[31m\u202e")) == "a b\\x1b[31m\\u202e"
    assert str(make("a  b\u202f\u00a0\u3000c\td")) == "a  b\u202f\u00a0\u3000c\\x09d"  # they may be of a name
    assert str(make("\n")) == ""


NAMES = st.text(
    st.one_of(st.sampled_from(list("\\xuU0123456789abcdefn \t\n\x1b\u202e\u00a0\u2028\udc80")), st.characters())
)


@given(NAMES)
def test_what_is_printed_of_a_name_can_be_turned_back(name):
    printed = errors.escaped(name)
    assert errors.unescaped(printed) == name
    assert printed == errors.printable(printed) == errors.on_one_line(printed) and len(printed.splitlines()) <= 1


@given(NAMES, st.sampled_from(["ascii", "latin-1", "utf-8"]))
def test_nor_is_anything_lost_where_the_encoding_of_a_stream_ends(name, encoding):
    stream = errors.escaped(name).encode(encoding, "backslashreplace")
    assert errors.unescaped(stream.decode(encoding)) == name


def test_two_names_never_print_alike():
    names = ["a b", "a  b", "a\u00a0b", "a\tb", "a\\x09b", "a\\x5cx09b", "a\nb", "a\\nb", "a\\\nb", "a\x1bb", "a\\x1bb"]
    assert len({errors.escaped(name) for name in names}) == len(names)
    assert errors.escaped("2019\\new\\temp.jpg") == "2019\\new\\temp.jpg"  # as Windows packs it, and as it is
    assert errors.unescaped("\\Uffffffff") == "\\Uffffffff"


def test_an_item_error_has_a_kind_that_rows_know():
    assert errors.ItemError("x").kind == "content"
    with pytest.raises(ValueError, match="no kind of error"):
        errors.ItemError("x", "solar-flare")
