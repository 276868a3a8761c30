"""Features and tokens to tokens: the language model, loaded alone.

In: a `Prompt` and one tensor [n_tokens, width] an item. The prompt up to its last item is prefilled once (`prefill`);
then any number of questions behind any number of such prefixes are answered as one batch (`generate`), or their
choices are given their probabilities (`score`). The tokens are the very ones the full model gives on the pixels. The
features go in through transformers' `mm_encoder_outputs`; positions are those of its `get_rope_index`.
Knows nothing of pixels, files or encoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.errors import ModelError, OutOfMemory
from qvsplit.models.decoding import AnswerRules, Constraint, Decoding, GrowingAnswer, logits_processors
from qvsplit.models.prompt import Prompt, Prompter
from qvsplit.runtime.devices import dtype_name, is_out_of_memory
from qvsplit.runtime.tensors import as_torch
from qvsplit.store.features import POOLER_OUTPUT, Features, StoredTensor
from qvsplit.weights import load_language_model

if TYPE_CHECKING:
    import torch

    from qvsplit.models.prefix_cache import Prefix, SuffixCache
    from qvsplit.models.scoring import ScoreLayout

LOGITS_AT_ONCE = 64  # positions whose logits over the whole vocabulary are in memory together


@dataclass(frozen=True)
class PrefixedQuestion:
    """One question: the tokens behind a prefix, up to where the answer begins. `seed` is for sampling."""

    prefix: Prefix
    suffix: Sequence[int]
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Answer tokens without the prompt's, their text, and why they end.

    `stop`: the model said so, or a stop string came, which the text ends before; `length`: no more were allowed;
    `cancelled`: the caller said so; `error`: the model computed no numbers, and `error` says so.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    error: ModelError | None = None


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `generate`, beside the questions.

    Attributes:
        constraint: Makes what an answer must conform to, anew for every answer.
        on_text: Hears a question's number and more of its answer's text as it grows.
        is_cancelled: Asked before every token; where it says so, the answers end as they are.
    """

    constraint: Callable[[], Constraint] | None = None
    on_text: Callable[[int, str], None] | None = None
    is_cancelled: Callable[[], bool] = lambda: False


