"""Lines edited on a terminal by prompt_toolkit: with a history and with completion.

Imported where a terminal is there that can show it. What a signal means stays runtime/interrupts.py's: it ends the
event loop, and is raised behind it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from prompt_toolkit.application.run_in_terminal import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import PromptSession

from qvsplit.commands.chat_words import IMAGE, IMAGES, SLASH, Command, commands
from qvsplit.commands.line_history import KeptHistory, history_file
from qvsplit.runtime import interrupts

Names = Callable[[str, bool], Sequence[str]]  # what may complete a name, and whether that may be a file's on disk


class EditedLines:
    """Lines with history, editing and completion. See `Lines`."""

    are_typed, are_edited = True, True

    def __init__(self, names: Names, *, remembers: bool) -> None:
        self.discarded = ""
        self._session: PromptSession[str] = PromptSession(
            completer=_Completer(commands(remembers=remembers), names),
            complete_while_typing=Condition(self._is_command),
            history=KeptHistory(history_file()),
            search_ignore_case=True,
            enable_suspend=True,
            key_bindings=_keys(),
            prompt_continuation=lambda width, number, wrapped: "" if wrapped else "... ",
            input=Vt100Input(_keyboard()),
            output=_output(),
        )

    def read(self, prompt: str) -> str | None:
        """Give the next line; None for Ctrl-D. Raises what a signal means, and KeyboardInterrupt for Ctrl-C."""
        shown = prompt.encode(sys.stderr.encoding, "backslashreplace").decode(sys.stderr.encoding)
        try:
            with interrupts.passed_to(self._wake), self._shown_again():
                line: str | None = self._session.prompt(
                    [("bold", shown)], handle_sigint=False, pre_run=self._end_if_interrupted
                )
        except EOFError:
            line = None
        except KeyboardInterrupt:
            self.discarded = self._session.default_buffer.text
            raise
        self.discarded = ""
        interrupts.check()
        return line

    def _is_command(self) -> bool:
        """Say whether a word is being typed that can be seen to be a command."""
        text = self._session.default_buffer.document.text_before_cursor
        return text.startswith(SLASH) and " " not in text and "\n" not in text

    # ------------------------------------------------------------------------------------------------------ signals

    def _wake(self) -> None:
        """Have the event loop look at what arrived. Called by a handler of signals, between any two steps of Python."""
        loop = self._session.app.loop
        if loop is not None:
            with suppress(RuntimeError):  # it has been closed: `read` is about to look itself
                loop.call_soon_threadsafe(self._end_if_interrupted)

    def _end_if_interrupted(self) -> None:
        app = self._session.app
        if interrupts.arrived() and app.future is not None and not app.future.done():
            app.exit(exception=EOFError)

    @contextmanager
    def _shown_again(self) -> Iterator[None]:
        """Show the prompt again once the process has been stopped and goes on, also by another than Ctrl-Z."""

        def show(*_: object) -> None:
            loop = self._session.app.loop
            if loop is not None:
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(_redraw)

        def _redraw() -> None:
            if self._session.app.is_running:
                self._session.app.create_background_task(_nothing())

        async def _nothing() -> None:
            await run_in_terminal(lambda: None)  # which takes the terminal's settings back, and draws the prompt

        before = signal.signal(signal.SIGCONT, show)
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)


# ------------------------------------------------------------------------------------------------------ completion


class _Completer(Completer):
    """Completes commands, with what they mean, and behind /image and /images names."""

    def __init__(self, known: Sequence[Command], names: Names) -> None:
        self._known = known
        self._names = names

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith(SLASH) or "\n" in text:
            return
        word, blank, name = text.partition(" ")
        if not blank:
            for one in self._known:
                if one.name.startswith(word):
                    typed = f"{one.name} " if one.argument else one.name
                    yield Completion(typed, -len(word), display=one.name, display_meta=one.meaning)
        elif word in (IMAGE, IMAGES):
            for found in self._names(name.lstrip(), word == IMAGE):
                yield Completion(found, -len(name.lstrip()))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _next_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


# ---------------------------------------------------------------------------------------------------------- output


class _Colourless(Vt100_Output):
    """Moves the cursor, and has no colours: of escape codes NO_COLOR refuses those."""

    def set_attributes(self, attrs: Any, color_depth: Any) -> None:
        """Write nothing."""

    def reset_attributes(self) -> None:
        """Write nothing."""


def _keyboard() -> TextIO:
    """Give stdin in the encoding of the file system, in which Python has the words of the command line, too."""
    return open(0, encoding=sys.getfilesystemencoding(), closefd=False)


def _output() -> Vt100_Output:
    """Give the output on stderr. It does not ask the terminal where the cursor is: answers to that may come late."""
    kind = _Colourless if os.environ.get("NO_COLOR") else Vt100_Output
    output = kind.from_pty(sys.stderr, term=os.environ.get("TERM"), enable_bell=False)
    output.enable_cpr = False
    return output
