"""Encode images and videos once, answer any number of questions from the features: vision-language models, split.

    import qvsplit

    qvsplit.extract_files("photos", out="embeds")  # loads the vision encoder alone
    store = qvsplit.open_store("embeds")
    features = store.features("coffee.png")["pooler_output"]  # NumPy [n_tokens, width]; all by .torch()
    print([row.path for row in store], features.shape)

    session = qvsplit.load_session(store)  # loads the language model alone
    print(session.answer("coffee.png", "What is in the image?").text)
    for answer in session.answers("coffee.png", ["Is there a dog?", "Day or night?"]):  # one prefill for all
        print(answer.question, answer.text)
    scored = session.answer("coffee.png", qvsplit.Question("Is there a dog?", choices=["yes", "no"]))
    print(scored.text, scored.probabilities)

    with qvsplit.load_encoder(session.model) as encoder:  # without a store
        features = encoder.encode(["photos/coffee.png"])  # paths, bytes, PIL images, arrays
        clips = encoder.encode_video("clip.mp4")  # the whole, or one for each clip of so many seconds
    lm = qvsplit.load_language_model(session.model)
    print(lm.answer(features, "What is in the image?").text)

What is here:

    extract_files, ExtractOptions, ExtractCallbacks, Progress, Summary     images and videos into a store
    open_store, Store, Row, Features                                       what is in a store
    load_session, Session, AskOptions, Question, read_checks, Answer       questions about a store
    load_encoder, VisionEncoder, VideoOptions, Sampling                     images and videos to features alone
    load_language_model, FeatureSession                                    questions about features, without a store
    gate, Judgement, GateCallbacks                                         checks of files, and whether they may pass
    check_shards, check_items, describe                                    whether a store is sound; what is in it
    write_report                                                           a page of answers
    describe_model, split_checkpoint                                       what a model takes; its halves as models
    QvsplitError, ItemError                                                every error: the call's, or one item's

Names are looked up when they are used, so that importing qvsplit imports neither torch nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvsplit.answering.checks import Question, read_checks
    from qvsplit.answering.options import AskOptions
    from qvsplit.ask import FeatureSession, Session, load_language_model, load_session
    from qvsplit.encode import VisionEncoder, load_encoder
    from qvsplit.errors import ItemError, QvsplitError
    from qvsplit.extract import extract_files
    from qvsplit.inspecting import describe_model
    from qvsplit.judging import GateCallbacks, Judgement, gate
    from qvsplit.models.sampling import Sampling, VideoOptions
    from qvsplit.output.answer import Answer
    from qvsplit.output.report import write_report
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.pipeline.summary import ExtractCallbacks, Progress, Summary
    from qvsplit.splitting import split_checkpoint
    from qvsplit.store.features import Features
    from qvsplit.store.opening import open_store
    from qvsplit.store.row import Row
    from qvsplit.store.store import Store
    from qvsplit.verify import check_items, check_shards, describe

_MODULES = {
    "Answer": "output.answer",
    "AskOptions": "answering.options",
    "ExtractCallbacks": "pipeline.summary",
    "ExtractOptions": "pipeline.options",
    "FeatureSession": "ask",
    "Features": "store.features",
    "GateCallbacks": "judging",
    "ItemError": "errors",
    "Judgement": "judging",
    "Progress": "pipeline.summary",
    "Question": "answering.checks",
    "QvsplitError": "errors",
    "Row": "store.row",
    "Sampling": "models.sampling",
    "Session": "ask",
    "Store": "store.store",
    "Summary": "pipeline.summary",
    "VideoOptions": "models.sampling",
    "VisionEncoder": "encode",
    "check_items": "verify",
    "check_shards": "verify",
    "describe": "verify",
    "describe_model": "inspecting",
    "extract_files": "extract",
    "gate": "judging",
    "load_encoder": "encode",
    "load_language_model": "ask",
    "load_session": "ask",
    "open_store": "store.opening",
    "read_checks": "answering.checks",
    "split_checkpoint": "splitting",
    "write_report": "output.report",
}

__all__ = [
    "Answer",
    "AskOptions",
    "ExtractCallbacks",
    "ExtractOptions",
    "FeatureSession",
    "Features",
    "GateCallbacks",
    "ItemError",
    "Judgement",
    "Progress",
    "Question",
    "QvsplitError",
    "Row",
    "Sampling",
    "Session",
    "Store",
    "Summary",
    "VideoOptions",
    "VisionEncoder",
    "check_items",
    "check_shards",
    "describe",
    "describe_model",
    "extract_files",
    "gate",
    "load_encoder",
    "load_language_model",
    "load_session",
    "open_store",
    "read_checks",
    "split_checkpoint",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'qvsplit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qvsplit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
