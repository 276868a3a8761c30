"""Suffixes in one row: nothing padded, what several begin with computed once, and the very keys of padded rows."""

from __future__ import annotations

import torch

from qvsplit.models.packed_suffixes import packed

CPU = torch.device("cpu")


def test_what_rows_behind_one_prefix_begin_with_stands_there_once():
    suffixes = [[7, 8, 9], [7, 8, 5, 9], [7, 8], [7, 8]]
    made = packed(suffixes, [100, 100, 100, 40], [(0, 3), (3, 4)], CPU)
    assert made.input_ids.tolist() == [[7, 8, 9, 5, 9, 7, 8]]  # the last row stands behind another prefix
    assert made.positions.tolist() == [[100, 101, 102, 102, 103, 40, 41]]
    assert made.packing.tokens == [(0, 5), (5, 7)]
    assert made.last.tolist() == [2, 4, 1, 6]
    for row, suffix in enumerate(suffixes):
        columns = made.packing.columns[row, 4 - len(suffix) :]
        assert made.input_ids[0, columns].tolist() == suffix


def test_a_token_is_found_where_it_stands_first():
    suffixes = [[1], [1, 2, 3], [4, 2]]
    made = packed(suffixes, [0, 0, 0], [(0, 3)], CPU)
    padded = torch.tensor([[0, 0, 1], [1, 2, 3], [0, 4, 2]])
    assert torch.equal(padded.flatten()[made.packing.found], made.input_ids[0])


def test_tokens_get_back_into_their_rows():
    made = packed([[1], [1, 2, 3]], [0, 0], [(0, 2)], CPU)
    keys = torch.arange(6.0).view(1, 2, 3, 1)  # two heads
    rows = made.packing.rows(keys)
    assert rows[0, :, -1, 0].tolist() == [0, 3]
    assert rows[1, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
