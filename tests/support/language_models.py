"""The language model of a tiny checkpoint of any family, beside the full model that it is held against.

Features and tokens of a prompt are the full model's and its processor's own: what is looked at is the language model.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qvsplit.checkpoints.families import FAMILIES as KNOWN
from qvsplit.kernels.layout import lay_out
from qvsplit.models.asking import PrefixedQuestion
from qvsplit.models.language import LanguageModel
from qvsplit.models.prompt import Placeholder, Prompt
from qvsplit.store.features import Features, StoredTensor
from tests.support.families import FAMILIES, make_checkpoint
from tests.support.families.reference import Reference


def noise(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class TinyLanguageModel:
    """One family's full model, and the language model with the very same weights."""

    def __init__(self, name: str, folder: Path, **text_settings: Any) -> None:
        make_checkpoint(name, folder)
        self.full = Reference(folder)
        for setting, value in text_settings.items():
            setattr(self.full.model.config.get_text_config(), setting, value)
        model = copy.deepcopy(self.full.model).requires_grad_(False)
        lay_out(model)  # as it is loaded on a CPU
        tokenizer = self.full.processor.tokenizer
        self.prompter = types.SimpleNamespace(
            folder=folder, tokenizer=tokenizer,
            decode=lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True),
        )  # fmt: skip
        self.prefix = KNOWN[FAMILIES[name].model_type].prefix
        self.language = LanguageModel(model, self.prompter, self.prefix)
        self._features = functools.cache(self._features_of)

    def prompt(self, images: Sequence[Image.Image], question: str) -> Prompt:
        """The processor's tokens, with a placeholder an image."""
        given = self.full.inputs(images, question)
        ids = given["input_ids"][0].tolist()
        config = self.full.model.config
        token = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        kinds = {
            name: given[name][0].tolist()
            for name in given
            if name != "attention_mask" and name.endswith("type_ids") and given[name].shape == given["input_ids"].shape
        }
        items = [int(one == token) for one in ids]
        grids = given["image_grid_thw"].tolist() if "image_grid_thw" in given else [None] * len(images)
        counts = [one.n_tokens for one in self.features(images)]
        placeholders = [
            Placeholder((), count, tuple(grid) if grid else None)
            for count, grid in zip(counts, grids, strict=True)
        ]  # fmt: skip
        return Prompt(ids, items, kinds, placeholders)

    def features(self, images: Sequence[Image.Image]) -> list[Features]:
        """The full model's features of each image, as a store would give them."""
        return [self._features(image.tobytes(), image.size) for image in images]

    def _features_of(self, pixels: bytes, size: tuple[int, int]) -> Features:
        return features_of(self.full.features(Image.frombytes("RGB", size, pixels)))

    def question(self, prefix: Any, prompt: Prompt, seed: int = 0) -> PrefixedQuestion:
        """The question of `prompt` behind its prefix."""
        kinds = {name: values[len(prefix) :] for name, values in prompt.token_types.items()}
        return PrefixedQuestion(prefix, prompt.input_ids[len(prefix) :], seed, kinds)

    def asked(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[PrefixedQuestion]:
        """Questions behind one prefix of these images."""
        prompts = [self.prompt(images, question) for question in questions]
        prefix = self.language.prefill(prompts[0], self.features(images))
        return [self.question(prefix, prompt) for prompt in prompts]


def features_of(output: Any) -> Features:
    """Features in the form in which they are stored."""
    fields = {"pooler_output": output.pooler_output}
    for level, value in enumerate(getattr(output, "deepstack_features", None) or ()):
        fields[f"deepstack_features_{level}"] = value
    tensors, shapes, containers = {}, {}, {}
    for name, value in fields.items():
        whole = torch.is_tensor(value)
        containers[name] = "tensor" if whole else "tuple" if isinstance(value, tuple) else "list"
        rows = value if whole else torch.cat([one.reshape(-1, one.shape[-1]) for one in value])
        if rows.ndim != 2:
            shapes[name] = tuple(rows.shape)
        flat = rows.reshape(-1, rows.shape[-1]).contiguous()
        tensors[name] = StoredTensor(flat.numpy().view(np.uint8).reshape(len(flat), -1), "float32")
    return Features(None, tensors, None, (), shapes=shapes, containers=containers)  # type: ignore[arg-type]
