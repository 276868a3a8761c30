"""Help, short forms, choices, suggestions and completion, as users of other command lines know them."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from qvsplit.cli import COMMANDS, app
from qvsplit.commands.help import Command
from qvsplit.commands.options import PANELS, complete_device, one_of, parse_device, some_of
from qvsplit.errors import UsageError
from tests.support.forked import LIGHT_COMMANDS, run_program
from tests.support.processes import run_process
from tests.support.terminal import on_terminal, one_line

GROUP = typer.main.get_command(app)
PARAMETERS = [
    (f"{name} {parameter.opts[0]}", parameter)
    for name, command in GROUP.commands.items()
    for parameter in command.params
    if parameter.param_type_name == "option"
]


@functools.cache
def help_of(*words: str, columns: int = 100) -> str:
    """What a command prints as help into a pipe."""
    done = run_program(*words, imports=LIGHT_COMMANDS, environment=os.environ | {"COLUMNS": str(columns)})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --------------------------------------------------------------------------------------------------- every command


def test_every_option_stands_in_a_panel_and_says_what_it_does():
    assert len(PARAMETERS) > 150
    for name, parameter in PARAMETERS:
        assert parameter.rich_help_panel in PANELS, name
        assert parameter.help, name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_short_form_means_one_thing(name):
    """The same letter is the same option in every command that has it."""
    letters = {"-e": "--embeds", "-m": "--model", "-o": "--out", "-i": "--image", "-q": "--quiet", "-0": "--format"}
    for parameter in GROUP.commands[name].params:
        for short in (opt for opt in parameter.opts if re.fullmatch(r"-\w", opt)):
            assert short in letters
            assert short == "-0" or letters[short] in parameter.opts
        for long, short in ((long, short) for short, long in letters.items() if long != "--format"):
            assert long not in parameter.opts or short in parameter.opts


def examples_of(name: str) -> list[str]:
    """The lines of the examples of a help, without what explains them."""
    lines = (GROUP.commands[name].epilog or "").strip().splitlines()
    assert lines[:1] == ["Examples:"], name
    return [line.strip() for line in lines[1:] if not line.strip().startswith("#")]


def commands_of(line: str) -> list[list[str]]:
    """The words behind each `qvsplit` of a line, as a shell reads them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;<>"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words[1:] for words in commands if words[:1] == ["qvsplit"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_examples_that_can_be_typed(name):
    examples = examples_of(name)
    assert examples
    for example in examples:
        found = commands_of(example)
        assert name in [command for command, *_ in found]
        for command, *words in found:
            context = typer.main.get_command(app).commands[command].make_context(command, words)  # parses, runs nothing
            assert context.params
    assert any(example in help_of(name, "-h", columns=200) for example in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_secondary_options_are_shown_by_help_all_alone(name):
    command = GROUP.commands[name]
    hidden = {param.opts[0] for param in command.params if param.param_type_name == "option" and param.hidden}
    primary = {param.opts[0] for param in command.params if param.param_type_name == "option"} - hidden
    assert len(primary) <= 14
    short, full = help_of(name, "--help", columns=160), help_of(name, "--help-all", columns=160)
    assert short == help_of(name, "-h", columns=160)
    for option in primary | hidden:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", full), option
        row = re.search(rf"(?m)^[│|] {option}[ ,]", short)
        assert bool(row) == (option in primary), option


# ------------------------------------------------------------------------------------------------- where it is shown


def test_help_is_as_wide_as_there_is_room():
    for columns in (60, 100, 150):
        lines = help_of("extract", "--help", columns=columns).splitlines()
        assert max(map(len, lines)) == columns


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
@pytest.mark.parametrize("words", [["--help"], ["ask", "--help-all"]])
def test_help_has_no_escape_codes_where_they_are_refused(words, environment):
    assert "\x1b" not in on_terminal(words, **environment | {"FORCE_COLOR": "1", "COLUMNS": "120"})


def test_help_has_colours_on_a_terminal_and_none_in_a_pipe():
    assert "\x1b[" in on_terminal(["ask", "--help"], TERM="xterm-256color", NO_COLOR="")
    colours = {"TERM": "xterm-256color", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true"}
    assert "\x1b" not in run_process("ask", "--help", env=os.environ | colours).stdout


def test_what_stands_in_brackets_is_no_markup():
    assert "[default: embeds]" in help_of("inspect", "--help")
    assert "[default: cuda where there is one]" in help_of("demo", "--help", columns=150)


def test_what_stands_in_brackets_in_the_text_of_a_command_is_no_markup(capsys):
    one = typer.Typer(rich_markup_mode="rich")
    one.command(cls=Command, help="Give [bold] things.", epilog="\nExamples:\n  one '[dim]'")(lambda: None)
    one(["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "Give [bold] things." in shown and "one '[dim]'" in shown


@pytest.mark.parametrize("words", [["--help"], ["extract", "--help-all"], ["ask", "--help-all"]])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_in_a_narrow_encoding(words, encoding):
    done = subprocess.run(
        [sys.executable, "-m", "qvsplit", *words],
        capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.stderr == b""
    assert b"Usage:" in done.stdout
    assert b"\\u" not in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_of_a_help_is_cut_on_an_ordinary_terminal(name):
    assert "…" not in help_of(name, "--help-all", columns=80)


# ----------------------------------------------------------------------------------------------- choices and mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extarct", "x"], "no such command extarct; did you mean extract?"),
        (["nothing-like-it"], "no such command nothing-like-it; see `qvsplit --help`"),
        (["extract", "--emebds", "x", "y"], "no such option --emebds; did you mean --embeds?"),
        (["extract", "--storage-dtipe", "int8", "y"], "no such option --storage-dtipe; did you mean --storage-dtype?"),
        (["ask", "-embeds", "x", "y"], "no such option -embeds; did you mean --embeds?"),
        (["ask", "-model=x", "y"], "no such option -model=x; did you mean --model=x?"),
        (["ask", "-z"], "no such option -z; see `qvsplit ask --help`"),
        (["--nonsense"], "no such option --nonsense; see `qvsplit --help`"),
        (["extract"], "missing argument 'PATH'; see `qvsplit extract --help`"),
        (["inspect", "a", "b"], "got unexpected extra argument(s) (b); see `qvsplit inspect --help`"),
        (["ask", "--dtype"], "option --dtype requires an argument"),
        (["ask", "--dtype", "bfloat17", "x"],
         "--dtype bfloat17: give float32, bfloat16 or float16; did you mean bfloat16?"),
        (["ask", "--dtype", "int8", "x"], "--dtype int8: give float32, bfloat16 or float16"),
        (["extract", "--gif", "vidoe", "x"], "--gif vidoe: give image or video; did you mean video?"),
        (["extract", "--kernels", "fussed", "x"], "--kernels fussed: give fused or reference; did you mean fused?"),
        (["ask", "--fail-on", "blok", "x"], "--fail-on blok: give info, warn or block; did you mean block?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_was_meant(run_cli, words, said):
    code, out, line = run_cli(*words)
    assert (code, out, one_line(line)) == (2, "", f"qvsplit: {said}")


def test_a_number_that_is_none_is_one_line(run_cli):
    code, _, said = run_cli("extract", "x", "--limit", "ten")
    assert code == 2
    assert one_line(said).startswith("qvsplit: --limit: ")


def test_words_behind_two_dashes_are_no_options(run_cli, tmp_path):
    code, _, said = run_cli("ask", "--embeds", tmp_path / "nowhere", "--", "-model")
    assert (code, "no store or shard at" in one_line(said)) == (2, True)


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [
        ("dtype", "bf16", "bfloat16"),
        ("dtype", "FP16", "float16"),
        ("dtype", "half", "float16"),
        ("dtype", "fp32", "float32"),
        ("storage_dtype", "bf16", "bfloat16"),
        ("storage_dtype", "int8", "int8"),
        ("device", "gpu", "cuda"),
        ("device", "gpu:1,cpu", "cuda:1,cpu"),
        ("device", "CUDA:0", "cuda:0"),
        ("device", "abacus", "abacus"),
    ],
)
def test_other_names_are_understood(option, given, meant):
    words = [f"--{option.replace('_', '-')}", given, "x"]
    context = typer.main.get_command(app).commands["extract"].make_context("extract", words)
    assert context.params[option] == meant


def test_several_of_some_choices():
    some = some_of("--allow", "uncertain", "error")
    assert some["parser"]("error,uncertain") == "error,uncertain"
    assert some["autocompletion"]("uncertain,") == ["uncertain,error"]
    with pytest.raises(UsageError, match="did you mean error"):
        some["parser"]("uncertain,eror")


def test_choices_are_shown_and_completed():
    one = one_of("--size", "small", "large", aliases={"big": "large"})
    assert one["metavar"] == "small|large"
    assert one["autocompletion"]("s") == ["small"]
    assert one["parser"]("BIG") == "large"
    shown = re.sub(r"[^\w|]", "", "".join(re.findall("[a-z0-9]+[|]| int8 ", help_of("extract", "--help-all"))))
    assert "float32|bfloat16|float16|int8" in shown
    assert (complete_device("c"), parse_device("gpu:0")) == (["cpu", "cuda"], "cuda:0")


# --------------------------------------------------------------------------------------------------------- completion


def completed(line: str) -> list[str]:
    """What bash is given for the last word of a line."""
    words = line.split(" ")
    environment = {"_QVSPLIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "qvsplit"], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_words_are_completed():
    assert completed("qvsplit ex") == ["extract"]
    assert completed("qvsplit ask --dtype b") == ["bfloat16"]
    assert set(completed("qvsplit extract --video")) == {"--video-max-pixels", "--video-max-tokens"}  # secondary, too


def test_a_shell_is_told_what_completes_words():
    command = f"{sys.executable} -m qvsplit --show-completion; echo $?"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")
    assert "_QVSPLIT_COMPLETE=complete_bash" in done.stdout


def test_descriptions_beside_completed_words_are_of_one_line():
    environment = {"_QVSPLIT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "qvsplit extract --"}
    done = subprocess.run(
        [sys.executable, "-m", "qvsplit"], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    lines = done.stdout.splitlines()
    assert len(lines) > 20
    assert all('":"' in line for line in lines)
