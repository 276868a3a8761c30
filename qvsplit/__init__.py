"""Encode every image once, answer any number of questions from the stored features: vision-language models, split.

    import qvsplit

    qvsplit.extract_files(["photos"], out="embeds")  # loads the vision encoder alone
    store = qvsplit.open_store("embeds")
    for row in store:  # the current images, sorted by path
        features = store.features(row)["pooler_output"]  # checked; NumPy by .numpy(), no torch needed
        print(row.path, row.grid_thw, qvsplit.as_tensor(features).shape)

    session = qvsplit.load_session(store)  # loads the language model alone
    row = next(iter(store))
    print(session.answer(row, "What is in the image?").text)
    for answer in session.answers(row, ["Is there a dog?", "Day or night?"]):  # one prefill for all of them
        print(answer.question, answer.text)
    scored = session.answer(row, qvsplit.Question("Is there a dog?", choices=["yes", "no"]))
    print(scored.text, scored.probabilities)

Names are looked up when they are used, so that importing qvsplit imports neither torch nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvsplit.answering.checks import Question, read_checks
    from qvsplit.ask import AskOptions, PromptItems, Selection, Session, load_session, select
    from qvsplit.errors import ItemError, QvsplitError
    from qvsplit.extract import extract_files
    from qvsplit.models.language import as_tensor
    from qvsplit.output.answer import Answer
    from qvsplit.output.report import write_report
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.pipeline.summary import ExtractCallbacks, Summary
    from qvsplit.store.config import ExtractionConfig, Provenance
    from qvsplit.store.features import Features, StoredTensor
    from qvsplit.store.row import Row
    from qvsplit.store.store import Store, open_store
    from qvsplit.verify import check_items, check_shards, describe
    from qvsplit.weights import save_language_model

_MODULES = {
    "Answer": "output.answer",
    "AskOptions": "ask",
    "ExtractCallbacks": "pipeline.summary",
    "ExtractOptions": "pipeline.options",
    "ExtractionConfig": "store.config",
    "Features": "store.features",
    "ItemError": "errors",
    "PromptItems": "ask",
    "Provenance": "store.config",
    "Question": "answering.checks",
    "QvsplitError": "errors",
    "Row": "store.row",
    "Selection": "ask",
    "Session": "ask",
    "Store": "store.store",
    "StoredTensor": "store.features",
    "Summary": "pipeline.summary",
    "as_tensor": "models.language",
    "check_items": "verify",
    "check_shards": "verify",
    "describe": "verify",
    "extract_files": "extract",
    "load_session": "ask",
    "open_store": "store.store",
    "read_checks": "answering.checks",
    "save_language_model": "weights",
    "select": "ask",
    "write_report": "output.report",
}

__all__ = [
    "Answer",
    "AskOptions",
    "ExtractCallbacks",
    "ExtractOptions",
    "ExtractionConfig",
    "Features",
    "ItemError",
    "PromptItems",
    "Provenance",
    "Question",
    "QvsplitError",
    "Row",
    "Selection",
    "Session",
    "Store",
    "StoredTensor",
    "Summary",
    "as_tensor",
    "check_items",
    "check_shards",
    "describe",
    "extract_files",
    "load_session",
    "open_store",
    "read_checks",
    "save_language_model",
    "select",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'qvsplit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qvsplit.{_MODULES[name]}"), name)
