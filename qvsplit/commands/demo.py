"""`qvsplit demo`: extract and ask with the small model of the package."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvsplit.commands.extract import callbacks
from qvsplit.commands.options import Device, Json, ProgressMode, Quiet
from qvsplit.commands.wording import on_command_line
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import plural, print_json, say
from qvsplit.runtime.streams import is_terminal, shows_escape_codes

if TYPE_CHECKING:
    from qvsplit.demo import DemoOutcome


def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the postcards and their store are written.")
    ] = Path("qvsplit-demo"),
    device: Device = None,
    as_json: Json = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Show extraction and questions on a dozen images, without network and without GPU.

    Copies drawn postcards into FOLDER/postcards, extracts them into FOLDER/store with the small model of the package,
    and asks a handful of questions about each from the store alone; the right answer stands beside every answer. That
    model was trained on such postcards and knows nothing else.

    Examples:
        qvsplit demo
        qvsplit demo ~/tried --json
    """
    from qvsplit import demo as library
    from qvsplit.runtime.memory import give_back_freed_memory

    give_back_freed_memory()
    with ProgressBar(progress, shown=not quiet) as shown:
        outcome = library.run(
            folder,
            device=device,
            callbacks=callbacks(shown),
            on_asking=lambda answers: shown.start("answers", answers),
            on_answer=shown.advance,
            on_load=shown.loading,
        )
    if as_json:
        for answer in outcome.answers:
            print_json(answer.to_json())
    else:
        _print_tables(outcome, quiet=quiet)
    for reason, number in Counter(one.error for one in outcome.answers if one.error is not None).items():
        say(f"not answered: {plural(number, 'question')}: {on_command_line(reason)}")
    if outcome.error is not None:
        raise typer.Exit(outcome.error.exit_code)


def _print_tables(outcome: DemoOutcome, *, quiet: bool) -> None:
    """Print a table an image, and then what was done."""
    from rich.console import Console

    from qvsplit.demo.table import postcard_tables, summary_lines

    plain = is_terminal(sys.stdout) and not shows_escape_codes(sys.stdout)
    console = Console(file=sys.stdout, highlight=False, color_system=None if plain else "auto")
    answers = [replace(one, error=one.error and on_command_line(one.error)) for one in outcome.answers]
    for table in postcard_tables(answers, outcome.photos, console):
        console.print(table)
    if not quiet:
        for line in summary_lines(outcome):
            console.print(line, markup=False, soft_wrap=True)
