"""See every picture once, ask any number of questions of what was seen: Qwen2-VL's two halves, apart.

    import qvsplit

    qvsplit.extract_pictures(["photos"], out="embeds")  # loads the tower alone
    album = qvsplit.open_album("embeds")
    for row in album:  # the current pictures, sorted by path
        stored = album.embeds(row)  # checked; NumPy by .numpy(), no torch needed
        print(row.path, stored.grid_thw, qvsplit.as_tensor(stored).shape)

    asker = qvsplit.open_asker(album)  # loads the language half alone
    row = next(iter(album))
    print(asker.answer(row, "What is in the picture?").text)
    for answer in asker.answers(row, ["Is there a dog?", "Day or night?"]):  # one prefill for all of them
        print(answer.question, answer.text)
    likely = asker.answer(row, qvsplit.Question("Is there a dog?", answers={"yes": ("yes",), "no": ("no",)}))
    print(likely.text, likely.probabilities)

Names are looked up when they are used, so that importing qvsplit imports neither torch nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvsplit.album import Album, open_album
    from qvsplit.ask import Answer, Asker, Shown, open_asker, select
    from qvsplit.ask import Settings as AskSettings
    from qvsplit.checks import Question, read_checks
    from qvsplit.errors import PictureError, QvsplitError
    from qvsplit.extract import Settings as ExtractSettings
    from qvsplit.extract import Summary, Watcher, extract_pictures
    from qvsplit.language import as_tensor
    from qvsplit.recipe import Recipe
    from qvsplit.report import write_report
    from qvsplit.store import Embeds, Row
    from qvsplit.verify import check_pictures, check_shards, describe
    from qvsplit.weights import save_language_half

_HOMES = {
    "Album": ("album", "Album"),
    "Answer": ("ask", "Answer"),
    "AskSettings": ("ask", "Settings"),
    "Asker": ("ask", "Asker"),
    "Embeds": ("store", "Embeds"),
    "ExtractSettings": ("extract", "Settings"),
    "PictureError": ("errors", "PictureError"),
    "Question": ("checks", "Question"),
    "QvsplitError": ("errors", "QvsplitError"),
    "Recipe": ("recipe", "Recipe"),
    "Row": ("store", "Row"),
    "Shown": ("ask", "Shown"),
    "Summary": ("extract", "Summary"),
    "Watcher": ("extract", "Watcher"),
    "as_tensor": ("language", "as_tensor"),
    "check_pictures": ("verify", "check_pictures"),
    "check_shards": ("verify", "check_shards"),
    "describe": ("verify", "describe"),
    "extract_pictures": ("extract", "extract_pictures"),
    "open_album": ("album", "open_album"),
    "open_asker": ("ask", "open_asker"),
    "read_checks": ("checks", "read_checks"),
    "save_language_half": ("weights", "save_language_half"),
    "select": ("ask", "select"),
    "write_report": ("report", "write_report"),
}

__all__ = [
    "Album",
    "Answer",
    "AskSettings",
    "Asker",
    "Embeds",
    "ExtractSettings",
    "PictureError",
    "Question",
    "QvsplitError",
    "Recipe",
    "Row",
    "Shown",
    "Summary",
    "Watcher",
    "as_tensor",
    "check_pictures",
    "check_shards",
    "describe",
    "extract_pictures",
    "open_album",
    "open_asker",
    "read_checks",
    "save_language_half",
    "select",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qvsplit' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"qvsplit.{module}"), attribute)
