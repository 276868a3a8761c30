"""Several choices behind one question in one row: which token stands where, at which position, and what it sees.

A row is padding, the question's suffix, then all of its choices one after the other. A choice sees the suffix and
itself, and stands at the positions it would have alone. Lists come in, tensors of a whole batch go out. For layers with
attention only: a recurrent state has no way around a choice.
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
    rows = [
        [*suffix, *(token for tokens in mine for token in tokens)]
        for suffix, mine in zip(suffixes, choices, strict=True)
    ]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    part = torch.full((len(rows), longest), -1)  # of its row: -1 padding, 0 the suffix, then the choices
    columns: list[list[list[int]]] = []
    for number, (suffix, mine) in enumerate(zip(suffixes, choices, strict=True)):
        column = padding[number] + len(suffix)
        behind = first[number] + len(suffix)
        positions[number, padding[number] : column] = torch.arange(first[number], behind)
        part[number, padding[number] : column] = 0
        last = column - 1  # of the suffix: it foretells every choice's first token
        columns.append([])
        for which, tokens in enumerate(mine, 1):
            end = column + len(tokens)
            positions[number, column:end] = torch.arange(behind, behind + len(tokens))
            part[number, column:end] = which
            columns[-1].append([last, *range(column, end)])
            column = end
    same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    seen = same.tril() & (part >= 0)[:, None, :]
    places = (positions - torch.tensor(list(first))[:, None]).clamp(min=0)
    ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    return ScoreLayout(ids, positions, places, seen, padding, columns)


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
    wanted = [
        (number, which, column, [token] if token is not None else list(stops))
        for number, mine in enumerate(choices)
        for which, tokens in enumerate(mine)
        for column, token in zip(layout.columns[number][which], [*tokens, None], strict=True)
    ]
    sums = [[0.0] * len(mine) for mine in choices]
    for start in range(0, len(wanted), LOGITS_AT_ONCE):
        some = wanted[start : start + LOGITS_AT_ONCE]
        at = hidden[[number for number, _, _, _ in some], [column for _, _, column, _ in some]]
        logs = torch.log_softmax(scores_of(at).float(), -1)
        for (number, which, _, tokens), line in zip(some, logs, strict=True):
            sums[number][which] += float(torch.logsumexp(line[tokens].double(), 0))
    finite = asking.finite_rows(hidden)
    return [
        mine if sound and not any(map(math.isnan, mine)) else None for sound, mine in zip(finite, sums, strict=True)
    ]
