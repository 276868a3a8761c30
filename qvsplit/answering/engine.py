"""The Engine door: requests go in, completions come out. Nobody looks behind it.

A request names images and videos by the content of their features and holds the conversation as messages: never token
ids, pixels or tensors. Requests and completions can be pickled. How requests are batched, what is computed once for
several of them, and how memory is kept is the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from qvsplit.errors import QvsplitError
from qvsplit.models.decoding import Decoding

__all__ = ["Completion", "Decoding", "Engine", "FeatureRef", "Message", "Request"]

# {"role": …, "content": text, or a list of {"type": "image"}, {"type": "video"} and {"type": "text", …}}
Message = Mapping[str, Any]


class FeatureRef(NamedTuple):
    """Features by their content: the SHA-256 of the file's bytes, in hex, and the part of it."""

    sha256: str
    part: int = 0


@dataclass(frozen=True)
class Request:
    """One question about the items whose features it names.

    Attributes:
        id: By which its completion is known. Of the caller's choosing; unique within one call.
        messages: The conversation; its items stand in the order of `features`.
        features: What the items are.
        shared: How many of the features begin other requests' prompts, too: a hint.
        decoding: How the answer is made.
        choices: Whole answers. Where there are any, they are scored, and nothing is generated.
        forms: Further answers to score. One that is to the model the same as another is left out of the completion.
        seed: For sampling.
    """

    id: str
    messages: tuple[Message, ...]
    features: tuple[FeatureRef, ...]
    shared: int = 0
    decoding: Decoding = field(default_factory=Decoding)
    choices: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    seed: int = 0

    @property
    def thinking(self) -> bool:
        """Whether the prompt asks the model to think first. Choices are scored right behind the prompt, without."""
        return self.decoding.thinking and not self.choices


@dataclass(frozen=True)
class Completion:
    """What became of one request.

    Attributes:
        id: That of the request.
        text: The answer; empty where choices were scored, or where it was cut before the model had done thinking.
        tokens: Its tokens, those of the reasoning included, without the prompt's.
        prompt_tokens: How many tokens the prompt had.
        finish_reason: `stop`, `length`, `scored`, `cancelled` (with the text so far) or `error`.
        logprobs: The log-probability of each of the `choices` and `forms` as a whole answer.
        error: Why there is no answer. A value, not raised: other requests are answered all the same.
        reasoning: What the model thought before it answered.
    """

    id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    finish_reason: str = "stop"
    logprobs: Mapping[str, float] | None = None
    error: QvsplitError | None = None
    reasoning: str = ""


class Engine(Protocol):
    """What answers requests."""

    def answer(
        self, requests: Iterable[Request], *, on_text: Callable[[str, str], None] | None = None
    ) -> Iterator[Completion]:
        """Give one completion for each request, in any order.

        Args:
            requests: Taken as they are needed.
            on_text: Hears a request's id and more of its answer's text as it grows; nothing of its reasoning.

        Raises:
            QvsplitError: No request of this kind can be answered: the model cannot be loaded, or has an attention that
                is not supported; a schema cannot be followed.
        """

    def cancel(self) -> None:
        """End the calls of `answer` in progress soon: no more requests are taken, answers are cut where they are."""
