"""A family's language model and prompts beside its full model, for images and clips.

Features are what the full model's own `get_image_features` and `get_video_features` give; placeholders, grids and small
inputs are what its processor gives for an item that is alone in a prompt, as a store would have them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qvsplit.answering.local_engine import LocalEngine
from qvsplit.answering.options import AskOptions
from qvsplit.ask import Session, StoreReader
from qvsplit.checkpoints import hf
from qvsplit.checkpoints.model_class import encoders_alone
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.models import language
from qvsplit.models.asking import PrefixedQuestion
from qvsplit.models.decoding import Decoding
from qvsplit.models.language import LanguageModel
from qvsplit.models.processor_proof import SampledClip, process
from qvsplit.models.prompt import Placeholder, Prompter
from qvsplit.store.features import Features
from qvsplit.store.row import placeholder_json
from tests.support.fake_engine import CONFIG, MemoryStore, row
from tests.support.families.reference import Clip, Item, Reference
from tests.support.language_models import features_of

NEW_TOKENS = 8
NO_THINKING = {"enable_thinking": False}
LEFT_OUT = {"video_compression_mask"}  # of features that are those it keeps


def kind_of(item: Item) -> str:
    return "video" if isinstance(item, Clip) else "image"


class Split:
    """One family: the full model, and what answers without its encoder."""

    def __init__(self, folder: Path, reference: Reference) -> None:
        self.reference = reference
        self.checkpoint = open_checkpoint(folder, "both")
        self.prompter = Prompter(self.checkpoint)
        self._placeholders: dict[int, tuple[Item, Placeholder]] = {}
        self._features: dict[int, Features] = {}

    @functools.cached_property
    def language(self) -> LanguageModel:
        return language.load(self.checkpoint, device=torch.device("cpu"), dtype=torch.float32)

    def placeholder(self, item: Item) -> Placeholder:
        """What a row holds of an item."""
        if id(item) not in self._placeholders:
            self._placeholders[id(item)] = item, self._made(item)
        return self._placeholders[id(item)][1]

    def _made(self, item: Item) -> Placeholder:
        kind, processor = kind_of(item), self.prompter.processor
        if isinstance(item, Clip):
            given, text = process(processor, SampledClip(item.frames, item.metadata), where=self.checkpoint.folder)
        else:
            given, text = hf.process_image(processor, item)
        grid = given.get(f"{kind}_grid_thw")
        whole = self.prompter.placeholder_of(text, kind)
        return dataclasses.replace(
            whole, grid_thw=tuple(grid[0].tolist()) if grid is not None else None, inputs=self._inputs(given, kind)
        )

    def _inputs(self, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
        inputs, taken = {}, self.prompter.model_takes & given.keys() - {f"{kind}_grid_thw"}
        if kind == "video":  # what only the encoder reads would fill a row
            taken -= encoders_alone(type(self.reference.model))
        for name in sorted(taken - LEFT_OUT):
            if "pixel" not in name:
                value = torch.as_tensor(given[name])
                dtype = str(value.dtype).removeprefix("torch.")
                inputs[name] = {"dtype": dtype, "shape": list(value.shape), "values": value.flatten().tolist()}
        return inputs

    def features(self, item: Item) -> Features:
        """The full model's own."""
        self.placeholder(item)  # keeps the item, whose id this is
        if id(item) not in self._features:
            features = features_of(self.reference.features(item))
            if (
                isinstance(item, Clip)
                and (kept := self.reference.inputs([item], "").get("video_compression_mask")) is not None
            ):
                features = self._kept(features, kept)
            self._features[id(item)] = features
        return self._features[id(item)]

    def _kept(self, features: Features, kept: torch.Tensor) -> Features:
        """Those rows that the full model keeps of a clip, of which frames are alike."""
        tensors = {
            name: dataclasses.replace(tensor, raw=tensor.raw[kept.numpy()]) for name, tensor in features.tensors.items()
        }
        return dataclasses.replace(features, tensors=tensors)

    def asked(
        self, items: Sequence[Item], questions: Sequence[str], model: LanguageModel | None = None
    ) -> list[PrefixedQuestion]:
        """Questions behind one prefix of these items, whose tokens and types are the processor's own."""
        model = model or self.language
        prompts = [self.prompter.ask(question, [*map(self.placeholder, items)]) for question in questions]
        for question, prompt in zip(questions, prompts, strict=True):
            theirs = self.reference.inputs(items, question, **NO_THINKING)
            assert prompt.input_ids == theirs["input_ids"][0].tolist()
            types = {name: theirs[name][0].tolist() for name in theirs if name.endswith("token_type_ids")}
            assert prompt.token_types == types
        prefix = model.prefill(prompts[0], [*map(self.features, items)])
        return [PrefixedQuestion.of(prompt, prefix) for prompt in prompts]

    def answers(
        self, items: Sequence[Item], questions: Sequence[str], model: LanguageModel | None = None
    ) -> list[list[int]]:
        """The tokens of greedy answers, all questions in one batch."""
        asked = self.asked(items, questions, model)
        return [one.tokens for one in (model or self.language).generate(asked, Decoding(max_new_tokens=NEW_TOKENS))]

    def expected(self, items: Sequence[Item], question: str) -> list[int]:
        """The full model's."""
        return self.reference.answer(items, question, new_tokens=NEW_TOKENS, **NO_THINKING)

    # ------------------------------------------------------------------------------------------------------- a store

    def session(self, items: Mapping[str, Item], **options: Any) -> Session:
        """A session over a store that has these items, by name."""
        rows, features = [], {}
        for name, item in items.items():
            one = self.placeholder(item)
            rows.append(
                row(
                    name, kind=one.kind, grid_thw=one.grid_thw, n_tokens=one.n_tokens,
                    placeholder=placeholder_json(one.runs), inputs=json.dumps(one.inputs),
                    sha256=hashlib.sha256(name.encode()).hexdigest(),
                )
            )  # fmt: skip
            features[rows[-1].content] = dataclasses.replace(self.features(item), config=CONFIG)
        store = MemoryStore(rows, features)
        told = AskOptions(max_new_tokens=NEW_TOKENS, **options)
        engine = LocalEngine(lambda: self.language, StoreReader(store))
        return Session(store, engine, options=told, encoder_check="fingerprint", checkpoint=self.checkpoint)
