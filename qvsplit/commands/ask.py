"""`qvsplit ask`: answer questions from a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvsplit.commands.ask_files import Limits, open_items
from qvsplit.commands.options import (
    DEFAULT_IMAGE_PIXELS,
    DEFAULT_ITEM_SECONDS,
    DEFAULT_STORE,
    INPUT,
    OUTPUT,
    PERFORMANCE,
    SAMPLING,
    Absolute,
    Allow,
    AnswerKernels,
    AskAdapter,
    AskDevice,
    AskDtype,
    AskEmbeds,
    ItemTimeout,
    Json,
    MaxImagePixels,
    MaxNewTokens,
    Model,
    OutputFormat,
    ProgressMode,
    Quiet,
    Seed,
    System,
    Temperature,
    Thinking,
    TopK,
    TopP,
    UncheckedEncoder,
    as_format,
    one_adapter,
    one_of,
)  # fmt: skip
from qvsplit.commands.placement import Placement, require_items
from qvsplit.commands.questions import QuestionSources, as_text, read_questions
from qvsplit.commands.stale import select_and_compare
from qvsplit.commands.survey import (
    Outputs,
    Results,
    SurveyPlan,
    failed_into_table,
    run_survey,
    survey_into_table,
    write_page,
)  # fmt: skip
from qvsplit.commands.wording import on_command_line, say_note
from qvsplit.errors import CHECKS_FLAGGED, UsageError
from qvsplit.output.levels import LEVELS
from qvsplit.output.text import say
from qvsplit.runtime import interrupts

if TYPE_CHECKING:
    from qvsplit.answering.checks import Question
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.selection import Selection
    from qvsplit.ask import AskOptions, Session
    from qvsplit.output.printer import AnswerPrinter
    from qvsplit.output.table import Table


@dataclass(frozen=True)
class Items:
    """Which images and videos of which stores are asked about, and how they stand in the prompts."""

    places: Sequence[str]
    globs: Sequence[str]
    placement: Placement
    limits: Limits


def ask(
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTION",
            help="Asked about every image and video. Without any, questions are read from the pipe, one a line, or "
            "typed one by one on a terminal.",
            show_default=False,
        ),
    ] = None,
    embeds: AskEmbeds = None,
    questions_file: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            help="More questions, one a line.",
            show_default=False,
            rich_help_panel=INPUT,
            hidden=True,
        ),
    ] = None,
    checks_file: Annotated[
        Path | None,
        typer.Option(
            "--checks",
            metavar="FILE",
            help="Checks, in TOML or YAML: see docs/checks.md.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="The only possible answers, each with its probability: yes,no.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answers are JSON that conforms to this schema.",
            show_default=False,
            rich_help_panel=INPUT,
            hidden=True,
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="GLOB|FILE",
            help="Only images and videos whose path or name matches; film.mp4#2 is one part of a video. A file that is "
            "none of the store's items is encoded for these questions alone. May be repeated.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="Put all selected items into one prompt, in order of path and part.",
            rich_help_panel=INPUT,
            hidden=True,
        ),
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="Put each item into one prompt behind this one.",
            show_default=False,
            rich_help_panel=INPUT,
            hidden=True,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Write answers to a table: .parquet, .csv or .jsonl. What it has already is not asked again.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    wide: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --out: write another table, .parquet or .csv, with one row an item and a column a question.",
            show_default=False,
            rich_help_panel=OUTPUT,
            hidden=True,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write answers to one page with thumbnails.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            **one_of("--fail-on", *LEVELS),
            help="Exit with 8 if a check of this level or above was flagged, or if an item could not be checked or is "
            "uncertain.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    allow: Allow = None,
    logprobs: Annotated[
        bool,
        typer.Option(
            "--logprobs",
            help="Print the log-probability of every choice.",
            rich_help_panel=OUTPUT,
            hidden=True,
        ),
    ] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 128,
    thinking: Thinking = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End an answer before this text; may be repeated.",
            show_default=False,
            rich_help_panel=SAMPLING,
            hidden=True,
        ),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens in one batch: more need more memory and are faster [default: 16384 on a CPU, 131072 on CUDA].",
            show_default=False,
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = None,
    model: Model = None,
    adapter: AskAdapter = None,
    device: AskDevice = None,
    dtype: AskDtype = None,
    kernels: AnswerKernels = "fused",
    unchecked_encoder: UncheckedEncoder = False,
    item_timeout: ItemTimeout = DEFAULT_ITEM_SECONDS,
    max_image_pixels: MaxImagePixels = DEFAULT_IMAGE_PIXELS,
    format: OutputFormat = None,
    as_json: Json = False,
    absolute: Absolute = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Answer questions from a store.

    Every question is asked about every selected item, an image, a video or a part of one, from its stored features.
    Only the language model is loaded, and an item's part of the prompt is computed once for all its questions. Answers
    are greedy by default, and the same as those of the full model, token for token; where rounding may decide between
    two tokens as good as equally likely, as in bfloat16 and float16, --kernels reference makes them so. With --out or
    --report they go there, and to stdout only with --json.

    Examples:
        # One question about every image of ./embeds
        qvsplit ask "What is in the image?"
        # About some of another store, with the probability of each answer
        qvsplit ask -e album -i "2024/*" "Is there a dog?" --choices yes,no
        # Checks, into a table and a page; run again, it asks what is new
        qvsplit ask --checks checks.toml -o answers.parquet --report answers.html
        # To the bit the full model's, one by one, from a store that `extract --kernels reference` made
        qvsplit ask -e album "What is in the image?" --kernels reference
        # With a LoRA adapter on the language model
        qvsplit ask -e album "What is in the image?" --adapter ./my-lora
        # Exit code 8 if an item is blocked, or could not be judged
        qvsplit ask --checks checks.toml --fail-on block
    """
    from qvsplit.answering.schema import read_schema
    from qvsplit.ask import AskOptions
    from qvsplit.output.printer import PrintOptions

    printing = PrintOptions(as_format(format, as_json=as_json), absolute, logprobs, on_command_line)
    allowed = frozenset(allow.split(",") if allow else ())
    outputs = Outputs(out, report, fail_on, printing, quiet, progress, allowed, wide)
    limits = Limits(max_image_pixels, item_timeout)
    if together and compare is not None:
        raise UsageError("--together and --compare: choose one")
    chosen = Items(embeds or [DEFAULT_STORE], image or [], Placement(together, compare), limits)
    if json_schema is not None and stop:
        raise UsageError("--stop would cut what --json-schema promises; leave one out")
    choices = choices and as_text(choices, "--choices")
    system = system and as_text(system, "--system")
    sources = QuestionSources(questions or [], questions_file, checks_file, choices)
    _check_combinations(outputs, typed=sources.are_typed)
    asked = [] if sources.are_typed else read_questions(sources)
    if not any(question.flag for question in asked):
        if fail_on is not None:
            raise UsageError("--fail-on needs --checks FILE with a check that has a flag")
        if printing.names_items:
            raise UsageError(
                f"--format {format} gives the items that did not pass, and needs --checks FILE with a check that has a "
                "flag; `qvsplit find` gives the items with an answer"
            )
    options = AskOptions(
        model=model, adapter=one_adapter(adapter), device=device, dtype=dtype, max_new_tokens=max_new_tokens,
        system=system, unchecked_encoder=unchecked_encoder, temperature=temperature, top_p=top_p, top_k=top_k,
        seed=seed, stop=tuple(as_text(text, "--stop") for text in stop or ()),
        json_schema=read_schema(json_schema) if json_schema is not None else None,
        token_budget=token_budget, thinking=thinking, kernels=kernels,
    )  # fmt: skip
    if sources.are_typed:
        _ask_what_is_typed(chosen, options, outputs, choices)
    else:
        _ask_all(chosen, asked, options, outputs, single=checks_file is None)


