"""The demo model's shape, its tokenizer, and a fast forward pass for training it.

The model is transformers' own `Qwen2VLForConditionalGeneration`; `vision_forward` and `Packed` compute with its
modules and weights what its own forward computes, only faster on a CPU: one matrix product for the patches (a still
picture's two temporal slices are the same pixels), all pictures of one size in one attention, and several questions
behind one picture in one sequence. tests/test_demo.py holds them against transformers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from qvsplit.checkpoints.families import PROCESSOR_SETTINGS
from tests.support import checkpoints as make_checkpoint
from tests.support.checkpoints import END, IMAGE, STOP, TEMPLATE
from train_demo import postcards, questions

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE  # pixels along one side of a token
MIN_PIXELS, MAX_PIXELS = 24 * CELL**2, 40 * CELL**2
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
PICTURE = "<|vision_start|>{pads}<|vision_end|>"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer with Qwen2-VL's control tokens; its words are those of the questions."""
    rng = random.Random("tokenizer")
    corpus = [BEFORE, AFTER]
    for number in range(3000):
        scene = postcards.make_scene(f"tokenizer {number}")
        asked = questions.some_questions(scene, 8, rng, wordings="first")
        other = postcards.make_scene(f"tokenizer other {number}")
        asked.append(questions.ask_two(scene, other, rng, wordings="first"))
        corpus += [text for question in asked for text in (question.text, question.answer)]
    return make_checkpoint.make_tokenizer(corpus, vocab_size=900)


def make_config(tokenizer: Any) -> Any:
    """Four blocks of width 128 for the tower, four layers of width 192 for the language half."""
    return make_checkpoint.make_config(
        tokenizer,
        text={
            "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "initializer_range": 0.03,
            # a small base: the grid of a postcard spans ten positions, which a million would hardly tell apart
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [4, 6, 6]},
        },
        vision={"depth": 4, "embed_dim": 128, "num_heads": 4, "hidden_size": 192, "initializer_range": 0.03},
        tied=True,
    )  # fmt: skip


def make_model(tokenizer: Any) -> Any:
    """The model with random weights."""
    model = Qwen2VLForConditionalGeneration(make_config(tokenizer))
    stops = [tokenizer.convert_tokens_to_ids(STOP), tokenizer.convert_tokens_to_ids(END)]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.convert_tokens_to_ids(END))
    return model


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """The checkpoint as transformers writes it, in bfloat16, with its processor."""
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    half = make_model(tokenizer).to(torch.bfloat16)
    half.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})
    half.config.dtype = "bfloat16"
    half.save_pretrained(folder)


