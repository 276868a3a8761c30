"""Columns and metadata of a shard."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from qvsplit.errors import ConfigError, StoreDamaged
from qvsplit.store.config import Provenance
from qvsplit.store.row import Row
from qvsplit.store.schema import (
    METADATA_KEY,
    ShardSchema,
    arrow_schema,
    check_columns,
    read_metadata,
    row_columns,
)
from tests.support import rows


def metadata(**changes) -> bytes:
    content = json.loads(arrow_schema(rows.schema(levels=1)).metadata[METADATA_KEY])
    return json.dumps(content | changes).encode()


def test_what_is_declared_comes_back():
    for declared in (rows.schema(), rows.schema("int8", levels=3, width=8)):
        assert read_metadata(arrow_schema(declared).metadata[METADATA_KEY], "x") == declared
    assert rows.schema("int8", levels=3, width=8).width == 8


def test_the_columns_are_those_of_a_row_and_then_the_features():
    names = arrow_schema(rows.schema(levels=2)).names
    assert names[-3:] == ["embeds", "deepstack_features_0", "deepstack_features_1"]
    assert set(names[:-3]) == set(Row.__dataclass_fields__)
    assert list(row_columns()) == names[:-3]


@pytest.mark.parametrize("value", [2, 10**30])
def test_a_newer_format_says_upgrade(value):
    with pytest.raises(ConfigError, match=r"x was made by a newer qvsplit \(format \d+; .* up to 1\); upgrade"):
        read_metadata(metadata(format=value), "x")


def test_a_store_of_before_any_format_is_not_taken_for_damaged():
    with pytest.raises(ConfigError, match="x was made before format 1; extract into a new store"):
        read_metadata(b'{"recipe": {}, "hidden_size": 8, "made": {}}', "x")


@pytest.mark.parametrize("text", [b"", b"7", b"null", b"[]", b"{", metadata(format=0), metadata(format="1")])
def test_metadata_that_no_version_writes_are_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the text
        read_metadata(text, "x")


def test_metadata_have_a_bound():
    with pytest.raises(ValueError, match="longer than any writer's"):
        read_metadata(metadata(more="x" * (1 << 20)), "x")


@pytest.mark.parametrize(
    "changes", [{"tensors": []}, {"tensors": None}, {"provenance": None}, {"config": None}, {"tensors": [{}]}], ids=str
)
def test_metadata_that_lack_something_are_damage(changes):
    with pytest.raises(StoreDamaged):
        read_metadata(metadata(**changes), "x")


def test_the_features_dtype_is_that_of_the_extraction_config():
    declared = rows.schema().to_json()
    with pytest.raises(StoreDamaged, match="another dtype"):
        ShardSchema.from_json(declared | {"config": rows.config("float32").to_json()}, "x")


def test_columns_are_held_against_the_metadata():
    declared = rows.schema()
    found = arrow_schema(declared)
    check_columns(found, declared, "x")
    with pytest.raises(ConfigError, match=r"x was made by a newer qvsplit \(the unknown column more\)"):
        check_columns(found.append(pa.field("more", pa.int32())), declared, "x")
    with pytest.raises(ConfigError, match="newer"):
        check_columns(arrow_schema(rows.schema(levels=1)), declared, "x")
    for wrong in (
        pa.schema(list(found)[1:]), pa.schema(list(found)[::-1]), found.set(7, pa.field("size", pa.string()))
    ):  # fmt: skip
        with pytest.raises(ValueError, match="columns"):
            check_columns(wrong, declared, "x")


def test_provenance_of_several_runs_is_kept_in_order_with_ids():
    runs = [Provenance("m", None, device, {"torch": "2"}) for device in ("cpu", "cuda")]
    declared = rows.schema(provenance=runs)
    back = read_metadata(arrow_schema(declared).metadata[METADATA_KEY], "x")
    assert back.provenance == tuple(runs)
    assert [one["id"] for one in declared.to_json()["provenance"]] == [one.id for one in runs]
