"""Items on their way from process to process: the same to the bit, and what is small without what is large."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from qvsplit import errors
from qvsplit.errors import ItemError, ItemNotFound, QvsplitError, ShardDamaged, WeightsError
from qvsplit.models.preparing import Prepared
from qvsplit.pipeline.cluster.packing import (
    ITEM,
    LARGE,
    Numbered,
    items_in,
    numbered_in,
    numbered_table,
    result_table,
    rows_in,
)
from qvsplit.pipeline.items import KNOWN, Known, Result, Staged
from qvsplit.sources.files import FileInfo
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.shard_writer import EncodedRow, encoded
from tests.support import rows
from tests.support.fake_source import entry

DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip
SUBCLASSES = [
    one for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, QvsplitError) and one not in {WeightsError, ShardDamaged}
]  # fmt: skip


def prepared(values: dict[str, object]) -> Prepared:
    return Prepared(
        values, 3, 12, (("<a>", 1), ("<b>", 3)), (1, 4, 3), {"mask": {"dtype": "bool", "shape": [1], "values": [True]}},
        "video",
    )  # fmt: skip


def result(outcome: object = None) -> Result:
    video = VideoInfo(6, 2.0, 3.0, 80, 60, 0, "h264", "mov", 0, None)
    info = FileInfo("ab" * 32, 10, 5, None, "video", None)
    return Result(entry("a b/ü.mp4"), info, 80, 60, "2020-01-01", "PNG", 3, video, outcome, {"decode": 0.5})


def through(item: Result | QvsplitError, large=None):
    """Give what comes out at the other end."""
    ((again, its),) = rows_in(result_table(item, large))
    (small,) = items_in(result_table(item, large))
    assert type(small) is type(again)
    return again, its


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def without_pickles_of_large(block: pa.Table) -> pa.Table:
    """Give a block in which what is large is no pickle any more."""
    return block.set_column(1, LARGE, pa.array([b"no pickle"] * len(block), pa.large_binary()))


# ----------------------------------------------------------------------------------------------------- what is prepared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_tensors_are_the_same_to_the_bit(dtype, shape):
    whole = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 512).astype(np.uint8))
    many = (whole % 2).bool() if dtype == torch.bool else whole.view(dtype)
    tensor = many[: int(np.prod(shape))].view(shape)
    _, again = through(result(), prepared({"pixels": tensor}))
    its = again.values["pixels"]
    assert (its.dtype, its.shape, its.device.type, its.is_contiguous()) == (dtype, tensor.shape, "cpu", True)
    assert bits(its) == bits(tensor)
    if its.numel() and its.ndim:
        its[0] = 0  # it may be written to, and is nobody else's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values_are_the_same_to_the_bit(dtype):
    tensor = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40], dtype=dtype)
    _, again = through(result(), prepared({"pixels": tensor}))
    assert bits(again.values["pixels"]) == bits(tensor)


def test_all_of_what_was_prepared_comes_through():
    one = prepared({"pixels": torch.arange(12).view(3, 4), "grid": np.array([[1, 4, 3]]), "decoded": None, "n": 3})
    item, again = through(result(), one)
    assert item == result()
    assert {field.name: getattr(again, field.name) for field in fields(one) if field.name != "values"} == {
        field.name: getattr(one, field.name) for field in fields(one) if field.name != "values"
    }
    assert list(again.values) == list(one.values)
    assert torch.equal(again.values["pixels"], one.values["pixels"])
    assert np.array_equal(again.values["grid"], one.values["grid"]) and again.values["n"] == 3


def test_of_a_view_only_what_it_shows_is_packed():
    large = torch.arange(1_000_000)
    for view in (large[5:15], large.view(1000, 1000)[:5, :2], large[:10].flip(0), large[:20:2]):
        block = result_table(result(), prepared({"pixels": view}))
        assert block[LARGE].nbytes < 5000
        ((_, again),) = rows_in(block)
        assert torch.equal(again.values["pixels"], view)


def test_a_tensor_that_has_gradients_is_its_values():
    tensor = torch.ones(3, requires_grad=True)
    _, again = through(result(), prepared({"pixels": tensor * 2}))
    assert torch.equal(again.values["pixels"], torch.full((3,), 2.0))
    assert not again.values["pixels"].requires_grad


# -------------------------------------------------------------------------------------------------- what was encoded


@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_rows_and_their_features_are_the_same_to_the_bit(dtype):
    whole = [encoded(row, features, rows.schema(dtype, levels=2)) for row, features in (
        rows.item("a.png", 6, dtype=dtype, levels=2), *rows.parts("b.mp4", 2, dtype=dtype, levels=2),
    )]  # fmt: skip
    item, again = through(result(Staged(tuple(one.row for one in whole), rows.VIDEOS, None, 7)), whole)
    assert item.outcome == Staged(tuple(one.row for one in whole), rows.VIDEOS, None, 7)
    assert [one.row for one in again] == [one.row for one in whole]
    assert [{name: bytes(blob) for name, blob in one.blobs.items()} for one in again] == [
        {name: bytes(blob) for name, blob in one.blobs.items()} for one in whole
    ]
    assert [one.bytes for one in again] == [one.bytes for one in whole]


@pytest.mark.parametrize(
    "blob", [b"", b"abc", memoryview(b"abc"), memoryview(bytearray(b"abc")), memoryview(b"_abc_")[1:4],
             memoryview(b"abcdef")[::2], np.frombuffer(b"abcd", np.uint8).data],
    ids=["none", "bytes", "view", "writable", "part", "strided", "array"],
)  # fmt: skip
def test_blobs_come_through_as_bytes(blob):
    _, (again,) = through(result(), [EncodedRow(rows.row(), {"pooler_output": blob})])
    assert bytes(again.blobs["pooler_output"]) == bytes(blob)


def test_a_row_without_features_has_none():
    _, again = through(result(), [EncodedRow(rows.failed("a.png"), {})])
    assert again == [EncodedRow(rows.failed("a.png"), {})]


# -------------------------------------------------------------------------------------------------- items and errors


@pytest.mark.parametrize(
    "outcome",
    [None, Staged((rows.row("a.png"),)), Staged((rows.row("a.png"),), rows.VIDEOS, "0123.parquet", 1 << 40)],
    ids=["none", "staged", "alone"],
)
def test_an_item_is_the_same(outcome):
    item = result(outcome)
    assert through(item) == (item, None)
    assert through(replace(item, info=None, video=None)) == (replace(item, info=None, video=None), None)


def test_what_is_known_is_known_on_the_other_side():
    item, large = through(result(KNOWN))
    assert isinstance(item.outcome, Known) and large is None


@pytest.mark.parametrize("kind", errors.ERROR_KINDS)
@pytest.mark.parametrize("error", [ItemError, ItemNotFound])
def test_the_error_of_an_item_is_the_same(error, kind):
    item, _ = through(result(error("is \\x41 bad\nand more", kind)))
    assert type(item.outcome) is error
    assert (str(item.outcome), item.outcome.kind) == (str(error("is \\x41 bad\nand more", kind)), kind)


@pytest.mark.parametrize("error", SUBCLASSES, ids=lambda one: one.__name__)
def test_what_ends_a_run_is_the_same(error):
    again, large = through(error("disk: is full; make room"))
    assert (type(again), str(again), again.exit_code) == (error, "disk: is full; make room", error.exit_code)
    assert large is None


def test_errors_of_more_than_a_message_are_the_same():
    weights = WeightsError("some/model", missing=["b", "a"], unexpected=["c"], misshapen={"d": "[1] instead of [2]"})
    again, _ = through(weights)
    assert (str(again), again.missing, again.unexpected, again.misshapen) == (
        str(weights), ["a", "b"], ["c"], {"d": "[1] instead of [2]"}
    )  # fmt: skip
    again, _ = through(ShardDamaged("shard-000001.parquet is damaged", "/store/shard-000001.parquet", "a hash"))
    assert (str(again), again.path, again.what) == (
        "shard-000001.parquet is damaged", "/store/shard-000001.parquet", "a hash"
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- blocks


def test_numbered_entries_are_the_same_in_order():
    items = [Numbered(number, entry(f"{number}.png", root="/photos\udcff")) for number in range(5)]
    block = numbered_table(items)
    assert list(items_in(block)) == [items]  # in one row: each would have to name its folder and its classes
    assert list(rows_in(block)) == [(items, None)]
    assert numbered_in(block) == items
    assert numbered_in(numbered_table(())) == []


def blocks() -> list[pa.Table]:
    """Blocks of one item each, as workers give them."""
    return [
        result_table(result(ItemError("is bad"))),
        result_table(result(), prepared({"pixels": torch.arange(4)})),
        result_table(result(KNOWN)),
        result_table(result(), [EncodedRow(rows.row(), {"pooler_output": b"x"})]),
    ]


def test_all_blocks_have_one_schema_and_may_be_joined_and_cut():
    """As Ray Data does, which takes the schema of the first."""
    expected = pa.schema([(ITEM, pa.large_binary()), (LARGE, pa.large_binary())])
    every = [*blocks(), numbered_table([Numbered(1, entry("a"))])]
    assert [block.schema for block in every] == [expected] * 5
    joined = pa.concat_tables(blocks())
    for whole in (joined, joined.combine_chunks()):
        assert [large is not None for _, large in rows_in(whole)] == [False, True, False, True]
        (cut,) = rows_in(whole.slice(1, 1))
        assert torch.equal(cut[1].values["pixels"], torch.arange(4))
        assert len(list(items_in(whole.slice(2)))) == 2


def test_what_is_large_is_not_read_by_whoever_asks_for_items():
    whole = without_pickles_of_large(pa.concat_tables(blocks()))
    assert [type(item.outcome).__name__ for item in items_in(whole)] == ["ItemError", "NoneType", "Known", "NoneType"]
    with pytest.raises(pickle.UnpicklingError):
        list(rows_in(whole))


def test_what_is_large_is_not_in_the_column_of_items():
    large = prepared({"pixels": torch.zeros(1_000_000)})
    block = result_table(result(), large)
    assert block[ITEM].nbytes < 2000 < 4_000_000 <= block[LARGE].nbytes < 4_002_000
