"""One question at a time, by transformers' own `generate` on the whole prompt with the stored features.

For models whose prompts have no beginning that could be shared (PaliGemma: image and question see each other), for all
that nobody has tried, and for all where the kernels "reference" are asked for. It is exact by construction, and
computes the prompt anew for every question. What chooses and ends tokens is `GrowingAnswer`, as everywhere: a logits
processor leaves the token that it chose, a stopping criterion ends where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.models.asking import (
    NOT_FINITE,
    Choices,
    PrefixedQuestion,
    RowLogs,
    choice_rows,
    choice_sums,
    choices_with_rows,
    finite_rows,
    row_logs,
)
from qvsplit.models.forward import model_inputs

if TYPE_CHECKING:
    import torch

    from qvsplit.models.decoding import GrowingAnswer
    from qvsplit.models.forward import Forward
    from qvsplit.models.prefix_cache import Beginning
    from qvsplit.models.prompt import Prompt
    from qvsplit.store.features import Features


@dataclass(frozen=True)
class UncomputedPrefix:
    """A prompt's beginning as it goes into the model: nothing of it is computed. `prompt` may go on behind it."""

    input_ids: tuple[int, ...]
    prompt: Prompt
    features: tuple[Features, ...]

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.input_ids)


class WholePrompt:
    """The way of all other models, see `ways.py`.

    Choices are scored with the output layer at their tokens alone, and one that another begins with in that one's
    pass; with `plain`, each by a plain forward pass of its own, since a product of fewer rows may be added up in
    another order.
    """

    name = "whole prompt"

    can_extend = False

    def __init__(self, forward: Forward, stops: Callable[[], Sequence[int]], *, plain: bool = False) -> None:
        self._forward = forward
        self._stops = stops
        self._plain = plain

    def prefill(self, prompt: Prompt, features: Sequence[Features], after: Beginning | None) -> UncomputedPrefix:
        """Keep what goes into the model. StoreDamaged where placeholders and grids do not belong together."""
        assert after is None
        self._forward.check_positions(prompt)
        return UncomputedPrefix(tuple(prompt.input_ids[: prompt.prefix_tokens]), prompt, tuple(features))

    def generate(
        self,
        questions: Sequence[PrefixedQuestion],
        answers: Sequence[GrowingAnswer],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Let one answer grow after the other."""
        from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList

        for question, answer in zip(questions, answers, strict=True):
            steps = _Steps(answer, is_cancelled)
            with self._nothing_configured():
                # of GenerationMixin itself: a class's own generate may drop what chooses tokens here (Janus)
                GenerationMixin.generate(
                    self._forward.model, **self._inputs(question, 0), do_sample=False, num_beams=1,
                    max_new_tokens=answer.max_new_tokens, logits_processor=LogitsProcessorList([steps.choose]),
                    stopping_criteria=StoppingCriteriaList([steps.is_ended]),
                )  # fmt: skip

    def score(self, questions: Sequence[PrefixedQuestion], choices: Choices) -> list[list[float] | None]:
        """Score one choice after the other, each by a forward pass of prompt and choice."""
        with_rows = choices if self._plain else choices_with_rows(choices)
        each = [tokens for mine in with_rows for tokens in mine]
        logs = [
            self._row_logs(row, tokens)
            for row, tokens in zip(choice_rows(questions, with_rows), each, strict=True)
        ]  # fmt: skip
        return _sums_of_each(logs, choices) if self._plain else choice_sums(logs, choices)

    def _row_logs(self, row: PrefixedQuestion, tokens: Sequence[int]) -> RowLogs | None:
        given = self._inputs(row, len(tokens))
        if "logits_to_keep" in self._forward.takes and not self._plain:
            given["logits_to_keep"] = len(tokens) + 1
        return row_logs(self._forward.model(**given).logits[0, -len(tokens) - 1 :], tokens, self._stops())

    def tokens(self, questions: Sequence[PrefixedQuestion]) -> int:
        """Count the longest prompt: there is but one at a time."""
        return max(len(one.prefix) + len(one.suffix) for one in questions)

    def _inputs(self, question: PrefixedQuestion, answered: int) -> dict[str, Any]:
        """Give all that the model takes; the last `answered` tokens are an answer's."""
        import torch

        prefix, device = question.prefix, self._forward.device
        assert isinstance(prefix, UncomputedPrefix)
        ids = torch.tensor([[*prefix.input_ids, *question.suffix]], device=device)
        asked = ids.shape[1] - answered
        types = {}
        for name, values in prefix.prompt.token_types.items():
            mine = [*values[: len(prefix)], *question.types.get(name, ())]
            types[name] = mine + [0] * (asked - len(mine)) + [_type_of_answers(prefix.prompt, name)] * answered
        given = model_inputs(prefix.prompt.placeholders, prefix.features, types, device)
        taken = {name: value for name, value in given.items() if name in self._forward.takes}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | taken

    @contextmanager
    def _nothing_configured(self) -> Iterator[None]:
        """Set aside the checkpoint's generation_config.json: what of it holds, `GrowingAnswer` has done already."""
        from transformers import GenerationConfig

        model = self._forward.model
        configured = model.generation_config
        model.generation_config = GenerationConfig(pad_token_id=0)
        try:
            yield
        finally:
            model.generation_config = configured


def _sums_of_each(logs: Sequence[RowLogs | None], choices: Choices) -> list[list[float] | None]:
    """Give the log-probability of every choice from the `logs` of its own row."""
    waiting = iter(logs)
    sums: list[list[float] | None] = []
    for mine in choices:
        rows = [(next(waiting), len(tokens)) for tokens in mine]
        of_rows = [row.of(length) for row, length in rows if row is not None]
        sums.append(of_rows if len(of_rows) == len(rows) else None)
    return sums


def _type_of_answers(prompt: Prompt, name: str) -> int:
    """Give the type of an answer's tokens: text's, or where types part question and answer (PaliGemma), the other."""
    typed = prompt.token_types[name]
    types_items = any(typed[place] for place, item in enumerate(prompt.item_types) if item)
    return 1 if name == "token_type_ids" and not types_items else 0


class _Steps:
    """What `generate` asks at every step of one answer."""

    def __init__(self, answer: GrowingAnswer, is_cancelled: Callable[[], bool]) -> None:
        self._answer = answer
        self._is_cancelled = is_cancelled
        self._chosen: int | None = None

    def choose(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave of the scores [1, vocabulary] the token that the answer chooses."""
        (finite,) = finite_rows(scores)
        self._chosen = self._answer.choose(scores[0].clone()) if finite else None
        only = scores.new_full(scores.shape, float("-inf"))
        only[0, self._chosen or 0] = 0
        return only

    def is_ended(self, ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        """Take the token that was chosen, and say whether the answer ends: bool [1]."""
        if self._chosen is None:
            self._answer.end(NOT_FINITE)
        else:
            self._answer.take(self._chosen)
            if self._answer.finish_reason is None and self._is_cancelled():
                self._answer.end("cancelled")
        return ids.new_full((len(ids),), self._answer.finish_reason is not None).bool()
