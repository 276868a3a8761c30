"""Several choices behind one question in one row: which token stands where, at which position, and what it sees.

A row is padding, the question's suffix, then a tree of its choices: what several begin with (`Yes` and `Yes.`) stands
there once. A token sees the suffix and what is before it in its choice, and stands at the position it would have
alone. Lists come in, tensors of a whole batch go out. For layers with attention only: a recurrent state has no way
around a choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qvsplit.models import asking

LOGITS_AT_ONCE = 64  # positions whose logits over the whole vocabulary are in memory together


@dataclass(frozen=True)
class ScoreLayout:
    """One batch: B rows of q columns.

    Attributes:
        input_ids: Tokens, int64 [B, q], left-padded.
        positions: Their positions, int64 [B, q].
        places: How many tokens of text stand between the prefix and each token, int64 [B, q].
        seen: What each token sees of its row, bool [B, q, q].
        padding: Columns of padding of each row.
        columns: For each question and choice, the columns whose scores foretell its tokens and the end after them.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    seen: torch.Tensor
    padding: list[int]
    columns: list[list[list[int]]]

    def to(self, device: torch.device) -> ScoreLayout:
        """Give it with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            places=self.places.to(device),
            seen=self.seen.to(device),
        )


def score_layout(
    suffixes: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], first: Sequence[int]
) -> ScoreLayout:
    """Lay out each suffix and its choices; a suffix's first token stands at the position that `first` gives."""
    trees = [_Tree(mine) for mine in choices]
    rows = [[*suffix, *tree.tokens] for suffix, tree in zip(suffixes, trees, strict=True)]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    seen = torch.zeros(len(rows), longest, longest, dtype=torch.bool)
    columns: list[list[list[int]]] = []
    for number, (suffix, tree) in enumerate(zip(suffixes, trees, strict=True)):
        start, column = padding[number], padding[number] + len(suffix)
        behind = first[number] + len(suffix)
        positions[number, start:column] = torch.arange(first[number], behind)
        seen[number, start:column, start:column] = torch.ones(len(suffix), len(suffix), dtype=torch.bool).tril()
        last = column - 1  # of the suffix: it foretells every choice's first token
        for node, parent in enumerate(tree.parents):
            before = last if parent is None else column + parent
            seen[number, column + node] = seen[number, before]
            seen[number, column + node, column + node] = True
            positions[number, column + node] = positions[number, before] + 1 if before >= start else behind
        columns.append([[last, *(column + node for node in path)] for path in tree.paths])
    places = (positions - torch.tensor(list(first))[:, None]).clamp(min=0)
    ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    return ScoreLayout(ids, positions, places, seen, padding, columns)


class _Tree:
    """The choices of one question, token by token: what they begin with together stands there once.

    Attributes:
        tokens: One a node.
        parents: Each node's, which stands before it; None for a choice's first token.
        paths: Each choice's nodes.
    """

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        self.parents: list[int | None] = []
        self.paths: list[list[int]] = []
        nodes: dict[tuple[int | None, int], int] = {}
        for tokens in choices:
            parent: int | None = None
            path: list[int] = []
            for token in tokens:
                if (parent, token) not in nodes:
                    nodes[parent, token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(parent)
                parent = nodes[parent, token]
                path.append(parent)
            self.paths.append(path)


def sums_of_layout(
    hidden: torch.Tensor,
    layout: ScoreLayout,
    choices: Sequence[Sequence[Sequence[int]]],
    stops: Sequence[int],
    scores_of: Callable[[torch.Tensor], torch.Tensor],
) -> list[list[float] | None]:
    """Add up log-probabilities, a few positions' logits at a time; an end is any of `stops`.

    `hidden` are the states [B, q, width] of the layout's tokens, `scores_of` turns some into scores over the
    vocabulary. None for a question whose states are not finite.
    """
    wanted: dict[
        tuple[int, int], list[tuple[int, list[int]]]
    ] = {}  # by question and column: for which choice, and what
    for number, mine in enumerate(choices):
        for which, tokens in enumerate(mine):
            for column, token in zip(layout.columns[number][which], [*tokens, None], strict=True):
                wanted.setdefault((number, column), []).append((which, [token] if token is not None else list(stops)))
    sums = [[0.0] * len(mine) for mine in choices]
    places = list(wanted)
    for start in range(0, len(places), LOGITS_AT_ONCE):
        some = places[start : start + LOGITS_AT_ONCE]
        at = hidden[[number for number, _ in some], [column for _, column in some]]
        logs = torch.log_softmax(scores_of(at).float(), -1)
        for place, line in zip(some, logs, strict=True):
            for which, tokens in wanted[place]:
                sums[place[0]][which] += float(torch.logsumexp(line[tokens].double(), 0))
    finite = asking.finite_rows(hidden)
    return [
        mine if sound and not any(map(math.isnan, mine)) else None for sound, mine in zip(finite, sums, strict=True)
    ]
