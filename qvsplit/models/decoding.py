"""How an answer's next token is chosen, and where the answer ends. No model in here: scores come in, tokens go out.

Scores are [vocabulary] of one answer's next token. A request's `Decoding` can be pickled; a `Constraint` follows one
answer and cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.models.reasoning import ReasoningMarks, Split

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decoding:
    """How answers are made. Greedy where `temperature` is None; else sampled, top_p and top_k only where given.

    `marks` are the engine's to put in, which knows the tokenizer; without, reasoning stays in the text.
    """

    max_new_tokens: int = 128  # reasoning included
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()  # an answer ends before any of these
    json_schema: Mapping[str, Any] | None = None  # that an answer must conform to
    thinking: bool = False  # whether the model is asked to think first
    marks: ReasoningMarks | None = None  # around its reasoning


class Constraint(Protocol):
    """What an answer must conform to, followed token by token."""

    def allow(self, scores: torch.Tensor) -> None:
        """Set the scores, [vocabulary], of tokens that may not come next to minus infinity."""

    def take(self, token: int) -> None:
        """Go on: `token` came next."""


@dataclass(frozen=True)
class AnswerRules:
    """All that chooses the tokens of one answer, and ends it.

    Attributes:
        decoding: Length, sampling, stop strings.
        stops: The model's own tokens that end an answer.
        decode: Tokens to text.
        processors: transformers' own logits processors; empty where they change nothing.
        constraint: What the answer must conform to.
        seed: For sampling.
        on_text: Hears the text as it grows.
    """

    decoding: Decoding
    stops: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    processors: Any = ()
    constraint: Constraint | None = None
    seed: int = 0
    on_text: Callable[[str], None] | None = None


class GrowingAnswer:
    """One answer as it grows, behind the tokens of its `prompt`.

    `tokens` are all of it; `text` is the answer alone, `reasoning` what the model thought before. Stop strings, the
    constraint and `on_text` are about the answer.
    """

    def __init__(self, rules: AnswerRules, prompt: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.reasoning = ""
        self.finish_reason: str | None = None
        self._rules = rules
        self._prompt = list(prompt)
        self._told = ""
        self._marks = marks = rules.decoding.marks
        self._opened = marks.opened(prompt, rules.decode) if marks is not None else None
        may_think = self._opened is not None or (marks is not None and rules.decoding.thinking)
        self._is_constrained = rules.constraint is not None and not may_think
        self._generator: torch.Generator | None = None
        if rules.decoding.temperature is not None:
            import torch

            self._generator = torch.Generator().manual_seed(rules.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the most probable one; the same for every row of a batch."""
        return self._generator is None and self._rules.constraint is None and not self._rules.processors

    @property
    def max_new_tokens(self) -> int:
        """How many tokens it may come to."""
        return self._rules.decoding.max_new_tokens

    def choose(self, scores: torch.Tensor) -> int:
        """Choose the next token by `scores`, as transformers' processors and the constraint leave them."""
        constraint = self._rules.constraint
        if constraint is None:
            return self._choose_by(scores)
        if not self._is_constrained:
            thought = self._choose_thought(scores.clone())
            if thought is not None:
                return thought
            self._is_constrained = True
        constraint.allow(scores)
        return self._choose_by(scores)

    def _choose_thought(self, scores: torch.Tensor) -> int | None:
        """Choose the next token of a thought, or of its first mark; None where the answer itself begins."""
        marks = self._rules.decoding.marks
        assert marks is not None
        scores[list(self._rules.stops)] = float("-inf")  # an answer that ended within a thought would not conform
        token = self._choose_by(scores)
        if self._split().is_open:
            return token
        return marks.toward_thought(self.tokens, token, self._rules.decode)

    def _choose_by(self, scores: torch.Tensor) -> int:
        import torch

        processors = self._rules.processors
        if processors:
            ids = torch.tensor([self._prompt + self.tokens], device=scores.device)
            processed = processors(ids, scores[None].clone())[0]
            # a checkpoint's own rules (no bigram twice, say) may forbid all that a schema allows: the schema holds
            scores = processed if self._rules.constraint is None or bool(processed.isfinite().any()) else scores
        if self._generator is None:
            return int(scores.argmax())
        # drawn on the CPU, from a generator of its own: the same whatever is asked beside it, and on any device
        return int(torch.multinomial(torch.softmax(scores, -1).cpu(), 1, generator=self._generator))

    def take(self, token: int) -> None:
        """Go on with `token`; sets `finish_reason` where the answer ends."""
        rules = self._rules
        self.tokens.append(token)
        if rules.constraint is not None:
            if self._is_constrained:
                rules.constraint.take(token)
            else:
                split = self._split()
                self._is_constrained = split.has_reasoned and not split.is_open
        if token in rules.stops:
            self.finish_reason = "stop"
        elif len(self.tokens) == rules.decoding.max_new_tokens:
            self.finish_reason = "length"
        if not (self.finish_reason or rules.decoding.stop or rules.on_text):
            return
        split = self._read()
        found = [at for stop in rules.decoding.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finish_reason = self.text[: min(found)], "stop"
        if rules.on_text is not None:
            self._tell(rules.on_text, is_thinking=split.is_open)

    def end(self, reason: str) -> None:
        """End it here, for `reason`, with the text so far."""
        self.finish_reason = reason
        self._read()

    def _split(self) -> Split:
        """Part the tokens so far into reasoning and answer."""
        decode = self._rules.decode
        if self._marks is None:
            return Split("", decode(self.tokens))
        return self._marks.split(self._marks.text(self.tokens, decode), self._opened)

    def _read(self) -> Split:
        """Take text and reasoning from the tokens so far."""
        split = self._split()
        self.text, self.reasoning = split.answer, split.reasoning
        is_cut = self.finish_reason not in (None, "stop")
        if is_cut and self._marks is not None and self._marks.is_cut_mark(self.text.strip()):
            self.text = ""
        return split

    def _tell(self, on_text: Callable[[str], None], *, is_thinking: bool) -> None:
        """Hand on what can no longer change: not half a character, nor what may begin a stop string or a thought."""
        sure = self.text
        if self.finish_reason is None and not is_thinking:
            marks = self._marks.marks if self._marks is not None else ()
            waited_for = [*self._rules.decoding.stop, *(mark for one in marks for mark in (one.begin, one.end))]
            sure = self.text.rstrip("\ufffd")
            sure = sure[: len(sure) - max((_overlap(sure, one) for one in waited_for), default=0)]
            if self._marks is not None and not sure.strip():
                sure = ""  # blanks before a thought are no part of the answer
        if not sure.startswith(self._told):
            self._told = ""  # that was a thought which nothing had announced; the answer begins here
        if len(sure) > len(self._told):
            on_text(sure[len(self._told) :])
            self._told = sure


def _overlap(text: str, stop: str) -> int:
    """Measure the longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def logits_processors(model: Any, decoding: Decoding, prompt_tokens: int) -> Any:
    """Give what transformers' own `generate` would do to the scores before a token is chosen.

    Of the checkpoint's generation_config.json all that changes scores holds (a repetition penalty, say); whether to
    sample, and how, is not its to say (the hub's says: sample).
    """
    config = copy.deepcopy(model.generation_config)
    sampled = decoding.temperature is not None
    config.update(
        do_sample=sampled, num_beams=1, temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k,
        min_p=None, typical_p=None, epsilon_cutoff=None, eta_cutoff=None,
        max_length=prompt_tokens + decoding.max_new_tokens, max_new_tokens=decoding.max_new_tokens,
    )  # fmt: skip
    device = model.get_input_embeddings().weight.device
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
    return model._get_logits_processor(generation_config=config, input_ids_seq_length=prompt_tokens, device=device)
