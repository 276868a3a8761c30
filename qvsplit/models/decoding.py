"""How an answer's next token is chosen, and where the answer ends. No model in here: scores come in, tokens go out.

Scores are [vocabulary] of one answer's next token. A request's `Decoding` can be pickled; a `Constraint` follows one
answer and cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decoding:
    """How answers are made. Greedy where `temperature` is None; else sampled, top_p and top_k only where given."""

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()  # an answer ends before any of these
    json_schema: Mapping[str, Any] | None = None  # that an answer must conform to


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
    """One answer as it grows, behind the tokens of its `prompt`."""

    def __init__(self, rules: AnswerRules, prompt: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._rules = rules
        self._prompt = list(prompt)
        self._text_length_given = 0
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
        import torch

        constraint, processors = self._rules.constraint, self._rules.processors
        if constraint is not None:
            constraint.allow(scores)
        if processors:
            ids = torch.tensor([self._prompt + self.tokens], device=scores.device)
            processed = processors(ids, scores[None].clone())[0]
            # a checkpoint's own rules (no bigram twice, say) may forbid all that a schema allows: the schema holds
            scores = processed if constraint is None or bool(processed.isfinite().any()) else scores
        if self._generator is None:
            return int(scores.argmax())
        # drawn on the CPU, from a generator of its own: the same whatever is asked beside it, and on any device
        return int(torch.multinomial(torch.softmax(scores, -1).cpu(), 1, generator=self._generator))

    def take(self, token: int) -> None:
        """Go on with `token`; sets `finish_reason` where the answer ends."""
        rules = self._rules
        self.tokens.append(token)
        if rules.constraint is not None:
            rules.constraint.take(token)
        if token in rules.stops:
            self.finish_reason = "stop"
        elif len(self.tokens) == rules.decoding.max_new_tokens:
            self.finish_reason = "length"
        if not (self.finish_reason or rules.decoding.stop or rules.on_text):
            return
        self.text = rules.decode(self.tokens)
        found = [at for stop in rules.decoding.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finish_reason = self.text[: min(found)], "stop"
        if rules.on_text is not None:
            self._tell(rules.on_text)

    def end(self, reason: str) -> None:
        """End it here, for `reason`, with the text so far."""
        self.finish_reason = reason
        self.text = self._rules.decode(self.tokens)

    def _tell(self, on_text: Callable[[str], None]) -> None:
        """Hand on what can no longer change: not half a character, nor what may begin a stop string."""
        sure = len(self.text)
        if self.finish_reason is None:
            sure -= len(self.text) - len(self.text.rstrip("\ufffd"))
            for stop in self._rules.decoding.stop:
                sure = min(sure, len(self.text) - _overlap(self.text, stop))
        if sure > self._text_length_given:
            on_text(self.text[self._text_length_given : sure])
            self._text_length_given = sure


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
