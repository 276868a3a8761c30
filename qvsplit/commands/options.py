"""Options that several commands take, and what they mean."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import typer

from qvsplit.errors import UsageError

DEFAULT_STORE = "embeds"

# The panels of `--help`, in which every option of every command stands
INPUT = "Input"
MODEL = "Model"
OUTPUT = "Output"
INCREMENTAL = "Incremental"
PERFORMANCE = "Performance"
SAMPLING = "Sampling"

Model = Annotated[
    str | None,
    typer.Option(
        help="The checkpoint: a folder or a hub name, NAME@REVISION for a revision, or demo for the small one in the "
        "package [default: the store's own, else QVSPLIT_MODEL, else Qwen/Qwen2-VL-2B-Instruct].",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or cuda:N [default: cuda where there is one].", show_default=False, rich_help_panel=MODEL
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, one object a line.", rich_help_panel=OUTPUT)]
OutputFormat = Annotated[
    Literal["text", "tsv", "jsonl", "paths", "paths0"] | None,
    typer.Option(
        "--format",
        help="text for people, tsv with 8 fixed columns, jsonl (as --json), paths of items one a line, or paths0 with "
        "a NUL after each [default: text].",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Absolute = Annotated[
    bool,
    typer.Option(
        "--absolute",
        help="Print absolute paths, in place of paths relative to the current folder.",
        rich_help_panel=OUTPUT,
    ),
]
Allow = Annotated[
    str | None,
    typer.Option(
        metavar="VERDICT,...",
        help="Items with these verdicts do not trip --fail-on: uncertain, error.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Wait = Annotated[
    bool,
    typer.Option("--wait", help="If another run is writing the store, wait for it.", rich_help_panel=INCREMENTAL),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only results, errors, failures and warnings.", rich_help_panel=OUTPUT),
]
# For commands that read one store, and for those that write one: an argument, or the option of the same meaning
StoreArgument = Annotated[
    str | None,
    typer.Argument(metavar="STORE|SHARD", help="A folder, a shard or a glob [default: embeds].", show_default=False),
]
StoreOption = Annotated[
    str | None,
    typer.Option("--embeds", metavar="STORE|SHARD", help="Another way to give the store.", show_default=False),
]
FolderArgument = Annotated[
    str | None,
    typer.Argument(metavar="STORE", help="The store's folder [default: embeds].", show_default=False),
]
FolderOption = Annotated[
    str | None,
    typer.Option("--embeds", metavar="STORE", help="Another way to give the store.", show_default=False),
]


def store_place(argument: str | None, option: str | None) -> str:
    """Give the store that was named, as an argument or by --embeds. UsageError if both name one."""
    if argument is not None and option is not None and argument != option:
        raise UsageError(f"two stores are given, {argument} and --embeds {option}; give one of them")
    return argument or option or DEFAULT_STORE


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str, option: str) -> float:
    """Give `2h30m`, `90m`, `45s` or a number in seconds. UsageError, naming `option`, for other text."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise UsageError(f"{option} {text}: give a time such as 90m, 2h30m or 45s")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds
