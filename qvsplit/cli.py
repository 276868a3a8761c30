"""The command line: parse, one call, print, exit code. Answers go to stdout, all else to stderr.

Nothing heavy is imported before a command needs it: `--help` and a run with nothing to do import no torch.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvsplit import interrupts
from qvsplit.errors import (
    CHECKS_RAISED,
    INTERRUPTED,
    PICTURES_FAILED,
    TERMINATED,
    DiskError,
    QvsplitError,
    UsageError,
    printable,
    size,
)
from qvsplit.interrupts import Terminated

if TYPE_CHECKING:
    from qvsplit.answers import Table
    from qvsplit.ask import Answer, Asker, Shown
    from qvsplit.checks import Question
    from qvsplit.extract import Summary, Watcher
    from qvsplit.lock import Lock
    from qvsplit.store import Row

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="See every picture once, ask any number of questions of what was seen.\n\n"
    "`extract` runs only Qwen2-VL's vision tower and keeps its embeddings in Parquet; `ask` runs only the language "
    "model on them, and answers with the very tokens the whole model would have given.",
)

Model = Annotated[
    str | None,
    typer.Option(
        help="A checkpoint's folder or hub name, NAME@REVISION for a revision, or demo for the small one in the "
        "package [default: the album's own, else QVSPLIT_MODEL, else Qwen/Qwen2-VL-2B-Instruct].",
        show_default=False,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N [default: cuda where there is one].", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, one object a line.")]
Wait = Annotated[bool, typer.Option("--wait", help="If another run is writing the album, wait for it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but answers, errors, failures and warnings.")]


def main() -> None:
    """Entry point of the `qvsplit` command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' remarks to programmers; ours to users are printed
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    interrupts.install()
    app(prog_name="qvsplit")


def _say(line: str) -> None:
    """One line to stderr."""
    print(f"qvsplit: {printable(line)}", file=sys.stderr, flush=True)


