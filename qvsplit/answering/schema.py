"""Answers that conform to a JSON schema, by llguidance (the optional extra `qvsplit[json]`).

Token by token it says what may come next. An answer that ends by itself conforms; one that is cut at the longest
length does not, and says so by its finish reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvsplit.errors import RequestError, UsageError

if TYPE_CHECKING:
    import torch


def read_schema(file: Path) -> dict[str, Any]:
    """Read the JSON schema in `file`. UsageError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"no JSON schema can be read from {file} ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file}: a JSON schema is an object")
    return content


def compiler(schema: Mapping[str, Any], tokenizer: Any, stops: Collection[int]) -> Callable[[], Follower]:
    """Compile `schema` into what makes a `Follower` for every answer.

    Args:
        schema: What answers conform to.
        tokenizer: transformers' own, fast.
        stops: The tokens that end an answer.

    Raises:
        UsageError: The schema cannot be followed, or the library is not there.
    """
    try:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise UsageError("`json_schema` needs llguidance; install it with: pip install 'qvsplit[json]'") from None
    known = from_tokenizer(tokenizer, eos_token=sorted(stops))
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_flexible": False})
        wrong = LLMatcher.validate_grammar(grammar, known)
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise UsageError(f"the JSON schema cannot be followed ({wrong.splitlines()[0]})")
    return lambda: Follower(LLMatcher(known, grammar))


class Follower:
    """One answer's way through the schema."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, scores: torch.Tensor) -> None:
        """Set the scores, [vocabulary], of tokens that would leave the schema to minus infinity."""
        import torch

        allowed = torch.from_numpy(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0)
        scores[len(allowed) :] = float("-inf")  # a model's vocabulary may be padded beyond its tokenizer's
        scores[: len(allowed)].masked_fill_(~allowed[: len(scores)].to(scores.device), float("-inf"))

    def take(self, token: int) -> None:
        """Go on: `token` came next."""
        if not self._matcher.consume_token(token):
            raise RequestError(f"an answer left its JSON schema ({self._matcher.get_error()}); nothing was kept of it")
