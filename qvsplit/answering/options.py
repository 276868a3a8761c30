"""Options of asking. Imports nothing heavy: the command line and recorded answers are checked without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvsplit.errors import UsageError
from qvsplit.models.decoding import Decoding

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class AskOptions:
    """Options of asking. None is the store's own, or the default.

    Answers are greedy without `temperature`; with it, or `top_p` or `top_k`, they are sampled, and the same `seed`
    gives the same answers whatever is asked beside them.

    Attributes:
        model: The checkpoint.
        device: `auto` spreads the model over all devices, as transformers does.
        dtype: The compute dtype.
        max_new_tokens: Of one answer.
        system: The system message.
        unchecked_encoder: Whether a store may be used whose encoder nothing vouches for.
        temperature: For sampling.
        top_p: For sampling.
        top_k: For sampling.
        seed: For sampling.
        stop: An answer ends before any of these.
        json_schema: What answers must conform to.
        token_budget: Tokens of KV cache that a batch may take.
        prefix_cache_tokens: Tokens of KV cache that are kept for the next question.
    """

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    system: str | None = None
    unchecked_encoder: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    token_budget: int | None = None
    prefix_cache_tokens: int | None = None

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn, not greedy."""
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k))

    @property
    def decoding(self) -> Decoding:
        """How answers are made."""
        return Decoding(
            max_new_tokens=self.max_new_tokens,
            temperature=(1.0 if self.temperature is None else self.temperature) if self.sampled else None,
            top_p=self.top_p, top_k=self.top_k, stop=self.stop, json_schema=self.json_schema,
        )  # fmt: skip

    def check(self) -> None:
        """Raise UsageError for numbers that mean nothing."""
        if self.max_new_tokens < 1:
            raise UsageError("max_new_tokens must be at least 1")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UsageError("temperature must be above 0; leave it out for greedy answers")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError("top_p must be above 0, and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError("top_k must be at least 1")
        if any(not stop for stop in self.stop):
            raise UsageError("stop must not be empty")
        if self.token_budget is not None and self.token_budget < 1:
            raise UsageError("token_budget must be at least 1")
