"""Names within a store's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvsplit.store import layout


@pytest.mark.parametrize(("number", "name"), [(1, "shard-000001.parquet"), (1_234_567, "shard-1234567.parquet")])
def test_a_shard_has_a_number_and_a_name(number, name):
    assert layout.shard_name(number) == name
    assert layout.shard_number(name) == number


@pytest.mark.parametrize("name", ["shard-1.parquet", "shard-000001.parquet.damaged", ".shard-000001.parquet.1.tmp", ""])
def test_other_names_are_no_shards(name):
    assert layout.shard_number(name) is None


def test_shards_come_by_number_and_other_names_behind_them():
    names = ["b.parquet", "shard-1000000.parquet", "a.parquet", "shard-999999.parquet"]
    assert [path.name for path in sorted(map(Path, names), key=layout.in_order)] == [
        "shard-999999.parquet", "shard-1000000.parquet", "a.parquet", "b.parquet",
    ]  # fmt: skip


def test_all_but_the_shards_lies_in_one_hidden_folder():
    places = [value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)]
    assert len(places) > 8
    assert all(place == ".qvsplit" or place.startswith(".qvsplit/") for place in places)
