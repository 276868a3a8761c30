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
from qvsplit.output.printer import TEXT, PrintOptions
from qvsplit.runtime import interrupts, streams
from qvsplit.store.opening import open_store


class Echo:
    """Answers with the roles and texts of the conversation, and the beginning of its first item's hash."""

    def answer(self, requests, *, on_text=None):
        for request in requests:
            said = [f"{one['role'][0]}:{_text(one['content'])}" for one in request.messages]
            if said[-1] == "u:slow":
                while True:
                    on_text(request.id, "word ")
                    time.sleep(0.01)
            answer = f"{request.features[0].sha256[:6]} {json.dumps(said)}"
            if on_text is not None:
                on_text(request.id, answer)
            yield Completion(request.id, answer, (1, 2), 9, "stop")


def _text(content) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def run(place: str) -> None:
    store = open_store(place)
    session = Session(store, Echo(), options=AskOptions(), checkpoint=open_checkpoint("demo", "language"))
    ChatLoop(ChatItems(session, []), PrintOptions(TEXT), remembers=True).run()


if __name__ == "__main__":
    streams.prepare()
    interrupts.install()
    cli.end(cli._exit_code(lambda: run(sys.argv[1])))
