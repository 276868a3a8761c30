"""What a line that is typed means: a question, or a command that begins with a slash. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from qvsplit.errors import UsageError

SLASH = "/"


@dataclass(frozen=True)
class Command:
    """A command of the loop.

    Attributes:
        name: Its word, with the slash.
        meaning: In a few words.
        argument: What may stand behind it, for people.
        others: Other words for it.
        remembers: It means something only where questions follow each other in one conversation.
    """

    name: str
    meaning: str
    argument: str = ""
    others: tuple[str, ...] = ()
    remembers: bool = False

    @property
    def usage(self) -> str:
        """The word, and what may stand behind it."""
        return f"{self.name} {self.argument}".rstrip()


IMAGE, IMAGES, SYSTEM, NEW, HELP, EXIT = "/image", "/images", "/system", "/new", "/help", "/exit"
COMMANDS = (
    Command(IMAGE, "ask about these images: a name, a glob, or a file", "NAME"),
    Command(IMAGES, "list the images that can be asked about", "[NAME]"),
    Command(SYSTEM, "set the system message; - removes it, alone it is shown", "[TEXT]"),
    Command(NEW, "begin a new conversation, without the earlier answers", others=("/clear",), remembers=True),
    Command(HELP, "show this", others=("/?",)),
    Command(EXIT, "end; as Ctrl-D", others=("/quit",)),
)
KEYS = (
    ("Up, Down, Ctrl-R", "earlier lines, and search in them"),
    ("Tab", "complete a command, an image or a file"),
    ("Alt-Enter", "another line of the same question; Esc and then Enter is the same"),
    ("Ctrl-C", "end the answer; at the prompt, clear the line; twice, end"),
)


@dataclass(frozen=True)
class Line:
    """What was typed: a `command` with its text, or, where that is empty, a question. No text is no question."""

    command: str
    text: str


def commands(*, remembers: bool) -> tuple[Command, ...]:
    """Give the commands of a loop, which `remembers` earlier answers or not."""
    return tuple(one for one in COMMANDS if remembers or not one.remembers)


def meaning_of(typed: str, *, remembers: bool) -> Line:
    """Give what a line means.

    UsageError for a command that there is not, with the nearest name, and for text behind one that takes none.
    """
    text = typed.strip()
    if not text.startswith(SLASH):
        return Line("", text)
    if text.startswith(2 * SLASH):
        return Line("", text[1:])
    word, *rest = text.split(maxsplit=1)
    names = _names(remembers=remembers)
    if word not in names:
        close = get_close_matches(word, names, n=1)
        instead = f"did you mean {close[0]}?" if close else f"{HELP} lists them"
        raise UsageError(f"no such command {word}; {instead} (// begins a question with a slash)")
    command = names[word]
    if rest and not command.argument:
        raise UsageError(f"{word} takes nothing behind it; type what follows it as a line of its own")
    return Line(command.name, rest[0] if rest else "")


def _names(*, remembers: bool) -> Mapping[str, Command]:
    """Give the command of every word."""
    return {word: one for one in commands(remembers=remembers) for word in (one.name, *one.others)}


def help_lines(*, remembers: bool, is_edited: bool) -> list[str]:
    """Give the text of /help; of keys where lines `is_edited` by more than the terminal itself."""
    turns = (
        "A question follows those before it: the model is given the earlier questions and answers, too."
        if remembers
        else "Each question stands alone: the model is not given the earlier ones."
    )
    rows = [(", ".join((one.usage, *one.others)), one.meaning) for one in commands(remembers=remembers)]
    rows += [("//...", "a question that begins with one slash")]
    rows += KEYS if is_edited else KEYS[-1:]
    width = max(len(left) for left, _ in rows)
    return [turns, *(f"  {left:{width}}  {right}" for left, right in rows)]