def grid_of(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tokens that the processor makes of a picture of this size."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    high, wide = smart_resize(height, width, factor=CELL, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return high // CELL, wide // CELL


def patches_of(images: torch.Tensor) -> torch.Tensor:
    """uint8 [pictures, height, width, 3] to float32 [pictures, patches, 3 · 14 · 14], normalised, in merge order."""
    mean, std = (
        torch.tensor(PROCESSOR_SETTINGS[name].default, device=images.device) for name in ("image_mean", "image_std")
    )
    count, height, width, _ = images.shape
    pixels = (images.float() / 255 - mean) / std
    shape = (count, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3)
    return pixels.view(shape).permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(count, -1, 3 * PATCH * PATCH)


def vision_forward(tower: Any, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[pictures, patches, 3 · 14 · 14] of one size to [pictures, tokens, hidden_size]; `grid` counts tokens."""
    from transformers.vision_utils import get_vision_position_ids

    count, length, _ = patches.shape
    weight = tower.patch_embed.proj.weight  # [width, 3, 2, 14, 14]
    x = patches @ weight.sum(2).flatten(1).T
    thw = torch.tensor([[1, grid[0] * MERGE, grid[1] * MERGE]], device=patches.device)
    positions = get_vision_position_ids(thw, MERGE)
    cos, sin = tower.rotary_pos_emb(x, positions)
    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(count, length, 3, attention.num_heads, -1)
        q, k = apply_rotary_pos_emb_vision(qkv[:, :, 0], qkv[:, :, 1], cos, sin)
        mixed = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)
        )
        x = x + attention.proj(mixed.transpose(1, 2).reshape(count, length, -1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x).view(count, grid[0] * grid[1], -1)


@dataclass
class Packed:
    """Conversations of several questions each about the same picture or pictures, one sequence a picture.

    A question sees the picture and itself, and stands where it would stand alone.
    """

    ids: torch.Tensor  # [sequences, length]
    segment: torch.Tensor  # [sequences, length]: 0 the picture's part, n the n-th question, -1 padding
    offset: torch.Tensor  # [sequences, length]: place within its segment
    weight: torch.Tensor  # [sequences, length]: of predicting the token at this place
    pictures: int  # a sequence
    grid: tuple[int, int]

    def to(self, device: torch.device) -> Packed:
        """On `device`."""
        ids, segment, offset, weight = (t.to(device) for t in (self.ids, self.segment, self.offset, self.weight))
        return Packed(ids, segment, offset, weight, self.pictures, self.grid)


class Packer:
    """Makes `Packed` of questions and answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids, kept."""
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def prefix(self, pictures: int, grid: tuple[int, int]) -> list[int]:
        """Everything up to the question."""
        return self.encode(BEFORE + PICTURE.format(pads=IMAGE * (grid[0] * grid[1])) * pictures)

    def pack(self, asked: list[list[questions.Question]], pictures: int, grid: tuple[int, int]) -> Packed:
        """One sequence for each list of questions."""
        start = self.prefix(pictures, grid)
        rows = []
        for several in asked:
            ids, segment, offset, weight = list(start), [0] * len(start), list(range(len(start))), [0.0] * len(start)
            for number, question in enumerate(several, 1):
                said = self.encode(question.text + AFTER)
                answer = self.encode(question.answer + STOP)
                ids += said + answer
                segment += [number] * (len(said) + len(answer))
                offset += list(range(len(said) + len(answer)))
                weight += [0.0] * len(said) + [len(answer) ** -0.5] * len(answer)
            rows.append((ids, segment, offset, weight))
        longest = max(len(ids) for ids, *_ in rows)
        fill = self.encode(END)[0]
        return Packed(
            torch.tensor([ids + [fill] * (longest - len(ids)) for ids, _, _, _ in rows]),
            torch.tensor([segment + [-1] * (longest - len(segment)) for _, segment, _, _ in rows]),
            torch.tensor([offset + [0] * (longest - len(offset)) for _, _, offset, _ in rows]),
            torch.tensor([weight + [0.0] * (longest - len(weight)) for _, _, _, weight in rows]),
            pictures,
            grid,
        )


def language_forward(model: Any, packed: Packed, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [answer tokens, vocabulary] and the places [answer tokens, 2] (sequence, place) they predict.

    `embeds` [sequences · pictures, tokens, hidden_size] are the pictures' in order.
    """
    core = model.model
    ids, segment = packed.ids, packed.segment
    count, length = ids.shape
    is_picture = ids == core.config.image_token_id
    x = core.language_model.embed_tokens(ids)
    x = x.masked_scatter(is_picture[..., None], embeds.to(x.dtype))

    prefix = int((segment[0] == 0).sum())
    thw = torch.tensor([[1, packed.grid[0] * MERGE, packed.grid[1] * MERGE]] * packed.pictures, device=ids.device)
    start, _ = core.get_rope_index(ids[:1, :prefix], is_picture[:1, :prefix].int(), image_grid_thw=thw)
    after = int(start.max()) + 1
    positions = (after + packed.offset).expand(3, count, length).clone()
    positions[:, :, :prefix] = start

    place = torch.arange(length, device=ids.device)
    causal = place[:, None] >= place[None, :]
    same = segment[:, :, None] == segment[:, None, :]
    mask = causal & (same | (segment == 0)[:, None, :])  # [sequences, length, length]
    hidden = core.language_model(
        inputs_embeds=x, position_ids=positions, attention_mask={"full_attention": mask[:, None]}, use_cache=False
    ).last_hidden_state
    places = packed.weight.nonzero()
    return model.lm_head(hidden[places[:, 0], places[:, 1] - 1]), places