def _check_combinations(outputs: Outputs, *, typed: bool) -> None:
    """UsageError for options that exclude each other."""
    if outputs.allowed and outputs.fail_on is None:
        raise UsageError("--allow says what does not trip --fail-on LEVEL; give that, too")
    if outputs.wide is not None and outputs.table is None:
        raise UsageError("--wide FILE is made of the table that --out FILE names; give that, too")
    if typed and any(value is not None for value in (outputs.table, outputs.report, outputs.fail_on)):
        raise UsageError("--out, --report and --fail-on need questions: on the command line, in a file or in a pipe")


def _ask_what_is_typed(chosen: Items, options: AskOptions, outputs: Outputs, choices: str | None) -> None:
    """Answer questions that are typed one by one."""
    from qvsplit.commands.chat_loop import load_and_run

    load_and_run(
        _opened(chosen, options, outputs), chosen.globs, options, outputs.printing, placement=chosen.placement,
        choices=choices, quiet=outputs.quiet, progress=outputs.progress, limits=chosen.limits,
    )  # fmt: skip


def _ask_all(
    chosen: Items, questions: Sequence[Question], options: AskOptions, outputs: Outputs, *, single: bool
) -> None:
    """Ask all questions about all items, and end with the exit code that the answers call for."""
    from qvsplit.answering.selection import select

    table = _checked_outputs(outputs, questions)
    has_flags = any(question.flag for question in questions)
    store = _opened(chosen, options, outputs, has_flags=has_flags)
    reference = chosen.placement.row(store)
    if has_flags:
        selection = select_and_compare(
            store, chosen.places, chosen.globs, reference, is_gate=outputs.fail_on is not None, quiet=outputs.quiet
        )
    else:
        selection = select(store, chosen.globs)
    items = chosen.placement.prompts(selection, reference)
    plan = SurveyPlan(items, questions, selection.failed)
    single = single and len(items) * len(questions) == 1 and not selection.failed
    results = Results(plan, outputs, _printer(selection, outputs, single=single))
    facts = {"store": store.name}
    whole_store = all(os.path.isdir(place) for place in chosen.places)
    if items:
        facts = {"model": _survey(store, options, results, table, whole_store=whole_store)} | facts
    else:
        results.add_failed()
        if table is not None:
            failed_into_table(store, options, results, table, whole_store=whole_store)
    if outputs.report is not None:
        write_page(outputs.report, results, facts)
    _end(results)