class LanguageModel:
    """The language model of one checkpoint."""

    def __init__(self, model: Any, prompter: Prompter) -> None:
        from qvsplit.kernels.shared_prefix_attention import ATTENTION

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

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        stops = self.model.generation_config.eos_token_id
        if stops is None:
            raise ModelError(f"{self.prompter.folder}: its generation_config.json names no eos_token_id; nothing ends")
        return frozenset(stops if isinstance(stops, list) else [stops])

    # ------------------------------------------------------------------------------------------------------ prefix

    def prefill(self, prompt: Prompt, features: Sequence[torch.Tensor], *, after: Prefix | None = None) -> Prefix:
        """Compute the KV prefix of `prompt` up to its last item.

        Args:
            prompt: The whole prompt.
            features: Those of its items, [n_tokens, width] each.
            after: A prefix of that very beginning: only the rest is computed, and `features` are the rest's.

        Raises:
            ValueError: Features and prompt do not belong together.
            OutOfMemory: They do not fit.
        """
        import torch

        from qvsplit.models.prefix_cache import Capture, Complete, Prefix, SuffixCache

        known, end = (len(after) if after else 0), prompt.prefix_tokens
        new = prompt.input_ids[known:end]
        if after is not None and list(after.input_ids) != prompt.input_ids[:known]:
            raise ValueError("the prompt does not begin with that prefix")
        self._check(prompt.mm_token_type_ids[known:end], features)
        encoded = _encoder_outputs(prompt, features)
        ids = torch.tensor([new], device=self.device)  # [1, n]
        positions, next_position = self._positions(prompt, end)
        with torch.inference_mode(), _memory_errors(end):
            if after is None:
                # where hooks move weights about, every layer must run to its end
                spread = hasattr(self.model, "hf_device_map")
                cache = Capture(None if spread else self.model.config.get_text_config().num_hidden_layers)
                with suppress(Complete):
                    self._forward(ids, positions, None, past_key_values=cache, mm_encoder_outputs=encoded)
                return Prefix(tuple(new), tuple(cache.keys), tuple(cache.values), next_position)
            suffixes = SuffixCache([after], [0])
            self._forward(
                ids, positions[:, :, known:], suffixes.seen(len(new), self.device),
                past_key_values=suffixes, suffixes=suffixes, mm_encoder_outputs=encoded,
            )  # fmt: skip
            return suffixes.behind(after, new, next_position)

    def _positions(self, prompt: Prompt, end: int) -> tuple[torch.Tensor, int]:
        """Give M-RoPE positions [3, 1, end] of the prompt's first `end` tokens, and that of the text token behind.

        The latter is what the model's own rule gives a token that stands there. `end` plus `rope_deltas`, which is one
        more than the largest position, is another behind a video that has more frames than rows and columns.
        """
        import torch

        ids = torch.tensor([[*prompt.input_ids[:end], 0]], device=self.device)  # [1, end + 1]
        types = torch.tensor([[*prompt.mm_token_type_ids[:end], 0]], device=self.device)
        grids = {
            f"{kind}_grid_thw": torch.tensor(grid, device=self.device)
            for kind in ("image", "video")
            if (grid := prompt.grids(kind))
        }
        positions, _ = self.model.model.get_rope_index(ids, types, **grids)
        return positions[:, :, :end], int(positions[0, 0, end])

    def _check(self, types: Sequence[int], features: Sequence[torch.Tensor]) -> None:
        width = self.model.config.get_text_config().hidden_size
        expected, rows = sum(map(bool, types)), sum(map(len, features))
        if rows != expected:
            raise ValueError(f"{expected} image tokens in the prompt, {rows} rows of features")
        if any(one.ndim != 2 or one.shape[1] != width for one in features):
            raise ValueError(f"features of shape {[list(one.shape) for one in features]}, the model is {width} wide")

    # ----------------------------------------------------------------------------------------------------- answers

    def generate(
        self, questions: Sequence[PrefixedQuestion], decoding: Decoding, options: GenerateOptions | None = None
    ) -> list[Generated]:
        """Answer `questions` as one batch, each answer ending by itself. OutOfMemory if the batch does not fit."""
        import torch

        options = options or GenerateOptions()
        rows = [self._growing(number, one, decoding, options) for number, one in enumerate(questions)]
        errors: dict[int, ModelError] = {}
        growing = list(range(len(rows)))
        with torch.inference_mode(), _memory_errors(self.tokens(questions)):
            suffixes, hidden = self._ask(questions)
            while True:
                self._take_tokens({number: rows[number] for number in growing}, hidden, errors)
                alive = [place for place, number in enumerate(growing) if rows[number].finish_reason is None]
                if not alive:
                    break
                if len(alive) < len(growing):
                    growing = [growing[place] for place in alive]
                    suffixes.keep(alive)
                if options.is_cancelled():
                    for number in growing:
                        rows[number].end("cancelled")
                    break
                asked = [questions[number] for number in growing]
                hidden = self._next(suffixes, asked, [rows[number].tokens for number in growing])
        return [
            Generated(row.tokens, row.text, row.finish_reason or "length", errors.get(number))
            for number, row in enumerate(rows)
        ]

    def _growing(
        self, number: int, question: PrefixedQuestion, decoding: Decoding, options: GenerateOptions
    ) -> GrowingAnswer:
        on_text = options.on_text
        prompt = [*question.prefix.input_ids, *question.suffix]
        rules = AnswerRules(
            decoding, self.stops, self.prompter.decode, logits_processors(self.model, decoding, len(prompt)),
            constraint=options.constraint() if options.constraint else None, seed=question.seed,
            on_text=(lambda text: on_text(number, text)) if on_text else None,
        )  # fmt: skip
        return GrowingAnswer(rules, prompt)

    def _take_tokens(
        self, growing: dict[int, GrowingAnswer], hidden: torch.Tensor, errors: dict[int, ModelError]
    ) -> None:
        """Choose each answer's next token by its last hidden state, of `hidden` [rows, width]."""
        finite = self._finite_rows(hidden)
        scores = self.model.lm_head(hidden).float()  # [rows, vocabulary], as transformers' generate has it
        plain = next(iter(growing.values())).is_plain
        most_probable = scores.argmax(-1).tolist() if plain else []
        for place, (number, row) in enumerate(growing.items()):
            if finite[place]:
                row.take(most_probable[place] if plain else row.choose(scores[place]))
            else:
                errors[number] = self._not_finite()
                row.end("error")

    def _next(
        self, suffixes: SuffixCache, questions: Sequence[PrefixedQuestion], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Run each answer's newest token; gives hidden states [rows, width]."""
        import torch

        ids = torch.tensor([[mine[-1]] for mine in tokens], device=self.device)
        places = [
            [one.prefix.next_position + len(one.suffix) + len(mine) - 1]
            for one, mine in zip(questions, tokens, strict=True)
        ]
        positions = torch.tensor(places, device=self.device).expand(3, -1, -1)
        seen = suffixes.seen(1, self.device)
        return self._forward(ids, positions, seen, past_key_values=suffixes, suffixes=suffixes)[:, -1]

    def tokens(self, questions: Sequence[PrefixedQuestion]) -> int:
        """Count the tokens in memory for a batch: every prefix once, and the suffixes padded to the longest."""
        prefixes = {id(one.prefix): len(one.prefix) for one in questions}
        return sum(prefixes.values()) + len(questions) * max(len(one.suffix) for one in questions)

    def _ask(self, questions: Sequence[PrefixedQuestion]) -> tuple[SuffixCache, torch.Tensor]:
        """Run the suffixes, left-padded, behind their prefixes; gives the last hidden state of each, [B, width]."""
        import torch

        from qvsplit.models.prefix_cache import SuffixCache

        longest = max(len(one.suffix) for one in questions)
        padding = [longest - len(one.suffix) for one in questions]
        ids = torch.tensor([[0] * pad + list(one.suffix) for pad, one in zip(padding, questions, strict=True)])
        first = torch.tensor([one.prefix.next_position - pad for pad, one in zip(padding, questions, strict=True)])
        positions = (first[:, None] + torch.arange(longest)).clamp(min=0)  # padding's is never looked at
        suffixes = SuffixCache([one.prefix for one in questions], padding)
        hidden = self._forward(
            ids.to(self.device), positions.to(self.device).expand(3, -1, -1), suffixes.seen(longest, self.device),
            past_key_values=suffixes, suffixes=suffixes,
        )  # fmt: skip
        return suffixes, hidden[:, -1]

    # ------------------------------------------------------------------------------------------------------ scores

    def score(
        self, questions: Sequence[PrefixedQuestion], choices: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float] | ModelError]:
        """Give log-probabilities of whole answers: for each question, of each of its `choices` and the end after it.

        One forward pass for all: behind its question's suffix, every choice sees the suffix and itself, not the others.
        A question for which the model computes no numbers has an error instead.
        """
        import torch

        from qvsplit.models.prefix_cache import SuffixCache
        from qvsplit.models.scoring import score_layout

        layout = score_layout(
            [one.suffix for one in questions], choices, [one.prefix.next_position for one in questions]
        ).to(self.device)
        with torch.inference_mode(), _memory_errors(self.tokens(questions)):
            suffixes = SuffixCache([one.prefix for one in questions], layout.padding)
            hidden = self._forward(
                layout.input_ids, layout.positions.expand(3, -1, -1), layout.seen,
                past_key_values=suffixes, suffixes=suffixes,
            )  # fmt: skip
            return self._sums(hidden, layout, choices)

    def _sums(
        self, hidden: torch.Tensor, layout: ScoreLayout, choices: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float] | ModelError]:
        """Add up log-probabilities, a few positions' logits at a time; an end is any of the model's stop tokens."""
        import torch

        stops = sorted(self.stops)
        wanted = [
            (number, which, column, [token] if token is not None else stops)
            for number, mine in enumerate(choices)
            for which, tokens in enumerate(mine)
            for column, token in zip(layout.columns[number][which], [*tokens, None], strict=True)
        ]
        sums = [[0.0] * len(mine) for mine in choices]
        for start in range(0, len(wanted), LOGITS_AT_ONCE):
            some = wanted[start : start + LOGITS_AT_ONCE]
            at = hidden[[number for number, _, _, _ in some], [column for _, _, column, _ in some]]
            logs = torch.log_softmax(self.model.lm_head(at).float(), -1)
            for (number, which, _, tokens), line in zip(some, logs, strict=True):
                sums[number][which] += float(torch.logsumexp(line[tokens].double(), 0))
        finite = self._finite_rows(hidden)
        return [
            mine if sound and not any(map(math.isnan, mine)) else self._not_finite()
            for sound, mine in zip(finite, sums, strict=True)
        ]

    # -------------------------------------------------------------------------------------------------- the forward

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor | None, **more: Any) -> Any:
        """Give hidden states [B, q, width] of `ids` [B, q] at M-RoPE `positions` [3, B, q]."""
        out = self.model.model(
            input_ids=ids, position_ids=positions, attention_mask={"full_attention": seen}, use_cache=True, **more
        )
        return out.last_hidden_state

    def _finite_rows(self, hidden: torch.Tensor) -> list[bool]:
        """Say of which rows of a batch all values are finite: what came of others would look like an answer."""
        finite = hidden.isfinite()
        if bool(finite.all()):
            return [True] * len(hidden)
        return [bool(row.all()) for row in finite]

    def _not_finite(self) -> ModelError:
        return ModelError(
            f"{self.prompter.folder} computes values that are not finite in {dtype_name(self.dtype)}; try a wider "
            "`dtype`, or download it again"
        )


