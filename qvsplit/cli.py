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
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from qvsplit.commands import ask, compact, demo, extract, inspect, purge, verify
from qvsplit.errors import BUG, INTERRUPTED, TERMINATED, DiskError, QvsplitError
from qvsplit.output.text import say
from qvsplit.runtime import interrupts

READER_GONE = 128 + 13  # SIGPIPE: whoever read our output has closed it
COMMANDS: dict[str, Callable[..., None]] = {
    "extract": extract.extract,
    "ask": ask.ask,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "compact": compact.compact,
    "purge": purge.purge,
    "demo": demo.demo,
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Encode images once, and ask any number of questions from the stored features.\n\n"
    "`extract` loads only the vision encoder of Qwen2-VL and keeps the features of every image in Parquet; `ask` "
    "loads only the language model, and answers from the features with the same tokens as the full model.",
)


def main() -> None:
    """Run the `qvsplit` command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' remarks to programmers; ours to users are printed
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    interrupts.install()
    try:
        app(prog_name="qvsplit")
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            _end_now(end.code)
        raise


def _end_now(code: int) -> None:
    """End the process with this exit code; everything has been closed.

    CPython would end it by SIGINT instead where a KeyboardInterrupt has ever passed through exec() of a text, as it
    does when a dataclass is made, although it was handled.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    os._exit(code)


def _with_exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each error into one line on stderr and its exit code; only a bug has a traceback."""

    @functools.wraps(command)
    def reported(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
        except typer.Exit:
            raise
        except QvsplitError as error:
            say(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            say("interrupted")
            raise typer.Exit(TERMINATED if isinstance(interrupt, interrupts.Terminated) else INTERRUPTED) from None
        except BrokenPipeError:  # `qvsplit ask … | head`: whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(READER_GONE) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
                say("the disk is full: the output could not be written")
                raise typer.Exit(DiskError.exit_code) from None
            traceback.print_exc()
            raise typer.Exit(BUG) from None

    return reported


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
    app.command(_name)(_with_exit_codes(_command))