def _reporting(command: Callable[..., None]) -> Callable[..., None]:
    """Each error one line on stderr and its exit code; a traceback only for bugs."""

    @functools.wraps(command)
    def reported(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
        except QvsplitError as error:
            _say(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            _say("interrupted")
            raise typer.Exit(TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED) from None
        except BrokenPipeError:  # `qvsplit ask … | head`: whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + 13) from None
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            _say("the disk is full: the output could not be written")
            raise typer.Exit(DiskError.exit_code) from None

    return reported


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qvsplit {version('qvsplit')}")
        raise typer.Exit


@app.callback()
def _qvsplit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the bare command; the text of its help is the app's."""


# -------------------------------------------------------------------------------------------------------- extract


@app.command()
@_reporting
def extract(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Folders and files of pictures.")],
    out: Annotated[
        str, typer.Option(help="The album: a folder of shards, made if need be, continued if there.")
    ] = "embeds",
    model: Model = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N, or several with commas between them, each computing its own batches [default: "
            "cuda where there is one].",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Compute in float32, bfloat16 or float16 [default: the album's own, else float32 on a CPU "
            "and the checkpoint's dtype on CUDA].",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Store as float32, bfloat16, float16 or int8, a byte a value and a scale a token [default: as "
            "computed; anything narrower is lossy].",
            show_default=False,
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Larger pictures are scaled down to this many pixels [default: 1003520, which is 1,280 "
            "tokens, or the checkpoint's own limit if lower].",
            show_default=False,
        ),
    ] = None,
    min_pixels: Annotated[
        int | None,
        typer.Option(
            help="Smaller pictures are scaled up to this many pixels [default: the checkpoint's own].",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read and decode [default: one a core, at most 8].", show_default=False),
    ] = None,
    patch_budget: Annotated[
        int | None,
        typer.Option(
            help="Patches in one forward pass: memory against speed [default: 5120 on a CPU, 24576 on CUDA, fewer "
            "where memory is short].",
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            help="fused, the fast forward pass, or reference, transformers' own, to the bit [default: the album's own, "
            "else fused].",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say, from the pictures' headers, what it would take: pictures, tokens, bytes, seconds.",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="Read at most this many pictures in this run; the next goes on.", show_default=False),
    ] = None,
    max_runtime: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Begin no picture after this time (90m, 2h30m, 45s); the next run goes on.",
            show_default=False,
        ),
    ] = None,
    picture_timeout: Annotated[
        float,
        typer.Option(min=0.1, metavar="SECONDS", help="A picture that takes longer to read, or to decode, has failed."),
    ] = 60.0,
    checksum: Annotated[
        bool, typer.Option("--checksum", help="Read every file again, also where size and time say it has not changed.")
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="See every picture anew, under another recipe if asked for; the old album stays until then.",
        ),
    ] = False,
    wait: Wait = False,
    prune: Annotated[bool, typer.Option("--prune", help="Mark pictures gone whose file is no longer there.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed before, though it has not changed.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """See pictures: bring an album up to date.

    Every picture under PATH that the album does not know is looked at once. Only the vision tower is loaded, and
    only if there is something new. A picture that cannot be read becomes a failed row and stops nothing; exit code 1
    says that some failed which had not failed before.
    """
    from qvsplit.devices import give_back_freed_memory
    from qvsplit.extract import Settings, extract_pictures

    give_back_freed_memory()
    settings = Settings(
        model=model, device=device, dtype=dtype, store=store, min_pixels=min_pixels, max_pixels=max_pixels,
        workers=workers, patch_budget=patch_budget, kernels=kernels, prune=prune, retry_failed=retry_failed,
        checksum=checksum, rebuild=rebuild, wait=wait, limit=limit, picture_seconds=picture_timeout, dry_run=dry_run,
        max_runtime=None if max_runtime is None else _duration(max_runtime),
    )  # fmt: skip
    with _Progress(shown=sys.stderr.isatty() and not quiet and not dry_run) as progress:
        try:
            summary = extract_pictures(paths, out=out, settings=settings, watcher=progress.watcher())
        except KeyboardInterrupt as interrupt:
            progress.stop()
            done: Summary | None = getattr(interrupt, "qvsplit_summary", None)
            if done is not None:
                _print_summary(done, as_json=as_json, quiet=quiet)
            raise
        except QvsplitError as error:
            if as_json:  # a monitor reads one object, whatever happened
                begun: Summary | None = getattr(error, "qvsplit_summary", None)
                told = begun.to_json() if begun is not None else {}
                print(json.dumps(told | {"error": str(error), "exit_code": error.exit_code}), flush=True)
            raise
    if dry_run and not as_json:
        _print_preview(summary)
    else:
        _print_summary(summary, as_json=as_json, quiet=quiet)
    if summary.failed:
        raise typer.Exit(PICTURES_FAILED)


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


def _duration(text: str) -> float:
    """`2h30m`, `90m`, `45s` or a bare number of seconds, in seconds. UsageError for anything else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise UsageError(f"--max-runtime {text}: give a time such as 90m, 2h30m or 45s")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def _print_preview(summary: Summary) -> None:
    """What a run would do: to stdout, as it is what was asked for."""
    known = f"{summary.skipped:,} are known and unchanged"
    known += f", {summary.failed_before:,} failed before and are unchanged" if summary.failed_before else ""
    print(f"{summary.to_do:,} of {summary.found:,} pictures would be read, {known}")
    if summary.missing:
        print(f"{summary.missing:,} pictures of the album are no longer there")
    preview = summary.preview
    if preview is None or not preview.pictures:
        return
    parts = [f"{preview.tokens:,} tokens"]
    parts += [f"about {size(preview.bytes)} on disk"] if preview.bytes is not None else []
    if preview.seconds is None:
        parts.append("no telling how long: this album has had no run on such a machine yet")
    else:
        by = "by earlier runs" if preview.seconds_by == "earlier runs" else "by arithmetic, roughly"
        parts.append(f"about {_time(preview.seconds)} ({by})")
    print(f"at most {', '.join(parts)}; copies and moved pictures take next to nothing")
    if preview.bad:
        print(f"{preview.bad:,} of them would fail by their header")


def _time(seconds: float) -> str:
    """For people: 45 s, 12 min, 3.5 h."""
    if seconds < 1:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print_summary(summary: Summary, *, as_json: bool, quiet: bool) -> None:
    """One JSON object; else what happened. On no terminal nothing is said where nothing happened, as cron mails it."""
    if as_json:
        print(json.dumps(summary.to_json()), flush=True)
    if quiet or as_json or not (summary.did_anything or sys.stderr.isatty()):
        return
    counted = {
        "new": summary.new, "edited": summary.edited, "encoded again": summary.recovered, "copied": summary.copied,
        "moved": summary.moved, "touched": summary.touched, "unchanged": summary.skipped, "failed": summary.failed,
        "failed again": summary.failed_again, "failed before": summary.failed_before, "vanished": summary.vanished,
        "gone": summary.gone, "left": summary.left,
    }  # fmt: skip
    parts = [f"{number:,} {name}" for name, number in counted.items() if number]
    nothing = f"0 of {summary.to_do:,} done" if summary.interrupted else "nothing to do"
    _say(f"{', '.join(parts) or nothing} in {summary.seconds:.1f} s; {summary.album}")
    if summary.encoded:
        _say(
            f"{summary.tokens:,} tokens, {size(summary.bytes)} written; read {size(summary.weights_bytes_read)} of "
            f"weights, peak memory {size(summary.peak_memory_bytes)}"
        )
    if summary.stopped:
        _say(f"stopped by --{summary.stopped}; run the same command again to go on")
    if summary.missing:
        _say(f"{summary.missing:,} pictures of the album are no longer there; --prune marks them gone")


class _Progress:
    """A bar with rate and time left on a terminal; failures and notes as lines, there or not."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def watcher(self) -> Watcher:
        from qvsplit.extract import Watcher

        return Watcher(
            on_plan=lambda to_do: self.next("pictures", to_do),
            on_picture=self.advance,
            on_failure=lambda path, reason: self._line(f"failed: {path} {reason}"),
            on_note=self._line,
        )

    def next(self, what: str, total: int) -> None:
        """Count `total` of something from here on."""
        if not self.shown or not total:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.stop()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.bar.start()
        self.task = self.bar.add_task(what, total=total, rate="")

    def advance(self, path: str) -> None:
        """One more is done."""
        if self.bar is not None:
            task = self.bar.tasks[0]
            rate = f"{task.speed:.1f}/s" if task.speed else ""
            self.bar.update(self.task, advance=1, rate=rate)

    def _line(self, line: str) -> None:
        if self.bar is not None:
            self.bar.console.print(f"qvsplit: {printable(line)}", markup=False, highlight=False, soft_wrap=True)
        else:
            _say(line)


# ------------------------------------------------------------------------------------------------------------ ask


@app.command()
@_reporting
def ask(
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTION",
            help="Asked of every picture. None: read from the pipe, one a line, or typed one by one on a terminal.",
            show_default=False,
        ),
    ] = None,
    embeds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ALBUM|SHARD", help="A folder, file or glob; may be repeated [default: embeds].", show_default=False
        ),
    ] = None,
    questions_file: Annotated[
        Path | None, typer.Option("--questions", metavar="FILE", help="More questions, one a line.", show_default=False)
    ] = None,
    checks_file: Annotated[
        Path | None,
        typer.Option(
            "--checks", metavar="FILE", help="Checks, in TOML or YAML: see docs/checks.md.", show_default=False
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="The answers allowed, each given its probability: yes,no.", show_default=False
        ),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answers are JSON that conforms to this schema.", show_default=False),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Only pictures whose path or name matches; may be repeated.", show_default=False
        ),
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Show all chosen pictures in one prompt, in order of path.")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Show each picture in one prompt behind this one.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answers as a table: .parquet, .csv or .jsonl. What is in it already is not asked again.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Answers as one page with thumbnails.", show_default=False),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="SEVERITY",
            help="Exit with 8 if a check of this severity or a graver one was raised: info, warn or block.",
            show_default=False,
        ),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Print the log-probability of every allowed answer.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system message in place of the template's own.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Draw answers instead of the likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this probability.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from this many of the likeliest tokens.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same answers.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End an answer before this text; may be repeated.", show_default=False),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens in one batch: memory against speed [default: 16384 on a CPU, 131072 on CUDA].",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:N, or auto to spread the model [default: cuda where there is one].",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Compute in float32, bfloat16 or float16 [default: float32 on a CPU, the checkpoint's on CUDA].",
            show_default=False,
        ),
    ] = None,
    unchecked_tower: Annotated[
        bool,
        typer.Option("--unchecked-tower", help="Ask although nothing shows that the album is of this model's tower."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer questions from an album alone.

    Every question is asked of every picture chosen, from its stored embeddings. Only the language model is loaded,
    and a picture's part of the prompt is computed once for all its questions. Answers are greedy unless you say
    otherwise, and are the whole model's own, token for token. With --out or --report they go there, and to stdout
    only with --json.
    """
    from qvsplit import checks
    from qvsplit.album import open_album
    from qvsplit.answers import Table
    from qvsplit.ask import Settings, Shown, open_asker, select
    from qvsplit.report import check_target
    from qvsplit.schema import read_schema

    if fail_on is not None and fail_on not in checks.SEVERITIES:
        raise UsageError(f"--fail-on {fail_on}: choose one of {', '.join(checks.SEVERITIES)}")
    if json_schema is not None and stop:
        raise UsageError("--stop would cut what --json-schema promises; leave one out")
    if together and compare is not None:
        raise UsageError("--together and --compare: choose one")
    interactive = sys.stdin is not None and sys.stdin.isatty()
    typed = not questions and questions_file is None and checks_file is None and interactive
    if typed and (out is not None or report is not None or fail_on is not None):
        raise UsageError("--out, --report and --fail-on need questions: on the command line, in a file or in a pipe")
    asked = [] if typed else _questions(questions or [], questions_file, choices, checks_file)
    if fail_on is not None and not any(question.flag for question in asked):
        raise UsageError("--fail-on needs --checks FILE with a check that has a flag")
    table = Table(out) if out is not None else None
    settings = Settings(
        model=model, device=device, dtype=dtype, max_new_tokens=max_new_tokens, system=system,
        unchecked_tower=unchecked_tower, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
        stop=tuple(stop or ()), json_schema=read_schema(json_schema) if json_schema is not None else None,
        token_budget=token_budget,
    )  # fmt: skip
    if report is not None:
        if out is not None and os.path.realpath(report) == os.path.realpath(out):
            raise UsageError("--out and --report name the same file")
        check_target(report)
    album = open_album(*(embeds or ["embeds"]))
    rows = select(album, image or [])
    shown = [Shown((row,)) for row in rows]
    if together:
        shown = [Shown(tuple(rows))]
    elif compare is not None:
        (reference,) = select(album, [compare], only=1)
        shown = [Shown((reference, row), shared=1) for row in rows if row is not reference]
        if not shown:
            raise UsageError(f"--compare {compare}: there is no other picture to compare it with")
    with interrupts.at_once():  # only reading so far
        asker = open_asker(album, settings, loaded=table is None)
    one_answer = len(shown) * len(asked) == 1 and checks_file is None
    printer = _Printer(
        as_json=as_json, single=one_answer, one_root=len({row.root for row in rows}) == 1, logprobs=logprobs
    )
    if typed:
        _note(asker, quiet)
        _prompt_loop(asker, shown, printer, choices)
        return
    survey = _Survey(asker, shown, asked, printer, told=as_json or (out is None and report is None), quiet=quiet,
                     kept=report is not None)  # fmt: skip
    if table is None:
        _note(asker, quiet)
        survey.run()
    else:
        with table:
            survey.run(table, whole=all(os.path.isdir(place) for place in embeds or ["embeds"]))
        _note(asker, quiet)
        if not quiet:
            _say(f"{survey.recalled:,} answers known, {survey.answered:,} asked; {len(table):,} in {out}")
    if report is not None:
        survey.report(report)
    verdicts = survey.verdicts
    if verdicts and not quiet:
        counted = {name: verdicts.count(name) for name in (*reversed(checks.SEVERITIES), checks.PASS)}
        _say(", ".join(f"{name}: {number:,}" for name, number in counted.items() if number))
    if fail_on is not None:
        grave = checks.SEVERITIES[checks.SEVERITIES.index(fail_on) :]
        if any(name in grave for name in verdicts):
            raise typer.Exit(CHECKS_RAISED)


def _note(asker: Asker, quiet: bool) -> None:
    """Where the halves compute in different dtypes, say so; a model that was not needed is not loaded for it."""
    note = asker.dtype_note() if asker.is_loaded and not quiet else None
    if note:
        _say(note)


def _questions(given: list[str], file: Path | None, choices: str | None, checks_file: Path | None) -> list[Question]:
    """All questions there are: the command line's, a file's, the checks, and, where none has any, the pipe's."""
    from qvsplit.checks import Question, read_checks

    asked = list(given)
    try:
        if file is not None:
            asked += file.read_text(encoding="utf-8-sig").split("\n")
        elif not given and checks_file is None and sys.stdin is not None:
            asked += sys.stdin.read().removeprefix("\ufeff").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"questions cannot be read from {file or 'the pipe'} ({error})") from None
    texts = [question.rstrip("\r") for question in asked if question.strip()]
    all_of_them = [_with_choices(Question(text), choices) for text in texts]
    all_of_them += read_checks(checks_file) if checks_file is not None else []
    if not all_of_them:
        raise UsageError('no question; give one in quotes: qvsplit ask "What is in the picture?"')
    return all_of_them


def _with_choices(question: Question, choices: str | None) -> Question:
    from qvsplit.checks import with_choices

    if choices is None:
        return question
    return with_choices(question, [choice.strip() for choice in choices.split(",")])


def _prompt_loop(asker: Asker, shown: list[Shown], printer: _Printer, choices: str | None) -> None:
    """Questions one by one; model and pictures stay warm. An empty line or Ctrl-D ends it, Ctrl-C cuts an answer."""
    from qvsplit.checks import Question

    _say(f"{sum(len(one.rows) for one in shown)} pictures; type a question, or an empty line to end")
    while True:
        print("? ", end="", file=sys.stderr, flush=True)
        try:
            text = input().strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if not text:
            return
        try:
            question = _with_choices(Question(text), choices)
            if len(shown) == 1:
                printer.stream(asker, shown[0], question)
            else:
                for answer in asker.survey(shown, [question]):
                    printer.tell(answer)
        except Terminated:
            raise
        except KeyboardInterrupt:
            interrupts.forget()
            _say("answer cut short")
        except QvsplitError as error:
            _say(str(error))


class _Survey:
    """Every question asked of every picture: told as they are answered, kept for table, report and verdicts."""

    def __init__(
        self,
        asker: Asker,
        shown: list[Shown],
        questions: list[Question],
        printer: _Printer,
        *,
        told: bool,
        quiet: bool,
        kept: bool,
    ) -> None:
        self.asker = asker
        self.shown = shown
        self.questions = questions
        self.printer = printer
        self.told = told
        self.quiet = quiet
        self.recalled = self.answered = 0
        self.verdicts: list[str] = []
        self._answers: list[Answer] = []
        self._uncovered: dict[str, int] = {}
        self._cut = 0
        self._kept = kept

    def run(self, table: Table | None = None, *, whole: bool = False) -> None:
        """Ask; with `table`, only what it does not know, and put the rest into it.

        Where the album is there as a `whole`, the table loses what was answered about pictures that are gone from it.
        """
        from qvsplit.ask import Recorder

        if table is None and self.printer.streams and self.printer.single:
            self._take([self.printer.stream(self.asker, self.shown[0], self.questions[0])])
            return
        with interrupts.at_once():  # the weights' fingerprint takes its time, once
            recorder = Recorder(table, self.asker, self.questions) if table is not None else None
        total = len(self.shown) * len(self.questions)
        with _Progress(
            shown=sys.stderr.isatty() and not self.quiet and not (self.told and self.printer.streams)
        ) as bar:
            bar.next("answers", total)
            picture: list[Answer] = []
            heard: dict[str, Any] = {}
            if recorder is not None:
                heard = {"recall": recorder.recall, "on_answer": recorder.put}
            for answer in self.asker.survey(self.shown, self.questions, **heard):
                if recorder is not None:
                    recorder.put(answer)
                if self.told:
                    self.printer.tell(answer)
                bar.advance(answer.rows[-1].path)
                picture.append(answer)
                if len(picture) == len(self.questions):
                    self._take(picture)
                    picture = []
                interrupts.check()
        for name, number in self._uncovered.items():
            _say(
                f"{name}: on {number:,} of {len(self.shown):,} pictures the model would have given none of the answers "
                "by itself, and their probabilities mean little; spell them as it does (docs/checks.md)"
            )
        if self._cut and self.asker.settings.json_schema is not None:
            _say(f"{self._cut:,} answers were cut at --max-new-tokens: they are no JSON")
        if recorder is not None:
            if whole:
                recorder.drop_stale()
            self.recalled, self.answered = recorder.recalled, recorder.asked

    def report(self, file: Path) -> None:
        """The answers as one page."""
        from qvsplit.report import write_report

        with _Progress(shown=sys.stderr.isatty() and not self.quiet) as bar:
            bar.next("thumbnails", len(self.shown))
            told = {"model": self.asker.model, "album": self.asker.album.name, "asked": time.strftime("%Y-%m-%d %H:%M")}
            write_report(file, self._answers, title=file.stem, told=told, on_picture=bar.advance)
        if not self.quiet:
            _say(f"{file}: {len(self.shown):,} pictures, {size(file.stat().st_size)}")

    def _take(self, answers: list[Answer]) -> None:
        """One picture's answers are complete."""
        from qvsplit.checks import COVERED, verdict

        self._answers += answers if self._kept else []
        self._cut += sum(answer.recalled is None and answer.finish_reason == "length" for answer in answers)
        for answer in answers:
            if answer.recalled is None and answer.coverage is not None and answer.coverage < COVERED:
                self._uncovered[answer.name] = self._uncovered.get(answer.name, 0) + 1
        if any(question.flag for question in self.questions):
            raised = [answer for answer in answers if answer.flagged]
            self.verdicts.append(verdict(answer.severity or "" for answer in raised))
            if self.told:
                self.printer.verdict(answers[0].rows, self.verdicts[-1], [answer.name for answer in raised])


class _Printer:
    """Answers to stdout: streamed on a terminal, JSON lines, or plain lines for a pipe."""

    def __init__(self, *, as_json: bool, single: bool, one_root: bool, logprobs: bool = False) -> None:
        self.one_root = one_root
        self.as_json = as_json
        self.single = single
        self.logprobs = logprobs
        self.streams = sys.stdout is not None and sys.stdout.isatty() and not as_json

    def stream(self, asker: Asker, shown: Shown, question: Question) -> Answer:
        """Ask, and show the answer as it grows, where somebody watches."""
        if not self.streams or question.answers is not None:
            answer = asker.answer(shown.rows, question)
            self.tell(answer)
            return answer
        self._heading(shown.rows, question.text)
        answer = asker.answer(shown.rows, question, on_text=self._grow)
        print(flush=True)
        return answer

    def tell(self, answer: Answer) -> None:
        """One finished answer."""
        if self.as_json:
            print(json.dumps(answer.to_json(), ensure_ascii=False), flush=True)
        elif self.streams:
            self._heading(answer.rows, answer.name)
            print(printable("  ".join([answer.text, *self._odds(answer)]), keep="\n\t"), flush=True)
        elif self.single:
            print("\t".join([answer.text, *self._odds(answer)]), flush=True)
        else:
            self._line([self._names(answer.rows), answer.name, answer.text, *self._odds(answer)])

    def verdict(self, rows: Sequence[Row], verdict: str, raised: list[str]) -> None:
        """What a picture's checks come to."""
        from qvsplit.ask import named

        if self.as_json:
            told = named(rows) | {"verdict": verdict, "raised": raised}
            print(json.dumps(told, ensure_ascii=False), flush=True)
        else:
            self._line([self._names(rows), "verdict", verdict, ",".join(raised)])

    def _line(self, parts: list[str]) -> None:
        print("\t".join(printable(" ".join(part.split())) for part in parts), flush=True)

    def _odds(self, answer: Answer) -> list[str]:
        """Probability, what it raised, log-probabilities: nothing for an answer in the model's own words."""
        if answer.probabilities is None:
            return ["skipped"] if answer.finish_reason == "skipped" else []
        told = [f"{answer.probability:.3f}", (answer.severity or "") if answer.flagged else ""]
        if self.logprobs:
            told += [f"{name}={value:.4f}" for name, value in (answer.logprobs or {}).items()]
        return told if any(told[1:]) else told[:1]

    def _heading(self, rows: Sequence[Row], question: str) -> None:
        if self.single:
            return
        bold, plain = ("", "") if os.environ.get("NO_COLOR") else ("\033[1m", "\033[0m")
        names = ", ".join(printable(self._name(row)) for row in rows)
        print(f"\n{bold}{names}{plain}  {printable(question)}", flush=True)

    def _grow(self, text: str) -> None:
        print(printable(text, keep="\n\t"), end="", flush=True)

    def _names(self, rows: Sequence[Row]) -> str:
        return ",".join(map(self._name, rows))

    def _name(self, row: Row) -> str:
        """The path alone where all pictures have one root, else with it."""
        return row.path if self.one_root else f"{row.root}/{row.path}"


# ------------------------------------------------------------------------------------------------ inspect, verify


@app.command()
@_reporting
def inspect(
    place: Annotated[str, typer.Argument(metavar="ALBUM|SHARD", help="A folder, file or glob.")],
    as_json: Json = False,
) -> None:
    """Say what is in an album.

    Counts by state, tokens, sizes, the recipe, where the rows came from, and what failed and why.
    """
    from qvsplit.album import open_album
    from qvsplit.verify import describe

    told = describe(open_album(place))
    if as_json:
        print(json.dumps(told))
        return
    recipe = told["recipe"]
    model = told["model"] + (f"@{told['revision']}" if told["revision"] else "")
    share = told["bytes"] / told["raw_bytes"] if told["raw_bytes"] else 0
    lines = {
        "pictures": f"{told['pictures']:,} ok ({told['copies']:,} of them by another's embeddings), "
        f"{told['failed']:,} failed, {told['gone']:,} gone, {told['lost']:,} lost",
        "tokens": f"{told['tokens']:,} of {told['hidden_size']} {recipe['stored_dtype']}",
        "size": f"{size(told['bytes'])} in {told['shards']} shards, {share:.3f} of the raw embeddings",
        "model": model,
        "tower": recipe["tower"],
        "computed": f"in {recipe['compute_dtype']} on {told['device']}, stored as {recipe['stored_dtype']}",
        "pixels": f"{recipe['processor']['min_pixels']:,} to {recipe['processor']['max_pixels']:,}",
        "versions": ", ".join(f"{name} {version}" for name, version in told["versions"].items()),
    }
    for name, text in lines.items():
        print(f"{name:9} {printable(text)}")
    for root, tally in told["roots"].items():
        print(f"root      {printable(root)}: " + ", ".join(f"{number:,} {state}" for state, number in tally.items()))
    if told["superseded"]:
        print(f"old rows  {told['superseded']:,}; `qvsplit compact` drops them")
    for name in told["set_aside"]:
        print(f"set aside {printable(name)}, damaged; delete it when you like")
    if told["rebuilding"]:
        print("rebuild   begun and not finished; run `qvsplit extract --rebuild` again")
    for run in told["runs"]:
        print(f"run       {_run_line(run)}")
    for failure in told["failures"]:
        name = failure["path"] if len(told["roots"]) == 1 else f"{failure['root']}/{failure['path']}"
        print(f"failed    {printable(name)} {printable(failure['error'] or '')}")


def _run_line(run: dict[str, Any]) -> str:
    """One run of the album's own record, which anybody may have edited."""
    counted = [
        f"{run[name]:,} {name.replace('_', ' ')}"
        for name in ("encoded", "copied", "moved", "touched", "failed", "failed_again", "gone", "left")
        if isinstance(run.get(name), int)
    ]
    ending = f"; {run['error']}" if "error" in run else "; interrupted" if run.get("interrupted") else ""
    return printable(
        f"{run.get('began')}: {', '.join(counted) or 'nothing encoded'} in {run.get('seconds', 0)} s{ending}"
    )


@app.command()
@_reporting
def verify(
    place: Annotated[str, typer.Argument(metavar="ALBUM|SHARD", help="A folder, file or glob.")],
    sample: Annotated[
        int, typer.Option(min=0, help="Also recompute this many pictures with the whole, unsplit model, and compare.")
    ] = 0,
    model: Model = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an album, byte by byte.

    Exit code 6 if anything is not as it was written.

    With --sample N and the whole checkpoint at hand, N pictures are looked at again by the unsplit model: their
    embeddings and its answer must be those of the album.
    """
    from qvsplit import verify as checks
    from qvsplit.album import open_album, shard_paths
    from qvsplit.errors import AlbumDamaged

    problems = []
    for shard in checks.check_shards(shard_paths(place)):
        if as_json:
            print(json.dumps({"shard": shard.shard, "rows": shard.rows, "tokens": shard.tokens, "error": shard.error}))
        elif shard.error is None and not quiet:
            print(f"{printable(shard.shard)}: {shard.rows:,} rows, {shard.tokens:,} tokens, sound")
        problems += [shard.error] if shard.error else []
    if not problems:
        album = open_album(place)
        problems += checks.check_album(album)
        pictures = (
            checks.check_pictures(album, checks.sample(album, sample), model=model, device=device) if sample else ()
        )
        compared = 0
        for picture in pictures:
            compared += picture.skipped is None
            if as_json:
                print(json.dumps(picture.to_json()), flush=True)
            elif not quiet:
                print(f"{printable(picture.path)}: {_verdict(picture)}", flush=True)
            if not picture.agrees:
                problems.append(f"{picture.path}: the album and the whole model disagree ({_verdict(picture)})")
        if sample and not compared and not problems:
            raise UsageError("nothing could be compared: the sampled pictures' files are gone or have changed")
    for line in problems[1:]:
        _say(line)
    if problems:
        raise AlbumDamaged(problems[0])


# ------------------------------------------------------------------------------------------------ compact, forget


@app.command()
@_reporting
def compact(
    place: Annotated[str, typer.Argument(metavar="ALBUM", help="A folder of shards.")],
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tidy an album.

    Merges small shards, and drops rows that newer ones supersede and embeddings of pictures that are gone. Nothing is
    encoded again, and no answer changes; it may be killed at any moment. Needs as much free disk as it rewrites.
    """
    from qvsplit.compact import compact

    with _writing(place, wait) as (folder, lock):
        done = compact(folder, lock)
    if as_json:
        print(json.dumps(asdict(done)))
    elif not quiet and (done.rows_dropped or done.shards_before != done.shards_after or sys.stderr.isatty()):
        _say(
            f"{done.shards_before:,} → {done.shards_after:,} shards, {size(done.bytes_before)} → "
            f"{size(done.bytes_after)}, {done.rows_dropped:,} old rows dropped; {place}"
        )


@app.command()
@_reporting
def forget(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="A picture, a folder, or a path as the album has it.")
    ],
    embeds: Annotated[str, typer.Option(metavar="ALBUM", help="The album.")] = "embeds",
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take pictures out of an album for good.

    Their rows and embeddings, and all that was superseded of them, are on disk no more. Tables and reports that were
    made of the album are not touched. A file that is still there would be seen again by the next `extract`.
    """
    from qvsplit.compact import forget

    with _writing(embeds, wait) as (folder, lock):
        done = forget(folder, paths, lock)
    if as_json:
        print(json.dumps(asdict(done)))
        return
    if not quiet:
        pictures = "1 picture" if done.forgotten == 1 else f"{done.forgotten:,} pictures"
        _say(f"{pictures} forgotten; {size(done.bytes_before)} → {size(done.bytes_after)}; {embeds}")
    if done.shared:
        _say(f"{done.shared:,} of them: embeddings kept, as other pictures of the album have the same bytes")
    if done.still_there:
        _say(f"{done.still_there:,} of them: the file is still there, and the next extract of it would see it again")
    if done.removed_rebuild:
        _say("an unfinished rebuild may have held them, and was removed")
    if done.removed_aside:
        _say(f"{done.removed_aside:,} damaged shards that had been set aside may have held them, and were removed")


@contextmanager
def _writing(place: str, wait: bool) -> Iterator[tuple[Path, Lock]]:
    """An album's folder, locked for one who means to write."""
    from qvsplit.album import placed_from, shards_in
    from qvsplit.lock import locked
    from qvsplit.rebuild import finish

    folder = Path(place)
    if folder.is_file():
        raise UsageError(f"{place} is a file; give the album's folder")
    if not folder.is_dir() or (not shards_in(folder) and placed_from(folder) is None):
        raise UsageError(f"no album at {place}; give a folder of shards")
    with locked(folder, wait=wait, on_note=_say) as lock:
        finish(folder)
        yield folder, lock


def _verdict(picture: Any) -> str:
    if picture.skipped:
        return f"not compared: {picture.skipped}"
    if picture.max_difference is None:
        return "another number of tokens"
    bits = "same bits" if picture.same_bits else f"differs by {picture.max_difference:.1e} of the largest value"
    return f"{bits}, {'same' if picture.same_tokens else 'OTHER'} tokens"


# ----------------------------------------------------------------------------------------------------------- demo


@app.command()
@_reporting
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where its postcards and its album go.")] = Path(
        "qvsplit-demo"
    ),
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """See the whole way: no network, no GPU, every answer beside the truth.

    Copies a dozen drawn postcards into FOLDER/postcards, extracts them into FOLDER/album with the small model that
    lies in the package, and asks a handful of questions of every one from the album alone. That model knows such
    postcards and nothing else.
    """
    from qvsplit import demo as room
    from qvsplit.devices import give_back_freed_memory

    give_back_freed_memory()
    with _Progress(shown=sys.stderr.isatty() and not quiet) as progress:
        outcome = room.run(
            folder,
            device=device,
            watcher=progress.watcher(),
            on_asking=lambda answers: progress.next("answers", answers),
            on_answer=progress.advance,
        )
    if as_json:
        for one in outcome.told:
            print(json.dumps(one.to_json(), ensure_ascii=False))
        return
    from rich.console import Console

    from qvsplit.demo.table import postcards, story

    console = Console(file=sys.stdout, highlight=False)
    for table in postcards(outcome.told, outcome.photos, console):
        console.print(table)
    if not quiet:
        for line in story(outcome):
            console.print(line, markup=False, soft_wrap=True)
