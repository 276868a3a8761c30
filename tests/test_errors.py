"""Errors: one line, an exit code, and they may be passed between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from qvsplit import errors

EVERY = [
    errors.QvsplitError("what"), errors.UsageError("what"), errors.ModelError("what"), errors.OutOfMemory("what"),
    errors.WeightsError("/m", missing=["b", "a"], unexpected=["c"], misshapen={"d": "is 2, not 3"}),
    errors.ConfigError("what"), errors.StoreInUse("what"), errors.StoreDamaged("what"),
    errors.ShardDamaged("what", "/store/shard-000001.parquet", "its footer"), errors.DiskError("what"), errors.ProcessError("what"),
    errors.ItemError("what", "timeout"), errors.ItemError("what"), errors.ItemNotFound("what"),
]  # fmt: skip


def test_no_error_is_left_out():
    classes = {one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, Exception)}
    assert classes == {type(one) for one in EVERY}


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_survives_pickling_with_all_it_says(error, protocol):
    for back in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(back) is type(error) and str(back) == str(error)
        for name in ("exit_code", "kind", "path", "what", "missing", "unexpected", "misshapen"):
            assert getattr(back, name, None) == getattr(error, name, None)
        assert pickle.dumps(back, protocol) == pickle.dumps(error, protocol)


def test_exit_codes():
    codes = {type(one).__name__: one.exit_code for one in EVERY if isinstance(one, errors.QvsplitError)}
    assert codes == {
        "QvsplitError": 70, "UsageError": 2, "ModelError": 3, "OutOfMemory": 3, "WeightsError": 3, "ConfigError": 4,
        "StoreInUse": 5, "StoreDamaged": 6, "ShardDamaged": 6, "DiskError": 7, "ProcessError": 70,
    }  # fmt: skip
    assert (errors.ITEMS_FAILED, errors.CHECKS_FLAGGED, errors.BUG) == (1, 8, 70)
    assert (errors.INTERRUPTED, errors.TERMINATED) == (130, 143)


@pytest.mark.parametrize("make", [errors.QvsplitError, errors.ItemError])
def test_a_message_is_one_printable_line(make):
    assert str(make("a\n  b\x1b[31m\u202e")) == "a b\\x1b[31m\\u202e"


def test_an_item_error_has_a_kind_that_rows_know():
    assert errors.ItemError("x").kind == "content"
    with pytest.raises(ValueError, match="no kind of error"):
        errors.ItemError("x", "solar-flare")
