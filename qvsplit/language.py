"""Embeddings and tokens to tokens: the language half, loaded alone.

In: a `Prompt` and one tensor [n_tokens, hidden_size] a picture. The prompt up to its last picture is prefilled once
(`prefill`); then any number of questions behind any number of such prefixes are answered as one batch (`generate`),
or allowed answers are given their probabilities (`score`). The tokens are the very ones the whole model gives on the
pixels. The embeddings go in through transformers' `mm_encoder_outputs`, positions are those of its `get_rope_index`.
Knows nothing of pixels, files or towers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.checkpoint import Checkpoint
from qvsplit.devices import dtype_name, is_out_of_memory
from qvsplit.errors import ModelError, OutOfMemory, UsageError
from qvsplit.prompt import Prompt, Prompter
from qvsplit.recipe import DTYPE_BYTES
from qvsplit.store import Embeds
from qvsplit.weights import load_language

if TYPE_CHECKING:
    import torch

    from qvsplit.prefix import Prefix, Tails

LOGITS_AT_ONCE = 64  # positions whose logits over the whole vocabulary are in memory together


class Constraint(Protocol):
    """What an answer must conform to, followed token by token."""

    def allow(self, scores: torch.Tensor) -> None:
        """Set the scores, [vocabulary], of tokens that may not come next to minus infinity."""

    def take(self, token: int) -> None:
        """`token` came next."""


@dataclass(frozen=True)
class Decoding:
    """How answers are made. Greedy where `temperature` is None; else sampled, top_p and top_k only where given."""

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()  # an answer ends before any of these
    constraint: Callable[[], Constraint] | None = None  # made anew for every answer


@dataclass(frozen=True)
class Asked:
    """One question: the tokens behind a prefix, up to where the answer begins. `seed` is for sampling."""

    prefix: Prefix
    tail: Sequence[int]
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """Answer tokens without the prompt's, their text, and why they end.

    `stop`: the model said so, or a stop string came, which the text ends before; `length`: no more were allowed.
    """

    tokens: list[int]
    text: str
    finish_reason: str


class Language:
    """The language half of one checkpoint."""

    def __init__(self, model: Any, prompter: Prompter) -> None:
        from qvsplit.prefix import ATTENTION

        other = set(model.config.get_text_config().layer_types) - {"full_attention"}
        if other:
            raise ModelError(
                f"{model.name_or_path} has layers of {', '.join(other)}; qvsplit knows full attention only"
            )
        model.set_attn_implementation({"text_config": ATTENTION})
        self.model = model
        self.prompter = prompter

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.model.get_input_embeddings().weight.device

    def prefill(self, prompt: Prompt, pictures: Sequence[torch.Tensor], *, after: Prefix | None = None) -> Prefix:
        """The KV prefix of `prompt` up to its last picture; `pictures` are its embeddings, [n_tokens, hidden_size].

        With `after`, a prefix of that very beginning, only the rest is computed, and `pictures` are the rest's.
        ValueError if embeddings and prompt do not belong together, OutOfMemory if they do not fit.
        """
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        from qvsplit.prefix import Capture, Complete, Prefix, Tails

        known, end = (len(after) if after else 0), prompt.prefix_tokens
        new = prompt.input_ids[known:end]
        if after is not None and list(after.input_ids) != prompt.input_ids[:known]:
            raise ValueError("the prompt does not begin with that prefix")
        self._check(prompt.mm_token_type_ids[known:end], pictures)
        ids = torch.tensor([prompt.input_ids[:end]], device=self.device)  # [1, n]
        types = torch.tensor([prompt.mm_token_type_ids[:end]], device=self.device)
        grids = torch.tensor(prompt.grids, device=self.device)
        positions, deltas = self.model.model.get_rope_index(ids, types, image_grid_thw=grids)  # [3, 1, n], [1, 1]
        encoded = BaseModelOutputWithPooling(pooler_output=list(pictures))
        next_position = end + int(deltas)
        with torch.inference_mode(), _memory_errors(end):
            if after is None:
                # where hooks move weights about, every layer must run to its end
                spread = hasattr(self.model, "hf_device_map")
                cache = Capture(None if spread else self.model.config.get_text_config().num_hidden_layers)
                with suppress(Complete):
                    self._forward(ids, positions, None, past_key_values=cache, mm_encoder_outputs={"image": encoded})
                return Prefix(tuple(new), tuple(cache.keys), tuple(cache.values), next_position)
            tails = Tails([after], [0])
            self._forward(
                ids[:, known:], positions[:, :, known:], tails.seen(len(new), self.device),
                past_key_values=tails, tails=tails, mm_encoder_outputs={"image": encoded},
            )  # fmt: skip
            return tails.behind(after, new, next_position)

    def generate(
        self, asked: Sequence[Asked], decoding: Decoding, *, on_text: Callable[[str], None] | None = None
    ) -> list[Completion]:
        """Answers to `asked`, as one batch, each ending by itself; `on_text` hears the first one's text as it grows.

        OutOfMemory if the batch does not fit.
        """
        import torch

        rows = [_Growing(self, one, decoding, on_text if number == 0 else None) for number, one in enumerate(asked)]
        growing = list(rows)
        with torch.inference_mode(), _memory_errors(self.tokens(asked)):
            tails, hidden = self._ask(asked)
            while True:
                self._check_finite(hidden)
                scores = self.model.lm_head(hidden).float()  # [rows, vocabulary], as transformers' generate has it
                if growing[0].is_plain:
                    tokens = scores.argmax(-1).tolist()
                else:
                    tokens = [row.choose(one) for row, one in zip(growing, scores, strict=True)]
                for row, token in zip(growing, tokens, strict=True):
                    row.take(token)
                alive = [number for number, row in enumerate(growing) if row.finish_reason is None]
                if not alive:
                    break
                if len(alive) < len(growing):
                    growing = [growing[number] for number in alive]
                    tails.keep(alive)
                ids = torch.tensor([[row.tokens[-1]] for row in growing], device=self.device)
                positions = torch.tensor([[row.next_position] for row in growing], device=self.device)
                hidden = self._forward(
                    ids, positions.expand(3, -1, -1), tails.seen(1, self.device), past_key_values=tails, tails=tails
                )[:, -1]
        return [Completion(row.tokens, row.text, row.finish_reason or "length") for row in rows]

    def score(self, asked: Sequence[Asked], answers: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Log-probabilities of whole answers: for each question, of each of its `answers` and the end after it.

        One forward pass for all: behind its question's tail, every answer sees the tail and itself, not the others.
        """
        import torch

        from qvsplit.prefix import Tails

        rows = [list(one.tail) + [token for tokens in mine for token in tokens]
                for one, mine in zip(asked, answers, strict=True)]  # fmt: skip
        longest = max(map(len, rows))
        positions = torch.zeros(len(rows), longest, dtype=torch.long)
        part = torch.full((len(rows), longest), -1)  # of its row: -1 padding, 0 the tail, then the answers
        places: list[list[list[int]]] = []  # for each question and answer, the columns that foretell its tokens
        for number, (one, mine) in enumerate(zip(asked, answers, strict=True)):
            start = longest - len(rows[number])
            tail = len(one.tail)
            positions[number, start : start + tail] = torch.arange(tail) + one.prefix.next_position
            part[number, start : start + tail] = 0
            column = start + tail
            places.append([])
            for which, tokens in enumerate(mine, 1):
                end = column + len(tokens)
                positions[number, column:end] = torch.arange(len(tokens)) + one.prefix.next_position + tail
                part[number, column:end] = which
                places[-1].append([start + tail - 1, *range(column, end)])
                column = end
        positions, part = positions.to(self.device), part.to(self.device)
        same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
        seen = same.tril() & (part >= 0)[:, None, :]  # [rows, q, q]
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.device)
        with torch.inference_mode(), _memory_errors(self.tokens(asked)):
            tails = Tails([one.prefix for one in asked], [longest - len(row) for row in rows])
            hidden = self._forward(ids, positions.expand(3, -1, -1), seen, past_key_values=tails, tails=tails)
            return self._sums(hidden, places, answers)

    def _sums(
        self, hidden: torch.Tensor, places: list[list[list[int]]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Sums of log-probabilities, a few positions' logits at a time; an end is any of the model's stop tokens."""
        import torch

        stops = sorted(self.stops)
        wanted = [
            (number, which, column, [token] if token is not None else stops)
            for number, mine in enumerate(answers)
            for which, tokens in enumerate(mine)
            for column, token in zip(places[number][which], [*tokens, None], strict=True)
        ]
        self._check_finite(hidden)
        sums = [[0.0] * len(mine) for mine in answers]
        for start in range(0, len(wanted), LOGITS_AT_ONCE):
            some = wanted[start : start + LOGITS_AT_ONCE]
            at = hidden[[number for number, _, _, _ in some], [column for _, _, column, _ in some]]
            logs = torch.log_softmax(self.model.lm_head(at).float(), -1)
            for (number, which, _, tokens), line in zip(some, logs, strict=True):
                sums[number][which] += float(torch.logsumexp(line[tokens].double(), 0))
        if any(math.isnan(one) for mine in sums for one in mine):
            raise self._not_finite()
        return sums

    @property
    def stops(self) -> set[int]:
        """Tokens that end an answer."""
        stops = self.model.generation_config.eos_token_id
        if stops is None:
            raise ModelError(f"{self.prompter.folder}: its generation_config.json names no eos_token_id; nothing ends")
        return set(stops) if isinstance(stops, list) else {stops}

    def tokens(self, asked: Sequence[Asked]) -> int:
        """Tokens in memory for a batch: every prefix once, and the tails padded to the longest."""
        prefixes = {id(one.prefix): len(one.prefix) for one in asked}
        return sum(prefixes.values()) + len(asked) * max(len(one.tail) for one in asked)

    def _ask(self, asked: Sequence[Asked]) -> tuple[Tails, torch.Tensor]:
        """The tails of `asked`, left-padded, behind their prefixes; and the last hidden state of each, [B, hidden]."""
        import torch

        from qvsplit.prefix import Tails

        longest = max(len(one.tail) for one in asked)
        padding = [longest - len(one.tail) for one in asked]
        ids = torch.tensor([[0] * pad + list(one.tail) for pad, one in zip(padding, asked, strict=True)])
        first = torch.tensor([one.prefix.next_position - pad for pad, one in zip(padding, asked, strict=True)])
        positions = (first[:, None] + torch.arange(longest)).clamp(min=0)  # padding's is never looked at
        tails = Tails([one.prefix for one in asked], padding)
        hidden = self._forward(
            ids.to(self.device), positions.to(self.device).expand(3, -1, -1), tails.seen(longest, self.device),
            past_key_values=tails, tails=tails,
        )  # fmt: skip
        return tails, hidden[:, -1]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor | None, **more: Any) -> Any:
        """Hidden states [B, q, hidden] of `ids` [B, q] at M-RoPE `positions` [3, B, q]."""
        out = self.model.model(
            input_ids=ids, position_ids=positions, attention_mask={"full_attention": seen}, use_cache=True, **more
        )
        return out.last_hidden_state

    def _check_finite(self, hidden: torch.Tensor) -> None:
        """ModelError where the model has computed infinities or NaN: what came of them would look like an answer."""
        if not bool(hidden.isfinite().all()):
            raise self._not_finite()

    def _not_finite(self) -> ModelError:
        return ModelError(
            f"{self.prompter.folder} computes values that are not finite in {dtype_name(self.dtype)}; try a wider "
            "--dtype, or download it again"
        )

    def _check(self, types: Sequence[int], pictures: Sequence[torch.Tensor]) -> None:
        width = self.model.config.get_text_config().hidden_size
        expected = sum(types)  # ones where a picture's token stands
        if sum(len(p) for p in pictures) != expected:
            raise ValueError(
                f"{expected} picture tokens in the prompt, {sum(len(p) for p in pictures)} rows of embeddings"
            )
        if any(p.ndim != 2 or p.shape[1] != width for p in pictures):
            raise ValueError(f"embeddings of shape {[list(p.shape) for p in pictures]}, and the model is {width} wide")


class _Growing:
    """One answer as it grows."""

    def __init__(
        self, language: Language, asked: Asked, decoding: Decoding, on_text: Callable[[str], None] | None
    ) -> None:
        self.decoding = decoding
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._next_position = asked.prefix.next_position + len(asked.tail) - 1
        self._decode = language.prompter.decode
        self._stops = language.stops
        self._on_text, self._told = on_text, 0
        self._prompt = [*asked.prefix.input_ids, *asked.tail]
        self._processors = _processors(language.model, decoding, len(self._prompt))
        self._constraint = decoding.constraint() if decoding.constraint else None
        self._generator: torch.Generator | None = None
        if decoding.temperature is not None:
            import torch

            self._generator = torch.Generator().manual_seed(asked.seed)

    @property
    def next_position(self) -> int:
        """M-RoPE position of the newest token."""
        return self._next_position + len(self.tokens)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the likeliest; the same for every row of a batch."""
        return self._generator is None and self._constraint is None and not self._processors

    def choose(self, scores: torch.Tensor) -> int:
        """The next token by `scores`, [vocabulary], as transformers' processors and the constraint leave them."""
        import torch

        if self._constraint is not None:
            self._constraint.allow(scores)
        if self._processors:
            ids = torch.tensor([self._prompt + self.tokens], device=scores.device)
            processed = self._processors(ids, scores[None].clone())[0]
            # a checkpoint's own rules (no bigram twice, say) may forbid all that a schema allows: the schema holds
            scores = processed if self._constraint is None or bool(processed.isfinite().any()) else scores
        if self._generator is None:
            return int(scores.argmax())
        # drawn on the CPU, from a generator of its own: the same whatever is asked beside it, and on any device
        return int(torch.multinomial(torch.softmax(scores, -1).cpu(), 1, generator=self._generator))

    def take(self, token: int) -> None:
        """Go on with `token`; sets `finish_reason` where the answer ends."""
        self.tokens.append(token)
        if self._constraint is not None:
            self._constraint.take(token)
        if token in self._stops:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.decoding.max_new_tokens:
            self.finish_reason = "length"
        if not (self.finish_reason or self.decoding.stop or self._on_text):
            return
        self.text = self._decode(self.tokens)
        found = [at for stop in self.decoding.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finish_reason = self.text[: min(found)], "stop"
        if self._on_text is not None:
            self._tell(self._on_text)

    def _tell(self, on_text: Callable[[str], None]) -> None:
        """What can no longer change: not half a character, nor what may be the beginning of a stop string."""
        sure = len(self.text)
        if self.finish_reason is None:
            sure -= len(self.text) - len(self.text.rstrip("\ufffd"))
            for stop in self.decoding.stop:
                sure = min(sure, len(self.text) - _overlap(self.text, stop))
        if sure > self._told:
            on_text(self.text[self._told : sure])
            self._told = sure


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _processors(model: Any, decoding: Decoding, prompt_tokens: int) -> Any:
    """What transformers' own `generate` would do to the scores before a token is chosen.

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


@contextmanager
def _memory_errors(tokens: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"a prompt of {tokens:,} tokens does not fit into memory beside the model; ask fewer pictures together, or "
            "try another --device or a narrower --dtype"
        ) from None


def load(
    checkpoint: Checkpoint, *, device: torch.device | None, dtype: torch.dtype | None, device_map: str | None = None
) -> Language:
    """The language half of `checkpoint` on `device`, or spread by `device_map` as transformers and accelerate do."""
    import torch

    from qvsplit.packing import pack

    prompter = Prompter(checkpoint)
    mapped: str | dict[str, Any] | None = device_map
    if device_map is None and device is not None and device.type != "cpu":
        mapped = {"": device}
    model = load_language(checkpoint, dtype=dtype, device_map=mapped)
    if model.dtype == torch.float32 and not hasattr(model, "hf_device_map"):
        pack(model)
    return Language(model, prompter)


def as_tensor(embeds: Embeds) -> torch.Tensor:
    """Stored embeddings as a tensor [n_tokens, hidden_size] in the stored dtype, on the CPU, bit for bit.

    Of int8 it is float32: whole numbers times their token's scale.
    """
    import torch

    if embeds.dtype == "int8":
        return torch.from_numpy(embeds.numpy())
    if embeds.dtype not in DTYPE_BYTES:
        raise UsageError(f"no tensor of dtype {embeds.dtype}")
    return torch.from_numpy(embeds.raw).view(getattr(torch, embeds.dtype))