def _encoder_outputs(prompt: Prompt, features: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Give the features of the prompt's last items as the model takes them: by kind, as its encoder would give them."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    by_kind: dict[str, list[torch.Tensor]] = {}
    for one, tensor in zip(prompt.placeholders[-len(features) :], features, strict=True):
        by_kind.setdefault(one.kind, []).append(tensor)
    return {kind: BaseModelOutputWithPooling(pooler_output=tensors) for kind, tensors in by_kind.items()}


@contextmanager
def _memory_errors(tokens: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"a prompt of {tokens:,} tokens does not fit into memory beside the model; ask fewer images together, or "
            "try another `device` or a narrower `dtype`"
        ) from None


def load(
    checkpoint: Checkpoint, *, device: torch.device | None, dtype: torch.dtype | None, device_map: str | None = None
) -> LanguageModel:
    """Load the language model on `device`, or spread by `device_map` as transformers and accelerate do."""
    import torch

    from qvsplit.kernels.packed_linear import pack

    prompter = Prompter(checkpoint)
    mapped: str | dict[str, Any] | None = device_map
    if device_map is None and device is not None and device.type != "cpu":
        mapped = {"": device}
    model = load_language_model(checkpoint, dtype=dtype, device_map=mapped)
    if model.dtype == torch.float32 and not hasattr(model, "hf_device_map"):
        pack(model)
    return LanguageModel(model, prompter)


def as_tensor(stored: StoredTensor | Features) -> torch.Tensor:
    """Give a stored tensor, or the `pooler_output` of features, as torch's: [n_tokens, width], on the CPU, bit for bit.

    The dtype is the stored one; of int8 it is float32: whole numbers times their token's scale.
    """
    tensor = stored.tensors[POOLER_OUTPUT] if isinstance(stored, Features) else stored
    return as_torch(tensor.numpy() if tensor.dtype == "int8" else tensor.raw, tensor.dtype)