def _opened(chosen: Items, options: AskOptions, outputs: Outputs, *, has_flags: bool = False) -> Collection:
    """Open the store; files that are named and none of its items, or changed since, are encoded beside it."""
    return open_items(
        chosen.places, chosen.placement.names(chosen.globs), options, has_flags=has_flags, quiet=outputs.quiet,
        progress=outputs.progress, limits=chosen.limits,
    )  # fmt: skip


def _checked_outputs(outputs: Outputs, questions: Sequence[Question]) -> Table | None:
    """Give the table, if there is one. UsageError or DiskError where answers could not be written."""
    from qvsplit.output.report import check_target
    from qvsplit.output.table import Table
    from qvsplit.output.wide import check_questions
    from qvsplit.output.wide import check_target as check_wide

    table = Table(outputs.table) if outputs.table is not None else None
    if outputs.wide is not None:
        if outputs.table is not None and os.path.realpath(outputs.wide) == os.path.realpath(outputs.table):
            raise UsageError("--out and --wide name the same file")
        check_wide(outputs.wide)
        check_questions({question.name: question.choices is not None for question in questions})
    if outputs.report is not None:
        if outputs.table is not None and os.path.realpath(outputs.report) == os.path.realpath(outputs.table):
            raise UsageError("--out and --report name the same file")
        check_target(outputs.report)
    return table


def _survey(store: Collection, options: AskOptions, results: Results, table: Table | None, *, whole_store: bool) -> str:
    """Load the model and ask; gives the model's name."""
    from qvsplit.ask import load_session

    quiet = results.outputs.quiet
    with results.progress as progress, interrupts.at_once():  # only reading so far
        session = load_session(store, options, loaded=table is None, on_load=progress.loading)
    if table is None:
        _say_notes(session, quiet=quiet)
        run_survey(session, results)
    else:
        survey_into_table(session, results, table, whole_store=whole_store)
        _say_notes(session, quiet=quiet)
    results.warn(answers_are_json=options.json_schema is not None)
    return session.model


def _end(results: Results) -> None:
    """Say how many items have which verdict, and raise what the answers call for."""
    from qvsplit.output.verdicts import count_line, trips

    outputs, plan = results.outputs, results.plan
    if plan.has_checks and results.verdicts and not outputs.quiet:
        say(count_line(results.verdicts))
    if outputs.fail_on is not None:
        if trips(results.verdicts, outputs.fail_on, outputs.allowed):
            raise typer.Exit(CHECKS_FLAGGED)
        return  # whatever failed is allowed
    if results.error is not None:
        raise typer.Exit(results.error.exit_code)
    require_items(plan.items)


def _printer(selection: Selection, outputs: Outputs, *, single: bool) -> AnswerPrinter:
    from qvsplit.output.printer import AnswerPrinter

    roots = {row.root for row in (*selection.rows, *selection.failed)}
    return AnswerPrinter(outputs.printing, single=single, one_root=len(roots) == 1)


def _say_notes(session: Session, *, quiet: bool) -> None:
    """Say what a user should know of how answers are computed; no model is loaded to find out."""
    for note in session.notes() if session.is_loaded and not quiet else ():
        say_note(note)
