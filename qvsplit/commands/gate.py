"""`qvsplit gate`: judge files by checks, without a store or beside one; the exit code says whether they may pass."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qvsplit.commands.ask_files import without_failures
from qvsplit.commands.extract import callbacks
from qvsplit.commands.opening import open_with_progress
from qvsplit.commands.options import (
    DEFAULT_IMAGE_PIXELS,
    DEFAULT_ITEM_SECONDS,
    DTYPE_ALIASES,
    DTYPES,
    INPUT,
    MODEL,
    OUTPUT,
    PERFORMANCE,
    Absolute,
    AnswerKernels,
    AskAdapter,
    AskDevice,
    Json,
    MaxImagePixels,
    Model,
    OutputFormat,
    ProgressMode,
    Quiet,
    as_format,
    one_adapter,
    one_of,
    some_of,
)
from qvsplit.commands.wording import on_command_line
from qvsplit.errors import CHECKS_FLAGGED, UsageError, escaped
from qvsplit.output.levels import LEVELS
from qvsplit.output.names import shown_name
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import say

STDIN = "-"


def gate(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Images and videos: files, no folders.", show_default=False),
    ] = None,
    checks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Checks, in TOML or YAML, of which at least one has a flag: see docs/checks.md.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    files_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="More files, one a line, or with a NUL behind each as find -print0 has them; - is the pipe.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    embeds: Annotated[
        str | None,
        typer.Option(
            "--embeds",
            "-e",
            metavar="STORE",
            help="A store where features may be already; all others are made as that was made, and kept nowhere "
            "[default: none].",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    fail_on: Annotated[
        str,
        typer.Option(
            **one_of("--fail-on", *LEVELS),
            help="Exit with 8 if a check of this level or above is flagged; info is whatever is flagged.",
            rich_help_panel=OUTPUT,
        ),
    ] = LEVELS[0],
    allow: Annotated[
        str | None,
        typer.Option(
            **some_of("--allow", "uncertain", "error"),
            help="Files with these verdicts keep it open all the same.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    model: Model = None,
    adapter: AskAdapter = None,
    device: AskDevice = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            **one_of("--dtype", *DTYPES, aliases=DTYPE_ALIASES),
            help="Compute in this dtype; the encoder of a store stays with its own [default: float32 on a CPU, the "
            "checkpoint's on CUDA].",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    kernels: AnswerKernels = "fused",
    item_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="A file that takes longer than this to read, or to decode, has the verdict error.",
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = DEFAULT_ITEM_SECONDS,
    max_image_pixels: MaxImagePixels = DEFAULT_IMAGE_PIXELS,
    format: OutputFormat = None,
    as_json: Json = False,
    absolute: Absolute = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Judge files by checks, and fail unless all of them pass.

    Prints one verdict a file, in the order given: pass, the highest level flagged, uncertain, or error. Exits with 8 if
    anything is flagged at the level of --fail-on or above, or if any file is uncertain or an error and --allow does not
    name that; else with 0. What no store has is encoded in memory, and nothing is written anywhere.

    Examples:
        # Exit code 8 unless this file may be shown
        qvsplit gate upload.jpg --checks checks.toml
        # Only what is flagged at the level block, or is not known, keeps it shut
        qvsplit gate *.jpg --checks checks.toml --fail-on block
        # Many files, of which a store has some already; the paths of those that did not pass
        find . -name "*.jpg" -print0 | qvsplit gate --files-from - --checks checks.toml -e embeds --format paths
    """
    if checks is None:
        raise UsageError("--checks FILE is needed: what the files are judged by")
    names = [*(files or []), *(_listed(files_from) if files_from is not None else [])]
    if not names:
        raise UsageError("no file; give some, or a list of them with --files-from FILE, or - for the pipe")
    from qvsplit.answering.options import AskOptions
    from qvsplit.judging import GateCallbacks
    from qvsplit.judging import gate as judge
    from qvsplit.output.printer import AnswerPrinter, PrintOptions
    from qvsplit.output.verdicts import count_line
    from qvsplit.runtime.memory import give_back_freed_memory

    give_back_freed_memory()
    printer = AnswerPrinter(
        PrintOptions(as_format(format, as_json=as_json), absolute, worded=on_command_line), one_root=False
    )
    store = None if embeds is None else open_with_progress(embeds, quiet=quiet, progress=progress)
    with ProgressBar(progress, shown=not quiet) as shown:
        hearing = GateCallbacks(
            encoding=without_failures(callbacks(shown)),
            on_asking=lambda number: shown.start("answers", number),
            on_answer=lambda answer: shown.advance(),
            on_load=shown.loading,
            on_note=lambda line: None if quiet else shown.note(on_command_line(line)),
        )
        judgement = judge(
            names, checks, fail_on=fail_on, allow=tuple(allow.split(",")) if allow else (), embeds=store,
            options=AskOptions(model=model, adapter=one_adapter(adapter), device=device, dtype=dtype, kernels=kernels),
            item_timeout=item_timeout, max_image_pixels=max_image_pixels, callbacks=hearing,
        )  # fmt: skip
    for item in judgement.verdicts:
        printer.verdict(item)
        if item.unseen:
            say(f"uncertain: {escaped(shown_name(item.rows[0]))}: {item.unseen}")
    if not quiet:
        say(count_line(judgement.verdicts))
    if not judgement.passed:
        raise typer.Exit(CHECKS_FLAGGED)


def _listed(place: str) -> list[str]:
    """Read a list of files. UsageError where it cannot be read, or is empty."""
    try:
        data = sys.stdin.buffer.read() if place == STDIN else Path(place).read_bytes()
    except OSError as error:
        raise UsageError(f"the list of files cannot be read from {place} ({error.strerror})") from None
    end = b"\0" if b"\0" in data else b"\n"
    return [os.fsdecode(line) for line in data.split(end) if line]
