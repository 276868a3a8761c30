"""What a tiny checkpoint of any family is made of, and how it gets onto the disk.

Real classes, real processors and the hub's names of tensors; only the sizes and the numbers are made up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from tests.support.checkpoints import CORPUS, save_tensors


def make_tokenizer(family: TinyFamily) -> Any:
    """A byte-level BPE tokenizer trained on a few sentences, with the family's tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        (CORPUS,), trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    )
    return with_family_tokens(bpe, family)


def with_family_tokens(bpe: Tokenizer, family: TinyFamily, **more: Any) -> Any:
    """The tokenizer with the family's tokens, template and, where the family has it so, a BOS in front of every text."""
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.control_tokens])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain_tokens])
    if family.adds_bos:
        assert family.bos is not None
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A $B",
            special_tokens=[(family.bos, bpe.token_to_id(family.bos))],
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=family.bos, eos_token=family.eos[0], pad_token=family.pad,
        extra_special_tokens=dict(family.named_tokens), chat_template=family.template, **more,
    )  # fmt: skip


@dataclass(frozen=True)
class TinyFamily:
    """One model family at its smallest.

    `model_class` holds encoder and language model: a name in `transformers`, or "module:Class". `control_tokens` are
    the added tokens that the tokenizer calls special, `plain_tokens` those that it does not (`<think>`), `named_tokens`
    those that the family's processor reads off the tokenizer (`image_token`). The first of `eos` is the tokenizer's.
    With `adds_bos` the tokenizer itself begins every text with `bos`. `scales` widens or narrows the random numbers of
    all tensors whose name contains a key. `section` is for checkpoints with more in them than `model_class`: the part
    of the config that it takes and, with a dot, the prefix of its tensors; `architecture` then is config.json's.
    `to_hub` changes what `save_pretrained` writes where the hub's checkpoints are otherwise, `other_tensors` are the
    hub's tensors that `model_class` does not load.
    """

    model_type: str
    model_class: str
    config: Callable[[Any], Any]
    processor: Callable[[Any], Any]
    template: str
    control_tokens: tuple[str, ...]
    eos: tuple[str, ...]
    pad: str
    bos: str | None = None
    adds_bos: bool = False
    plain_tokens: tuple[str, ...] = ()
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Callable[[TinyFamily], Any] = make_tokenizer
    scales: Mapping[str, float] = field(default_factory=dict)
    section: str | None = None
    architecture: str | None = None
    to_hub: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
    other_tensors: Callable[[], dict[str, torch.Tensor]] = dict
    notes: str = ""

    def cls(self) -> Any:
        """The class that holds encoder and language model."""
        module, _, name = self.model_class.rpartition(":")
        return getattr(importlib.import_module(module) if module else transformers, name)


def make_checkpoint(
    family: TinyFamily | str, folder: Path, *, seed: int = 0, dtype: str = "float32", files: int = 1
) -> None:
    """A complete tiny checkpoint in `folder`. `files` 1 writes model.safetensors, more also an index."""
    if isinstance(family, str):
        from tests.support.families import ALL

        family = ALL[family]
    logging.disable_progress_bar()
    tokenizer = family.tokenizer(family)
    config = family.config(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.cls()(getattr(config, f"{family.section}_config") if family.section else config)
        widen(model, family.scales, seed)
    model.to(getattr(torch, dtype))
    model.generation_config = generation_config(family, tokenizer)
    model.save_pretrained(folder)
    if family.section:
        config.architectures, config.dtype = [family.architecture], dtype
        config.save_pretrained(folder)
    prefix = f"{family.section}." if family.section else ""
    tensors = family.to_hub(load_file(folder / "model.safetensors"))
    others = {name: tensor.to(getattr(torch, dtype)) for name, tensor in family.other_tensors().items()}
    save_tensors(folder, {prefix + name: tensor for name, tensor in tensors.items()} | others, files)
    processor = family.processor(tokenizer)
    processor.chat_template = family.template
    processor.save_pretrained(folder)


def widen(model: Any, scales: Mapping[str, float], seed: int) -> None:
    """Draw weights of a size that lets attention and pixels matter; an answer then depends on image and question."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            fan = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
            parameter.data = noise * (1.0 if "embed" in name else 1.5 / fan**0.5)
        elif "A_log" in name:  # a slow decay: what transformers draws forgets all within a token or two
            parameter.data = torch.log(torch.rand(parameter.shape, generator=generator) * 0.1 + 0.01)
        elif "dt_bias" not in name:
            parameter.data = parameter.data + 0.1 * noise
        for part, scale in scales.items():
            if part in name:
                parameter.data = parameter.data * scale


def generation_config(family: TinyFamily, tokenizer: Any) -> Any:
    """Sampling by default, as many of the hub's checkpoints have it, but hot: what samples by mistake differs."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.convert_tokens_to_ids(list(family.eos)),
        pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=2.0, top_k=50, top_p=1.0,
    )  # fmt: skip
