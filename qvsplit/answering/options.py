"""Options of asking. Imports nothing heavy: the command line and recorded answers are checked without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from qvsplit.errors import UsageError
from qvsplit.models.decoding import Decoding
from qvsplit.runtime import arguments
from qvsplit.runtime.dtypes import DTYPE_BYTES
from qvsplit.store.config import KERNELS

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class AskOptions:
    """Options of asking. None is the store's own, or the default.

        options = qvsplit.AskOptions(max_new_tokens=32, system="Be brief.")
        session = qvsplit.load_session("embeds", options)

    Answers are greedy without `temperature`; with it, or `top_p` or `top_k`, they are sampled, and the same `seed`
    gives the same answers whatever is asked beside them.

    Attributes:
        model: The checkpoint.
        adapter: A PEFT adapter, a folder or a hub name, with a revision behind an `@`: merged into the language model.
            Where neither this nor `model` is given it is the one that the store's encoder was made with.
        device: `auto` spreads the model over all devices, as transformers does.
        dtype: The compute dtype.
        kernels: "fused", fast, or "reference": transformers' own modules, one question at a time from its whole prompt,
            whose scores are the full model's to the bit where the features are.
        max_new_tokens: Of one answer, reasoning included.
        system: The system message.
        unchecked_encoder: Whether a store may be used whose encoder nothing vouches for.
        temperature: For sampling.
        top_p: For sampling.
        top_k: For sampling.
        seed: For sampling.
        stop: An answer ends before any of these texts.
        json_schema: What answers must conform to.
        token_budget: Tokens of KV cache that a batch may take.
        prefix_cache_tokens: Tokens of KV cache that are kept for the next question; 0 keeps none.
        thinking: Whether a model that can is asked to think before it answers. `Answer.reasoning` has what it thought,
            also of a model that thinks unasked. Choices are scored without.
    """

    model: str | None = None
    adapter: str | None = None
    device: str | None = None
    dtype: str | None = None
    kernels: str = KERNELS[0]
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
    thinking: bool = False

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
            thinking=self.thinking,
        )  # fmt: skip

    def __post_init__(self) -> None:
        """Take a path as a model's name or an adapter's, and one text, or a list of them, to stop at."""
        for name in ("model", "adapter"):
            place: Any = getattr(self, name)
            if isinstance(place, PathLike):
                object.__setattr__(self, name, fspath(place))
        stop: Any = self.stop
        if isinstance(stop, str | list):
            object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))

    def check(self) -> None:
        """Raise UsageError for values that mean nothing."""
        texts = ("model", "adapter", "device", "dtype", "system")
        arguments.check_texts("a text", {name: getattr(self, name) for name in texts})
        arguments.check_one_of("kernels", self.kernels, KERNELS)
        arguments.check_flags({"unchecked_encoder": self.unchecked_encoder, "thinking": self.thinking})
        if self.dtype is not None:
            arguments.check_one_of("dtype", self.dtype, tuple(DTYPE_BYTES))
        arguments.check_number("max_new_tokens", self.max_new_tokens, least=1)
        arguments.check_number("seed", self.seed)
        for name, least in (("top_k", 1), ("token_budget", 1), ("prefix_cache_tokens", 0)):
            if getattr(self, name) is not None:
                arguments.check_number(name, getattr(self, name), least=least)
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None:
                arguments.check_number(name, getattr(self, name), whole=False)
        if self.temperature is not None and self.temperature <= 0:
            raise UsageError("`temperature` must be above 0; leave it out for greedy answers")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError("`top_p` must be above 0, and at most 1")
        if not isinstance(self.stop, tuple):
            raise arguments.wrong("stop", self.stop, "a text or several")
        for stop in self.stop:
            if not isinstance(stop, str):
                raise arguments.wrong("stop", stop, "a text or several")
            if not stop:
                raise UsageError("`stop` must not be empty")
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise arguments.wrong("json_schema", self.json_schema, "a JSON schema as a dict")
