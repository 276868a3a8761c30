"""A prefix that is computed once, never copied, and read by all questions behind it at once.

For layers with attention, full or in sliding windows, and recurrent ones. All rows of a batch decode together. Where
there is only attention, suffixes run packed into one row (`packed_suffixes.py`), and are left-padded afterwards; a
recurrent state would take in other rows' tokens, and padding too, so there suffixes of one length run together, and are
put into one batch afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qvsplit.models.asking import (
    Choices,
    PrefixedQuestion,
    RowLogs,
    choice_rows,
    choice_sums,
    choices_with_rows,
    grow,
    row_logs,
    runs_of_one_length,
)

if TYPE_CHECKING:
    import torch

    from qvsplit.models.decoding import GrowingAnswer
    from qvsplit.models.forward import Forward
    from qvsplit.models.prefix_cache import Beginning, LaidOut, Prefix, SuffixCache
    from qvsplit.models.prompt import Prompt
    from qvsplit.store.features import Features


class SharedPrefix:
    """The way of models whose decoder's attention and recurrent layers are known, see `ways.py`."""

    name = "share its prefix"

    def __init__(self, forward: Forward, stops: Callable[[], Sequence[int]], *, can_extend: bool) -> None:
        from qvsplit.kernels import delta_rule
        from qvsplit.kernels.shared_prefix_attention import ATTENTION

        delta_rule.install(forward.model)
        forward.model.set_attn_implementation({"text_config": ATTENTION})
        self._forward = forward
        self._stops = stops
        self.can_extend = can_extend  # whether further items can be computed behind a beginning

    def prefill(self, prompt: Prompt, features: Sequence[Features], after: Beginning | None) -> Prefix:
        """Compute keys, values and states of the prompt up to its last item."""
        from qvsplit.kernels.shared_prefix_attention import in_force
        from qvsplit.models.prefix_cache import Capture, SuffixCache

        forward, end = self._forward, prompt.prefix_tokens
        if after is None:
            cache = Capture(forward.config, to_the_end=forward.is_spread)
            following = forward.prefill(prompt, features, cache)
            return cache.prefix(prompt.input_ids[:end], following)
        before = _prefix(after)
        new = prompt.input_ids[len(before) : end]
        suffixes = SuffixCache([before], [0])
        with in_force(suffixes.step(len(new), forward.device)):
            following = forward.prefill(prompt, features, suffixes, known=len(before), first=before.next_position)
        return suffixes.behind(before, new, following)

    def generate(
        self,
        questions: Sequence[PrefixedQuestion],
        answers: Sequence[GrowingAnswer],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Let all answers grow as one batch."""
        grow(SharedBatch(self._forward, questions), answers, is_cancelled)

    def score(self, questions: Sequence[PrefixedQuestion], choices: Choices) -> list[list[float] | None]:
        """Score choices: a question's in one row where there is only attention, else each in a row of its own."""
        from qvsplit.models.scoring import score_layout, sums_of_layout

        if _is_recurrent(questions):
            with_rows = choices_with_rows(choices)
            logs = self._row_logs(choice_rows(questions, with_rows), [one for mine in with_rows for one in mine])
            return choice_sums(logs, choices)
        prefixes = [_prefix(one.prefix) for one in questions]
        layout = score_layout(
            [one.suffix for one in questions], choices, [prefix.next_position for prefix in prefixes]
        ).to(self._forward.device)
        cache = _cache(prefixes, layout.padding)
        hidden = _run(self._forward, cache, layout.input_ids, layout.positions, seen=layout.seen, places=layout.places)
        return sums_of_layout(hidden, layout, choices, self._stops(), self._forward.scores)

    def _row_logs(self, rows: Sequence[PrefixedQuestion], choices: Sequence[Sequence[int]]) -> list[RowLogs | None]:
        """Give the log-probabilities along each row, which ends with the choice of its number."""
        logs: dict[int, RowLogs | None] = {}
        laid_out: LaidOut = {}
        for run in runs_of_one_length(rows):
            _, hidden = _ask(self._forward, [rows[number] for number in run], laid_out)
            for place, number in enumerate(run):
                tokens = choices[number]
                scores = self._forward.scores(hidden[place, -len(tokens) - 1 :])
                logs[number] = row_logs(scores, tokens, self._stops())
        return [logs[number] for number in range(len(rows))]

    def tokens(self, questions: Sequence[PrefixedQuestion]) -> int:
        """Count every prefix once, and the suffixes padded to the longest."""
        prefixes = {id(one.prefix): len(one.prefix) for one in questions}
        return sum(prefixes.values()) + len(questions) * max(len(one.suffix) for one in questions)


class SharedBatch:
    """Questions behind shared prefixes, as one batch."""

    def __init__(self, forward: Forward, questions: Sequence[PrefixedQuestion]) -> None:
        import torch

        from qvsplit.models.prefix_cache import joined

        self._forward = forward
        self._places = [_prefix(one.prefix).next_position + len(one.suffix) for one in questions]
        if not _is_recurrent(questions):
            self._cache, last = _ask_packed(forward, questions)
            self.scores = forward.scores(last)
            return
        runs = runs_of_one_length(questions)
        laid_out: LaidOut = {}
        asked = [_ask(forward, [questions[number] for number in run], laid_out) for run in runs]
        order = [number for run in runs for number in run]
        back = [order.index(number) for number in range(len(order))]
        self._cache = joined([cache for cache, _ in asked])
        self._cache.keep(back)
        self.scores = forward.scores(torch.cat([hidden[:, -1] for _, hidden in asked])[back])

    def next(self, tokens: Sequence[int]) -> None:
        """Run each row's newest token."""
        import torch

        device = self._forward.device
        ids = torch.tensor([[token] for token in tokens], device=device)
        places = torch.tensor([[place] for place in self._places], device=device)
        self.scores = self._forward.scores(_run(self._forward, self._cache, ids, places)[:, -1])
        self._places = [place + 1 for place in self._places]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._cache.keep(rows)
        self._places = [self._places[row] for row in rows]


def _ask_packed(forward: Forward, questions: Sequence[PrefixedQuestion]) -> tuple[SuffixCache, torch.Tensor]:
    """Run suffixes behind their prefixes, packed; gives what is kept of them, and each one's last state [B, width]."""
    from qvsplit.models.packed_suffixes import packed

    prefixes = [_prefix(one.prefix) for one in questions]
    longest = max(len(one.suffix) for one in questions)
    cache = _cache(prefixes, [longest - len(one.suffix) for one in questions])
    runs = [(first, end) for _, first, end in cache.groups]
    suffixes = packed(
        [one.suffix for one in questions], [one.next_position for one in prefixes], runs, forward.device
    )  # fmt: skip
    with cache.packed(suffixes.packing):
        hidden = _run(forward, cache, suffixes.input_ids, suffixes.positions, new=longest)
    return cache, hidden[0, suffixes.last.to(hidden.device)]


def _ask(
    forward: Forward, questions: Sequence[PrefixedQuestion], laid_out: LaidOut
) -> tuple[SuffixCache, torch.Tensor]:
    """Run suffixes of one length behind their prefixes; gives what is kept of them, and hidden states [B, q, width].

    `laid_out` is added to: several batches behind the same prefixes lay these out once.
    """
    import torch

    prefixes = [_prefix(one.prefix) for one in questions]
    ids = torch.tensor([list(one.suffix) for one in questions], device=forward.device)
    first = torch.tensor([one.next_position for one in prefixes], device=forward.device)
    positions = first[:, None] + torch.arange(ids.shape[1], device=forward.device)
    cache = _cache(prefixes, [0] * len(questions), laid_out)
    return cache, _run(forward, cache, ids, positions)


def _run(
    forward: Forward,
    cache: SuffixCache,
    ids: torch.Tensor,
    positions: torch.Tensor,
    new: int | None = None,
    **seen: torch.Tensor | None,
) -> torch.Tensor:
    """Run tokens of a batch, [B, q], or packed ones with `new` columns in all; gives their hidden states."""
    from qvsplit.kernels.shared_prefix_attention import in_force

    with in_force(cache.step(new or ids.shape[1], forward.device, **seen)):
        return forward.hidden(ids, positions, cache)


def _cache(prefixes: Sequence[Prefix], padding: Sequence[int], laid_out: LaidOut | None = None) -> SuffixCache:
    from qvsplit.models.prefix_cache import SuffixCache

    return SuffixCache(prefixes, padding, laid_out)


def _prefix(beginning: Beginning) -> Prefix:
    from qvsplit.models.prefix_cache import Prefix

    assert isinstance(beginning, Prefix)
    return beginning


def _is_recurrent(questions: Sequence[PrefixedQuestion]) -> bool:
    return bool(_prefix(questions[0].prefix).states)
