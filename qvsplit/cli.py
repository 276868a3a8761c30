"""The Typer app: registers the commands, and turns an error into one line on stderr and an exit code.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command needs it: `--help` and a
run with nothing to do import neither torch nor pyarrow.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from qvsplit.commands import (
    answers,
    ask,
    chat,
    compact,
    demo,
    doctor,
    extract,
    find,
    gate,
    inspect,
    purge,
    split,
    verify,
)
from qvsplit.commands.help import SETTINGS, Command, Group, help_and_examples, mistake, with_help_all
from qvsplit.commands.wording import on_command_line
from qvsplit.errors import BUG, INTERRUPTED, TERMINATED, DiskError, QvsplitError, QvsplitWarning, UsageError
from qvsplit.output.text import say
from qvsplit.runtime import cpus, interrupts, streams

COMMANDS: dict[str, Callable[..., None]] = {
    "extract": extract.extract,
    "ask": ask.ask,
    "chat": chat.chat,
    "answers": answers.answers,
    "find": find.find,
    "gate": gate.gate,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "compact": compact.compact,
    "purge": purge.purge,
    "split": split.split,
    "demo": demo.demo,
    "doctor": doctor.doctor,
}

app = typer.Typer(
    cls=Group,
    context_settings=SETTINGS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="\nExamples:\n  qvsplit demo\n  qvsplit extract ./photos\n  qvsplit ask 'What is in the image?'",
    help="Encode images once, and ask any number of questions from the stored features.\n\n"
    "`extract` loads only the vision encoder of a model and keeps the features of every image in Parquet; `ask` "
    "loads only the language model, and answers from the features with the same tokens as the full model.",
)


def main() -> None:
    """Run the `qvsplit` command."""
    streams.prepare()
    if not sys.warnoptions:
        print_warnings()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not streams.shows_escape_codes(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    cpus.sleep_while_waiting_if_niced()
    cpus.keep_threads_to_usable_cpus()
    interrupts.install()
    end(run(sys.argv[1:]))


def end(code: int) -> NoReturn:
    """End the process with this exit code, or that of an error of writing what is still held back."""
    code = _exit_code(streams.flush) if code == 0 else code
    try:
        streams.flush()
    except Exception:  # it has been said
        streams.discard_output()
    if code in (INTERRUPTED, TERMINATED):
        # CPython would end by SIGINT instead where a KeyboardInterrupt has ever passed through exec() of a text, as it
        # does when a dataclass is made, although it was handled; everything has been closed
        os._exit(code)
    sys.exit(code)


def print_warnings() -> None:
    """Have our warnings to users printed, and no library's remarks to programmers."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", QvsplitWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as everything is that is said to users: a line on stderr."""
    say(str(message))


# Options of Typer's, which end by an exit of their own
COMPLETION = {"--install-completion", "--show-completion"}


def run(words: Sequence[str]) -> int:
    """Run the command that the words of a command line name; gives its exit code."""
    return _exit_code(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    try:
        code: int | None = app(args=list(words), prog_name="qvsplit", standalone_mode=False)
    except SystemExit as end:  # so end Typer's own ways to complete words; anything else's is a bug
        if "_QVSPLIT_COMPLETE" in os.environ:
            return int(end.code or 0)
        if COMPLETION.isdisjoint(words):
            raise
        return UsageError.exit_code if end.code else 0
    interrupts.check()  # Typer takes Ctrl-C for all that interrupts it before there is a command
    return code or 0


def _exit_code(action: Callable[[], int | None]) -> int:
    """Give the exit code of `action`, after one line on stderr for an error; only a bug has a traceback."""
    try:
        return action() or 0
    except typer.Exit as end:
        return end.exit_code
    except QvsplitError as error:
        say(on_command_line(error))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        interrupts.clear()
        say("interrupted")
        return TERMINATED if isinstance(interrupt, interrupts.Terminated) else INTERRUPTED
    except streams.ReaderGone:
        return streams.READER_GONE
    except (Exception, SystemExit) as error:  # no library may end the command, with an exit code of its own
        if hasattr(error, "format_message"):  # Typer's, for which it has a public name only in some versions
            if line := mistake(error):
                say(line)
            return UsageError.exit_code
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            say("the disk is full: the output could not be written")
            return DiskError.exit_code
        traceback.print_exc()
        return BUG


def _with_exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command with its errors as exit codes, before Typer has codes of its own for some of them."""

    @functools.wraps(command)
    def reported(*args: Any, **kwargs: Any) -> None:
        code = _exit_code(lambda: command(*args, **kwargs))
        if code:
            raise typer.Exit(code)

    return with_help_all(reported)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qvsplit {version('qvsplit')}")
        raise typer.Exit


@app.callback()
def _qvsplit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options of the bare command; the text of its help is the app's."""


for _name, _command in COMMANDS.items():
    _text, _examples = help_and_examples(_command)
    app.command(_name, cls=Command, context_settings=SETTINGS, help=_text, epilog=_examples)(_with_exit_codes(_command))
