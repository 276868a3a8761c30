"""Embeddings and tokens to tokens: the language half, loaded alone.

In: a `Prompt` and one tensor [n_tokens, hidden_size] a picture. Out: answer tokens, greedy by default, the very
ones the whole model gives on the pixels. The embeddings go in through transformers' `mm_encoder_outputs`, always
together with grid and token types, so that positions are M-RoPE's. Knows nothing of pixels, files or towers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoint import Checkpoint
from qvsplit.devices import is_out_of_memory
from qvsplit.errors import ModelError, UsageError
from qvsplit.prompt import Prompt, Prompter
from qvsplit.recipe import DTYPE_BYTES
from qvsplit.store import Embeds
from qvsplit.weights import load_language

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Completion:
    """Answer tokens without the prompt's, and why they end: `stop` (the model said so) or `length`."""

    tokens: list[int]
    finish_reason: str


class Language:
    """The language half of one checkpoint."""

    def __init__(self, model: Any, prompter: Prompter) -> None:
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

    def generate(
        self,
        prompt: Prompt,
        pictures: Sequence[torch.Tensor],
        *,
        max_new_tokens: int,
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """Greedy answer to `prompt`; `pictures` are its embeddings in order, [n_tokens, hidden_size] each.

        `on_text` hears the answer's text as it grows. ValueError if embeddings and prompt do not belong together.
        """
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        self._check(prompt, pictures)
        ids = torch.tensor([prompt.input_ids], device=self.device)  # [1, tokens]
        # rope_deltas is state that the model keeps between calls; a fresh prompt must not inherit it
        self.model.model.rope_deltas = None
        with torch.inference_mode(), _memory_errors(len(prompt.input_ids)):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=torch.tensor([prompt.mm_token_type_ids], device=self.device),
                image_grid_thw=torch.tensor(prompt.grids, device=self.device),
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(pictures))},
                max_new_tokens=max_new_tokens,
                streamer=_streamer(self.prompter.tokenizer, on_text) if on_text else None,
                **GREEDY,
            )
        tokens = out[0, ids.shape[1] :].tolist()
        return Completion(tokens, "stop" if tokens and tokens[-1] in self._stops() else "length")

    def _check(self, prompt: Prompt, pictures: Sequence[torch.Tensor]) -> None:
        width = self.model.config.get_text_config().hidden_size
        expected = sum(prompt.mm_token_type_ids)  # ones where a picture's token stands
        if len(pictures) != len(prompt.grids) or sum(len(p) for p in pictures) != expected:
            raise ValueError(
                f"{expected} picture tokens in the prompt, {sum(len(p) for p in pictures)} rows of embeddings"
            )
        if any(p.ndim != 2 or p.shape[1] != width for p in pictures):
            raise ValueError(f"embeddings of shape {[list(p.shape) for p in pictures]}, and the model is {width} wide")

    def _stops(self) -> set[int]:
        stops = self.model.generation_config.eos_token_id
        return set(stops) if isinstance(stops, list) else {stops}


# Greedy, whatever the checkpoint's generation_config.json says of sampling (the hub's says: sample)
GREEDY: Mapping[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@contextmanager
def _memory_errors(tokens: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"a prompt of {tokens:,} tokens does not fit into memory beside the model; ask fewer pictures together, or "
            "try another --device or a narrower --dtype"
        ) from None


def load(
    checkpoint: Checkpoint, *, device: torch.device | None, dtype: torch.dtype | None, device_map: str | None = None
) -> Language:
    """The language half of `checkpoint` on `device`, or spread by `device_map` as transformers and accelerate do."""
    prompter = Prompter(checkpoint)
    mapped: str | dict[str, Any] | None = device_map
    if device_map is None and device is not None and device.type != "cpu":
        mapped = {"": device}
    return Language(load_language(checkpoint, dtype=dtype, device_map=mapped), prompter)


def as_tensor(embeds: Embeds) -> torch.Tensor:
    """Stored embeddings as a tensor [n_tokens, hidden_size] in the stored dtype, on the CPU, bit for bit."""
    import torch

    if embeds.dtype not in DTYPE_BYTES:
        raise UsageError(f"no tensor of dtype {embeds.dtype}")
    return torch.from_numpy(embeds.raw).view(getattr(torch, embeds.dtype))


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Teller(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Teller(tokenizer, skip_prompt=True, skip_special_tokens=True)
