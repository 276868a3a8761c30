"""Suffixes of many questions as one row of tokens: nothing is padded, and what several begin with stands there once.

Questions about one image begin alike (the tokens behind the image, `Is there a`), and are of different lengths. Keys
and values of a beginning are the same for all that share it, so it is computed once. Lists come in, tensors go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qvsplit.kernels.shared_prefix_attention import Packing


@dataclass(frozen=True)
class PackedSuffixes:
    """T tokens in one row.

    Attributes:
        input_ids: int64 [1, T].
        positions: int64 [1, T].
        packing: Where each stands in the padded rows.
        last: The last token of each suffix, int64 [B].
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    packing: Packing
    last: torch.Tensor


def packed(
    suffixes: Sequence[Sequence[int]], first: Sequence[int], runs: Sequence[tuple[int, int]], device: torch.device
) -> PackedSuffixes:
    """Pack left-padded suffixes.

    Args:
        suffixes: The tokens of each row.
        first: The position of each suffix's first token.
        runs: Rows behind the same prefix: (first row, row after the last); only those share a beginning.
        device: Where the tensors go.
    """
    assert all(suffixes), "an answer begins behind a token of its question"
    longest = max(map(len, suffixes))
    ids: list[int] = []
    positions: list[int] = []
    found: list[int] = []
    columns: list[list[int]] = []
    tokens: list[tuple[int, int]] = []
    for start, end in runs:
        begun, nodes = len(ids), dict[tuple[int, int], int]()  # by the token before, and the token
        for row in range(start, end):
            padding, before, mine = longest - len(suffixes[row]), -1, list[int]()
            for place, token in enumerate(suffixes[row]):
                node = nodes.setdefault((before, token), len(ids))
                if node == len(ids):
                    ids.append(token)
                    positions.append(first[row] + place)
                    found.append(row * longest + padding + place)
                mine.append(node)
                before = node
            columns.append([begun] * padding + mine)
        tokens.append((begun, len(ids)))
    where = torch.tensor(columns, device=device)
    packing = Packing(where, torch.tensor(found, device=device), tokens)
    return PackedSuffixes(
        torch.tensor([ids], device=device), torch.tensor([positions], device=device), packing, where[:, -1]
    )
