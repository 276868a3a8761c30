"""Fakes of answering's doors: an engine of a few lines, and a store in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from qvsplit import ask
from qvsplit.answering.engine import Completion, Request
from qvsplit.answering.loading import load
from qvsplit.answering.local_engine import EngineLimits, LocalEngine
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import QvsplitError, StoreDamaged, UsageError
from qvsplit.runtime.dtypes import DTYPE_BYTES
from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.features import Features, StoredTensor
from qvsplit.store.row import Row, placeholder_json

CONFIG = ExtractionConfig(
    family="qwen2_vl", encoder="e" * 64, compute_dtype="float32", storage_dtype="float32", images={}, kernels="fused",
    processor={"merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520},
)  # fmt: skip


class FakeEngine:
    """Answers by a rule: a text, reasoning and text, a mapping of spellings to probabilities, or an error.

    The last request is answered first.
    """

    def __init__(
        self,
        rule: Callable[[Request], str | tuple[str, str] | Mapping[str, float] | QvsplitError] = lambda request: "yes",
    ):
        self.rule = rule
        self.requests: list[Request] = []  # all of them, in order
        self.calls: list[int] = []  # how many requests each call had
        self.cancelled = False

    def answer(self, requests, *, on_text=None):
        taken = list(requests)
        self.requests += taken
        self.calls.append(len(taken))
        for request in reversed(taken):
            if self.cancelled:
                return
            yield self._completion(request, self.rule(request), on_text)

    def cancel(self):
        self.cancelled = True

    def _completion(self, request, answer, on_text):
        if isinstance(answer, QvsplitError):
            return Completion(request.id, finish_reason="error", error=answer)
        if isinstance(answer, Mapping):
            forms = [form for form in request.forms if form in answer]
            logprobs = {text: math.log(answer[text]) for text in (*request.choices, *forms)}
            return Completion(request.id, finish_reason="scored", prompt_tokens=9, logprobs=logprobs)
        reasoning, answer = answer if isinstance(answer, tuple) else ("", answer)
        if on_text is not None:
            on_text(request.id, answer)
        return Completion(request.id, answer, (1, 2), 9, "stop" if answer else "length", reasoning=reasoning)


def question_of(request: Request) -> str:
    """The question of a request."""
    return request.messages[-1]["content"][-1]["text"]


def row(path: str = "a.jpg", **more) -> Row:
    """A sound row of one image of four tokens; its content is its path's."""
    sound = {
        "root": "/photos", "sha256": hashlib.sha256(path.encode()).hexdigest(), "size": 1, "status": "ok",
        "grid_thw": (1, 4, 4), "n_tokens": 4, "placeholder": placeholder_json([("<|image_pad|>", 4)]),
        "has_features": True,
    }  # fmt: skip
    return Row(path=path, **sound | more)


class MemoryStore:
    """Rows, and the features of some of them by content."""

    name = "memory"
    provenance = Provenance("tiny", None, "cpu", {})
    device_types = provenance.device_types

    def __init__(self, rows: Sequence[Row], features: Mapping[tuple[str, int], Features] | None = None):
        self.config = CONFIG
        self.rows = list(rows)
        self._features = dict(features or {})
        self.damaged: set[str] = set()  # paths

    def __getitem__(self, name):
        return {one.path: one for one in self.rows}[name]

    def current(self, root, path):
        return next((one for one in self.rows if one.key == (root, path)), None)

    def matching(self, pattern):
        return [one for one in self.rows if fnmatchcase(one.path, pattern)]

    def rows_with_status(self, status):
        return (one for one in self.rows if one.status == status)

    def home(self, content):
        return next((one for one in self.rows if one.has_features and one.content == content), None)

    def features(self, row):
        if row.status != "ok":
            raise UsageError(f"{row.path} has no features: it is {row.status} ({row.error})")
        if row.path in self.damaged or self.home(row.content) is None:
            raise StoreDamaged(f"the features of {row.path} are damaged")
        return self._features[row.content]

    def __iter__(self):
        return (one for one in self.rows if one.status == "ok")

    def __len__(self):
        return sum(one.status == "ok" for one in self.rows)


def store_of(whole, images: Mapping[str, object]) -> MemoryStore:
    """A store of the features that the full model's own encoder gives for these images, by name."""
    rows, features = [], {}
    for name, image in images.items():
        grid = tuple(whole.processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist())
        (tensor,) = whole.features([image])
        runs = (("<|image_pad|>", len(tensor)),)
        rows.append(row(name, grid_thw=grid, n_tokens=len(tensor), placeholder=placeholder_json(runs)))
        dtype = str(tensor.dtype).removeprefix("torch.")
        raw = tensor.contiguous().view(dtype=_uint8()).reshape(len(tensor), -1).numpy()
        assert raw.shape[1] == tensor.shape[1] * DTYPE_BYTES[dtype]
        features[rows[-1].content] = Features(CONFIG, {"pooler_output": StoredTensor(raw, dtype)}, grid, runs)
    return MemoryStore(rows, features)


def _uint8():
    import torch

    return torch.uint8


def session_of(store: MemoryStore, checkpoint: Path, **options) -> ask.Session:
    """A session that answers with the checkpoint's language model; nothing checks whose encoder's features they are."""
    told = ask.AskOptions(**options)
    opened = open_checkpoint(checkpoint, "language")
    limits = EngineLimits(told.token_budget, told.prefix_cache_tokens)
    engine = LocalEngine(lambda: load(opened, told), ask.StoreReader(store), limits)
    return ask.Session(store, engine, options=told, encoder_check="fingerprint", checkpoint=opened)
