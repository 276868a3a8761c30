"""The full model of transformers with its processor: what every answer and every feature is held against."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from tests.support.families import ALL

NEW_TOKENS = 12


class Reference:
    """The full model of a tiny checkpoint, loaded by transformers alone.

    `loading` is what transformers says about the keys that it found or missed. An Omni checkpoint is loaded by the
    thinker's own class: its config takes the section of config.json whose `model_type` is its own, and its conversion
    mapping drops `thinker.` and passes over `talker.` and `token2wav.` or `code2wav.`.
    """

    def __init__(self, folder: Path) -> None:
        family = ALL[json.loads((folder / "config.json").read_text())["model_type"]]
        self.processor = AutoProcessor.from_pretrained(folder)
        # attention is sdpa by default, except where the family cannot (Gemma 2)
        self.model, self.loading = family.cls().from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        self.model.eval()

    def inputs(self, images: Sequence[Image.Image], question: str, system: str | None = None, **template: Any) -> Any:
        """Everything `generate` takes, made by the processor of the images and the question behind them."""
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return self.processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **template
        )

    def steps(
        self, images: Sequence[Image.Image], question: str, system: str | None = None, new_tokens: int = NEW_TOKENS,
        **template: Any,
    ) -> tuple[list[int], torch.Tensor]:  # fmt: skip
        """The tokens of a greedy answer, and the logits of each, [steps, vocabulary]."""
        inputs = self.inputs(images, question, system, **template)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.stack(out.logits)[:, 0]

    def logprob(self, images: Sequence[Image.Image], question: str, tokens: Sequence[int], **template: Any) -> float:
        """The log-probability of a whole answer: of its tokens, and of the end after them."""
        inputs = self.inputs(images, question, **template)
        asked, ends = inputs["input_ids"].shape[1], self.model.generation_config.eos_token_id
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=len(tokens) + 1, do_sample=False, temperature=None, top_p=None, top_k=None,
                return_dict_in_generate=True, output_logits=True,
                prefix_allowed_tokens_fn=lambda _, ids: [[*tokens, tokens[0]][len(ids) - asked]],
            )  # fmt: skip
        logs = torch.log_softmax(torch.stack(out.logits)[:, 0].double(), -1)
        end = torch.logsumexp(logs[len(tokens), ends if isinstance(ends, list) else [ends]], 0)
        return float(sum(logs[place, token] for place, token in enumerate(tokens)) + end)

    def answer(self, images: Sequence[Image.Image], question: str, *rest: Any, **options: Any) -> list[int]:
        """The tokens of a greedy answer."""
        return self.steps(images, question, *rest, **options)[0]

    def logits(self, images: Sequence[Image.Image], question: str, *rest: Any, **options: Any) -> torch.Tensor:
        """The logits of the first token of an answer, [vocabulary]."""
        return self.steps(images, question, *rest, **options, new_tokens=1)[1][0]

    def features(self, image: Image.Image) -> Any:
        """What `get_image_features` gives for one image, fed as `generate` would feed it."""
        features = self.model.base_model.get_image_features
        takes = inspect.signature(features).parameters
        given = {name: value for name, value in self.inputs([image], "").items() if name in takes}
        with torch.inference_mode():
            return features(**given, return_dict=True)
