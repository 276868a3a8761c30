"""The full model of transformers with its processor: the reference that answers and features are held against."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

QUESTIONS = [
    "What is in the picture?",
    "Is it day or night?",
    "How many people are there?",
    "Describe the picture in one sentence.",
    "图片里有什么？",
]
NEW_TOKENS = 12


@contextlib.contextmanager
def scores(model: Any) -> Iterator[list[torch.Tensor]]:
    """Hear what the output layer of a model gives for each next token, [vocabulary], float32 as `generate` has it."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[-1][0, -1].float()))
    try:
        yield seen
    finally:
        hook.remove()


class FullModel:
    """The full model with its processor: what every answer is held against."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, max_pixels: int = 1280 * 28 * 28) -> None:
        from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": max_pixels}
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()

    def inputs(self, images, question, system=None):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.processor(text=[text], images=images, return_tensors="pt")

    def answer(self, images, question, system=None, new_tokens=NEW_TOKENS) -> list[int]:
        return self.answer_to(self.inputs(images, question, system), new_tokens)

    def answer_to(self, inputs, new_tokens=NEW_TOKENS) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def gaps(self, images, question, new_tokens=NEW_TOKENS) -> list[float]:
        """Give, for every token of the answer, how far apart the two best logits are."""
        inputs = self.inputs(images, question)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        best = [logits[0].float().topk(2).values for logits in out.logits]
        return [float(first - second) for first, second in best]

    def features(self, images) -> list[torch.Tensor]:
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True)
        return list(output.pooler_output)


@functools.cache
def upright_rgb(path: Path) -> Image.Image:
    """The reference's image, decoded here and not by qvsplit: upright, over white, 8-bit RGB."""
    from PIL import ImageOps
    from qwen_vl_utils.vision_process import to_rgb

    with Image.open(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))
