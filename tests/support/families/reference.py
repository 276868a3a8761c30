"""The full model of transformers with its processor: what every answer and every feature is held against."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from tests.support.families import ALL, make_checkpoint

NEW_TOKENS = 12
FPS = 2.0  # frames a second that a processor takes which samples them itself


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video, uint8 [frames, 3, height, width], and which they are; else all of its frames."""

    frames: torch.Tensor
    metadata: VideoMetadata


def noise_clip(seed: int, frames: int = 4, width: int = 96, height: int = 64, *, every: int = 3) -> Clip:
    """A clip of random pixels, of which every so many frames are shown, at 7.5 frames a second."""
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 3, height, width), dtype=np.uint8)
    total = frames * every
    metadata = VideoMetadata(
        total_num_frames=total, fps=7.5, duration=total / 7.5, width=width, height=height,
        frames_indices=list(range(0, total, every)),
    )  # fmt: skip
    return Clip(torch.from_numpy(pixels), metadata)


Item = Image.Image | Clip


def shown_item(item: Item) -> dict[str, Any]:
    """An item as a part of a conversation."""
    return {"type": "video", "video": item.frames} if isinstance(item, Clip) else {"type": "image", "image": item}


class Reference:
    """The full model of a tiny checkpoint, loaded by transformers alone.

    `loading` is what transformers says about the keys that it found or missed. An Omni checkpoint is loaded by the
    thinker's own class: its config takes the section of config.json whose `model_type` is its own, and its conversion
    mapping drops `thinker.` and passes over `talker.` and `token2wav.` or `code2wav.`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        family = ALL[json.loads((folder / "config.json").read_text())["model_type"]]
        self.processor = AutoProcessor.from_pretrained(folder)
        # attention is sdpa by default, except where the family cannot (Gemma 2)
        self.model, self.loading = family.cls().from_pretrained(folder, dtype=dtype, output_loading_info=True)
        self.model.eval()

    def inputs(self, items: Sequence[Item], question: str, system: str | None = None, **template: Any) -> Any:
        """Everything `generate` takes, made by the processor of images and clips and the question behind them."""
        content = [*map(shown_item, items), {"type": "text", "text": question}]
        chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return self.processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            processor_kwargs=clip_options(items), **template,
        )  # fmt: skip

    def steps(
        self, items: Sequence[Item], question: str, system: str | None = None, new_tokens: int = NEW_TOKENS,
        **template: Any,
    ) -> tuple[list[int], torch.Tensor]:  # fmt: skip
        """The tokens of a greedy answer, and the logits of each, [steps, vocabulary]."""
        inputs = self.inputs(items, question, system, **template)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.stack(out.logits)[:, 0]

    def logprob(self, items: Sequence[Item], question: str, tokens: Sequence[int], **template: Any) -> float:
        """The log-probability of a whole answer: of its tokens, and of the end after them."""
        inputs = self.inputs(items, question, **template)
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

    def answer(self, items: Sequence[Item], question: str, *rest: Any, **options: Any) -> list[int]:
        """The tokens of a greedy answer."""
        return self.steps(items, question, *rest, **options)[0]

    def logits(self, items: Sequence[Item], question: str, system: str | None = None, **template: Any) -> torch.Tensor:
        """The logits of the first token of an answer, [vocabulary]."""
        return self.steps(items, question, system, 1, **template)[1][0]

    def features(self, item: Item) -> Any:
        """What `get_image_features` or `get_video_features` gives for one item, fed as `generate` would feed it."""
        kind = "video" if isinstance(item, Clip) else "image"
        features = getattr(self.model.base_model, f"get_{kind}_features")
        takes = inspect.signature(features).parameters
        given = {name: value for name, value in self.inputs([item], "").items() if name in takes}
        with torch.inference_mode():
            return features(**given, return_dict=True)


Made = tuple[Path, Reference]  # a family's tiny checkpoint, and its full model


def make_reference(name: str, folder: Path) -> Made:
    """Make the tiny checkpoint of a family in the new `folder`, and load its full model."""
    make_checkpoint(name, folder)
    return folder, Reference(folder)


def clip_options(items: Sequence[Item]) -> dict[str, Any]:
    """What a processor is told of the clips: copies, for some lengthen a clip's list of frames."""
    metadata = [copy.deepcopy(item.metadata) for item in items if isinstance(item, Clip)]
    if not metadata:
        return {}
    sampling = (
        {"do_sample_frames": True, "fps": FPS} if metadata[0].frames_indices is None else {"do_sample_frames": False}
    )
    return {"videos_kwargs": {"video_metadata": metadata, **sampling}}
