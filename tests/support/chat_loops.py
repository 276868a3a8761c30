"""A prompt loop over a store, whose engine answers at once with what it was asked: `python -m` this, on a terminal.

The question `slow` is answered without end, a word at a time.
"""

from __future__ import annotations

import json
import sys
import time

from qvsplit import cli
from qvsplit.answering.engine import Completion
from qvsplit.answering.options import AskOptions
from qvsplit.ask import Session
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.commands.chat_items import ChatItems
from qvsplit.commands.chat_loop import ChatLoop
from qvsplit.errors import QvsplitError
from qvsplit.output.printer import TEXT, PrintOptions
from qvsplit.runtime import interrupts, streams
from qvsplit.store.opening import open_store
from qvsplit.store.store import Store


class Echo:
    """Answers with the roles and texts of the conversation, and the beginning of its first item's hash."""

    def __init__(self, **errors: QvsplitError) -> None:
        """Have the questions that are the names of `errors` answered by these."""
        self.errors = {f"u:{question}": error for question, error in errors.items()}

    def answer(self, requests, *, on_text=None):
        for request in requests:
            said = [f"{one['role'][0]}:{_text(one['content'])}" for one in request.messages]
            if said[-1] == "u:slow":
                while True:
                    on_text(request.id, "word ")
                    time.sleep(0.01)
            if said[-1] in self.errors:
                yield Completion(request.id, error=self.errors[said[-1]], finish_reason="error")
                continue
            answer = f"{request.features[0].sha256[:6]} {json.dumps(said)}"
            if on_text is not None:
                on_text(request.id, answer)
            yield Completion(request.id, answer, (1, 2), 9, "stop")


def _text(content) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


class GivenLines:
    """Lines that are there from the beginning, as somebody types them or as a pipe has them."""

    are_edited, discarded = False, ""

    def __init__(self, *lines: str, are_typed: bool) -> None:
        self.are_typed = are_typed
        self._lines = list(lines)

    def read(self, prompt: str) -> str | None:
        return self._lines.pop(0) if self._lines else None


def session_of(store: Store, **errors: QvsplitError) -> Session:
    return Session(store, Echo(**errors), options=AskOptions(), checkpoint=open_checkpoint("demo", "language"))


def run(place: str) -> None:
    ChatLoop(ChatItems(session_of(open_store(place)), []), PrintOptions(TEXT), remembers=True).run()


def main(place: str) -> None:
    streams.prepare()
    interrupts.install()
    cli.end(cli._exit_code(lambda: run(place)))


if __name__ == "__main__":
    main(sys.argv[1])
