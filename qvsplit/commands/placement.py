"""How the images and videos that are selected stand in prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvsplit.errors import UsageError

if TYPE_CHECKING:
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.selection import Selection
    from qvsplit.ask import PromptItems
    from qvsplit.store.row import Row


@dataclass(frozen=True)
class Placement:
    """One in each prompt; or all `together` in one; or each behind the same `reference`, the name of an item."""

    together: bool = False
    reference: str | None = None

    def names(self, names: Sequence[str]) -> list[str]:
        """Give the names of all that prompts about `names` need: those, and the reference."""
        return [*names, *([] if self.reference is None else [self.reference])]

    def row(self, found: Collection) -> Row | None:
        """Give the reference, if there is one. UsageError where its name is not that of one sound item."""
        from qvsplit.answering.selection import select

        return None if self.reference is None else select(found, [self.reference], only=1).rows[0]

    def prompts(self, selection: Selection, reference: Row | None) -> list[PromptItems]:
        """Give the items of each prompt; none where all have failed. UsageError for the reference alone."""
        from qvsplit.ask import PromptItems

        rows = selection.rows
        if self.together:
            return [PromptItems(tuple(rows))] if rows else []
        if reference is None:
            return [PromptItems((row,)) for row in rows]
        items = [PromptItems((reference, row), shared=1) for row in rows if row != reference]
        if not items and not selection.failed:
            raise UsageError(f"--compare {self.reference}: there is no other item to compare it with")
        return items


ONE_EACH = Placement()


def require_items(items: Sequence[PromptItems]) -> None:
    """UsageError where nothing is left to ask about."""
    if not items:
        raise UsageError("none of the selected images and videos can be asked about; all of them have failed")
