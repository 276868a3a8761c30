"""What the library says in Python's words, the command line says in its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

import qvsplit
from qvsplit.cli import app
from qvsplit.commands.wording import OPTIONS, on_command_line, without_advice
from qvsplit.errors import UsageError

PACKAGE = Path(qvsplit.__file__).parent
FLAG = re.compile(r"(?:^|[\s(/`])--[a-z]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("make this one again with `rebuild=True`", "make this one again with --rebuild"),
        ("`item_timeout` must be at least 0.1", "--item-timeout must be at least 0.1"),
        ("`model` or another `dtype`", "--model or another --dtype"),
        ("with `dtype=bfloat16`, the", "with --dtype bfloat16, the"),
        ("into it with `out=my embeds`", "into it with --out my embeds"),
        ("language_model: give a path, not an empty text", "--language-model: give a path, not an empty text"),
        ("places: give the path of a store, not an empty text", "places: give the path of a store, not an empty text"),
        ("`qvsplit verify` with `sample=3`", "`qvsplit verify` with --sample 3"),
        ("`prefix_cache_tokens` must be at least 0", "`prefix_cache_tokens` must be at least 0"),
        ("`open_store(x)` and `rebuilt`, model and dtype", "`open_store(x)` and `rebuilt`, model and dtype"),
        ("", ""),
    ],
)
def test_options_are_flags_where_commands_have_them(text, expected):
    assert on_command_line(text) == expected
    assert on_command_line(UsageError(text)) == expected


def test_the_table_is_what_the_commands_have():
    has = {
        parameter.name
        for command in typer.main.get_command(app).commands.values()
        for parameter in command.params
        if any(opt == f"--{parameter.name.replace('_', '-')}" for opt in parameter.opts)
    }
    assert has - {"help", "help_all"} == OPTIONS


def literals(path: Path) -> list[tuple[int, str]]:
    return [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_no_message_of_the_library_names_a_flag():
    library = [path for path in sorted(PACKAGE.rglob("*.py"))
               if path.relative_to(PACKAGE).parts[0] not in ("commands", "cli.py", "demo")]  # fmt: skip
    assert len(library) > 150
    found = [
        (path, line, text.replace("pip install --upgrade", "")) for path in library for line, text in literals(path)
    ]
    assert [(path, line, text) for path, line, text in found if FLAG.search(text)] == []


def test_such_a_message_is_found(tmp_path):
    (tmp_path / "module.py").write_text(
        'x = 5\nsay(f"{x}: leave --model out", "--dtype {x}", "a-- b", "the `--prune`")\n'
    )
    found = {text for _, text in literals(tmp_path / "module.py") if FLAG.search(text)}
    assert found == {": leave --model out", "--dtype {x}", "the `--prune`"}


def test_advice_that_a_command_cannot_follow_is_left_out():
    assert without_advice("not compared: took longer than 60 s; `item_timeout` allows more") == (
        "not compared: took longer than 60 s"
    )
