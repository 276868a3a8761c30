"""What the tables of docs/models.md have in common: what is asked, and rows whose cells count what was identical."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

NEW_TOKENS = 10
QUESTIONS = (
    "What is in the picture?",
    "Is it day or night?",
    "How many people are there in the picture, and what do they do?",
    "Colour?",
    "图片里有什么？",
)
REFUSED = "refused"
SWITCHES = {"enable_thinking": False}  # of chat templates that have it
NAMES: dict[str, Any] = {"metadata": {"names": True}}  # of a column that counts nothing


@dataclass(frozen=True)
class MeasuredRow:
    """What came of one family. Each cell is `identical of cases`, says that it is refused, or names something."""

    family: str

    def __str__(self) -> str:
        """Give the row of the table."""
        return "| " + " | ".join(str(getattr(self, one.name)) for one in fields(self)) + " |"

    @property
    def is_identical(self) -> bool:
        """Whether every case of every counted column was identical, or is refused."""
        return all(_is_whole(getattr(self, one.name)) for one in fields(self) if not one.metadata.get("names"))


def _is_whole(cell: str) -> bool:
    counted = re.fullmatch(r"(\d+) of (\d+)", cell)
    return cell.startswith(REFUSED) or (counted is not None and counted[1] == counted[2] and counted[1] != "0")


def count(cases: Iterator[bool] | Sequence[bool]) -> str:
    """Say how many of some cases are identical."""
    found = list(cases)
    return f"{sum(found)} of {len(found)}"
