"""The bench of very large stores: its parts run, at sizes that take no time, and what it makes is what a store has."""

from __future__ import annotations

from argparse import Namespace

import pytest

from bench import catalogue_scale
from qvsplit.store.catalogue_file import known_catalogue
from qvsplit.store.shards import shard_files
from qvsplit.store.storage import LocalStorage

SMALL = Namespace(rows=2_000, rows_per_shard=500, most_gb=1.0, files=(5, 20), entries=1_500, walk=1_200, shards=1)


def test_the_catalogue_that_is_timed_has_the_rows_that_were_made_and_those_of_one_more_shard(tmp_path):
    result = catalogue_scale.catalogue(tmp_path, SMALL)
    known = known_catalogue(LocalStorage(tmp_path), shard_files(LocalStorage(tmp_path)))
    assert known is not None
    row = catalogue_scale.made_row(1_999)
    assert known.rows_of(row.root, row.path) == [row]
    assert known.ok == 2_000 + 2 * 500
    assert result["bytes"] > 2_000 * 100
    known.close()


@pytest.mark.parametrize("part", ["commit", "memory", "listing"])
def test_a_part_gives_figures_above_nothing(part, tmp_path):
    found = catalogue_scale.PARTS[part](tmp_path, SMALL)
    for result in found if isinstance(found, list) else [found]:
        assert result
        assert all(value >= 0 for value in result.values())
