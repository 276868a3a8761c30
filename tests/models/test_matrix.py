"""Every family through the whole way: identical to its full model in every column, as docs/models.md says."""

from __future__ import annotations

import pytest

from tests.support.every_model import further
from tests.support.families import FAMILIES
from tests.support.matrix import REFUSED, SPLIT, matrix_row, rows_in_docs


@pytest.mark.parametrize("name", [name if name in FAMILIES else pytest.param(name, marks=further) for name in SPLIT])
def test_a_family_is_identical_to_its_full_model(name, tmp_path):
    row = matrix_row(name, tmp_path)
    assert row.is_identical, row
    assert (row.several_images == REFUSED) == (name == "llava_onevision")
    assert rows_in_docs()[name] == str(row)  # python -m tests.support.matrix write


def test_the_docs_list_these_families_and_no_others():
    assert list(rows_in_docs()) == SPLIT
