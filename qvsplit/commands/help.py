"""Commands as Typer has them, with help and words for mistakes of our own.

A command is its function: the first part of its docstring is its help, and the lines under `Examples:` are what the
help ends with. Options with hidden=True are secondary: `--help-all` shows them, and shells complete them all the same.
Text of help is plain: nothing in it is markup.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from textwrap import shorten
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from qvsplit.commands.options import HELP, PANELS
from qvsplit.errors import UsageError
from qvsplit.runtime.streams import shows_escape_codes

SETTINGS = {"help_option_names": ["--help", "-h"], "max_content_width": 1000}  # as wide as the terminal


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        _show_secondary(context.command)
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        is_eager=True,
        expose_value=False,
        callback=_show_all,
        help="Show this message with all options, and exit.",
        rich_help_panel=HELP,
    ),
]


def with_help_all(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command with `--help-all`, as if its function had a parameter for it."""

    @functools.wraps(command)
    def taking(*args: Any, help_all: bool = False, **kwargs: Any) -> None:
        command(*args, **kwargs)

    taken = inspect.signature(command, eval_str=True)
    help_all = inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)
    taking.__signature__ = taken.replace(parameters=[*taken.parameters.values(), help_all])  # type: ignore[attr-defined]
    taking.__annotations__ = {}  # they have been evaluated: not once more
    return taking


def help_and_examples(command: Callable[..., None]) -> tuple[str, str]:
    """Give what the docstring of a command says, and its examples, a line each, under the word itself."""
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("\n\nExamples:\n")
    return text, f"\nExamples:\n{examples}" if examples else ""


class Command(TyperCommand):
    """A command of the app."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Give arguments and options, panel by panel."""
        return sorted(_without_pydantic(super().get_params(ctx)), key=_place)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of a command line. UsageError for a long option with one dash, which would mean another."""
        long = {name for param in self.params for name in param.opts if name.startswith("--")}
        for word in args[: args.index("--")] if "--" in args else args:
            if word[:1] == "-" and f"-{word.partition('=')[0]}" in long:
                raise UsageError(f"no such option {word}; did you mean -{word}?")
        return list(super().parse_args(ctx, args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help in panels."""
        _prepare_rich()
        TyperCommand.format_help(_as_shown(self), ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Give what completes a word, secondary options included."""
        _show_secondary(self)
        items = list(super().shell_complete(ctx, incomplete))
        for item in items:  # on one line, and not in full: shells show it beside the word
            item.help = item.help and shorten(item.help.partition(" [default")[0], 70, placeholder="...")
        return items


class Group(TyperGroup):
    """The app."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Give the options of the bare command."""
        return _without_pydantic(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command that the first word names. UsageError, with the nearest name, if there is none."""
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            raise UsageError(f"no such command {args[0]}{suggestion(args[0], self.commands) or _see(ctx)}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help in panels."""
        _prepare_rich()
        TyperGroup.format_help(_as_shown(self), ctx, formatter)


def mistake(error: Any) -> str:
    """Say in one line what Typer found wrong with the words of a command line; nothing where help was the answer."""
    context = getattr(error, "ctx", None)
    if hasattr(error, "possibilities"):
        name = error.option_name
        return f"no such option {name}{suggestion(name, error.possibilities or ()) or _see(context)}"
    said = " ".join(error.format_message().split()).rstrip(".")
    said = re.sub(r"'(--?[\w-]+)'", r"\1", said.removeprefix("Invalid value for ").removeprefix("Invalid value: "))
    return f"{said[:1].lower()}{said[1:]}{_see(context)}" if said else ""


def suggestion(word: str, known: Any) -> str:
    """Give `; did you mean …?` with what is nearest to `word`, or nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _see(context: Any) -> str:
    return f"; see `{context.command_path} --help`" if context is not None else ""


def _without_pydantic(params: list[Any]) -> list[Any]:
    """Have Typer's own flags off by default: where they are None it imports pydantic, 40 ms, to make of it None."""
    for param in params:
        if getattr(param, "is_flag", False) and param.default is None:
            param.default = False
        if "--help" in param.opts:
            param.rich_help_panel, param.metavar = HELP, ""
    return params


def _place(param: Any) -> int:
    """Give where in the help a parameter stands: arguments before all panels."""
    panel = getattr(param, "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def _show_secondary(command: Any) -> None:
    for param in command.params:
        param.hidden = False


def _as_shown(command: Any) -> Any:
    """Give a copy of a command whose texts rich prints as they are, each paragraph as wide as there is room."""
    from rich.markup import escape

    shown = copy.copy(command)
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    shown.help = escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
    shown.epilog = escape(command.epilog or "")
    shown.params = [copy.copy(param) for param in command.params]
    for param in shown.params:
        param.help = escape(param.help or "")
        # what Typer makes of the types of flags and arguments, <bool> and <list[str]>, helps nobody
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: ""
        elif param.is_flag:
            param.metavar = ""
        elif len(param.metavar or "") > 16:  # choices one below the other: what they mean has more room beside them
            param.metavar = param.metavar.replace("|", "|\n")
    return shown


def _prepare_rich() -> None:
    """Have Typer's help without escape codes where stdout does not show them, whatever the environment says."""
    from typer import rich_utils

    rich_utils.FORCE_TERMINAL = None if shows_escape_codes(sys.stdout) else False
