"""Every command with streams that are closed, full, left by their reader, or of a narrow encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvsplit.errors import unescaped
from tests.support.terminal import one_line

LIGHT = ["--help", "--version", "inspect STORE", "verify STORE", "compact STORE", "ask --embeds STORE --image x What?"]
CODES = {"ask --embeds STORE --image x What?": 2}
MADE_UP = "tests.support.made_up"  # no model is loaded: what is tried is what a command prints
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(
    words: str, redirections: str = "", module: str = "qvsplit", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run one command by a shell."""
    return subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m {module} {words} {redirections}"],
        capture_output=True, check=False, timeout=120, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("command", LIGHT)
def test_with_every_stream_closed(command, small_store):
    """Each stream alone is tried where it is handled, in tests/runtime/test_streams.py."""
    words = command.replace("STORE", str(small_store))
    assert shell(words, "<&- >&- 2>&-").returncode == CODES.get(command, 0)


def test_a_run_without_streams_keeps_its_rows_and_its_exit_code(some_photos, out):
    (some_photos / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    words = f"extract {some_photos} --model fake --out {out}"
    assert shell(words, "<&- >&- 2>&-", MADE_UP).returncode == 1  # an image has failed: this, and nothing else
    assert shell(words, "2>/dev/full", MADE_UP).returncode == 0
    assert b"4 ok" in shell(f"inspect {out}", "2>&-").stdout


def test_an_answer_without_streams(small_store):
    asked = shell(f"ask --embeds {small_store} --image coins.png What?", "2>&-", MADE_UP)
    assert (asked.returncode, asked.stdout.count(b"\n")) == (0, 1)


@pytest.mark.parametrize("command", ["--help", "--version", "inspect STORE"])
def test_output_that_cannot_be_written_exits_7_with_one_line(command, small_store):
    done = shell(command.replace("STORE", str(small_store)), ">/dev/full")
    assert (done.returncode, "disk is full" in one_line(done.stderr.decode())) == (7, True)


@pytest.mark.parametrize("command", ["--help", "inspect STORE"])
def test_a_reader_who_has_gone_exits_141_and_silently(command, small_store):
    words = [sys.executable, "-m", "qvsplit", *command.replace("STORE", str(small_store)).split()]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_bug_before_and_behind_the_commands_exits_70(tmp_path):
    (tmp_path / "typer.py").write_text("raise RuntimeError('a bug')")
    done = subprocess.run(
        [sys.executable, "-c", "from qvsplit.__main__ import main\nmain()"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (70, "RuntimeError: a bug")
    for broken in (
        "cli.app = lambda **more: 1 / 0",
        "cli.app = lambda **more: sys.exit(1)",
        "cli.streams.flush = lambda: 1 / 0",
    ):
        code = (
            "import sys\nfrom qvsplit import cli\nprepare = cli.streams.prepare\nsys.argv = ['qvsplit', '--version']\n"
        )
        code += f"def prepared():\n    prepare()\n    {broken}\ncli.streams.prepare = prepared\ncli.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (70, True), broken


def test_the_words_of_a_call_cannot_take_over_the_terminal():
    done = shell("'\x1b[31mnonsense'")
    assert done.returncode == 2
    assert b"\x1b" not in done.stderr and b"\\x1b[31mnonsense" in done.stderr


# --------------------------------------------------------------------------------------------------------- encodings


@pytest.fixture(scope="module")
def odd_names(photos, checkpoint, tmp_path_factory):
    """A store of images whose names are beyond ASCII; gives it and the names."""
    import shutil

    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions

    folder = tmp_path_factory.mktemp("odd")
    names = ["at 8.55\u202fPM.png", "a  b.png", "家族\u3000写真.png", "\x1b[31m\\x1b.png"]
    for name in names:
        shutil.copyfile(photos / "coins.png", folder / name)
    out = tmp_path_factory.mktemp("odd-store") / "embeds"
    extract_files([folder], out=out, options=ExtractOptions(model=str(checkpoint)))
    return out, names


def test_answers_in_an_encoding_that_lacks_their_characters(odd_names):
    out, names = odd_names
    words = f"ask --embeds {out} 'Où est 家?'"
    done = shell(words, module=MADE_UP, **C_LOCALE)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = [unescaped(line).split("\t") for line in done.stdout.decode("ascii").splitlines()]
    assert sorted(Path(line[1]).name for line in lines) == sorted(names)
    assert {line[3] for line in lines} == {"Où est 家?"}
    done = shell(words + " --json", module=MADE_UP, PYTHONIOENCODING="ascii")
    assert sorted(json.loads(line)["path"] for line in done.stdout.decode("ascii").splitlines()) == sorted(names)


def test_help_and_descriptions_in_ascii(odd_names):
    for words in ("ask --help", "extract --help", f"inspect {odd_names[0]}", f"verify {odd_names[0]}", "nönsense"):
        done = shell(words, PYTHONIOENCODING="ascii")
        assert (done.stdout + done.stderr).isascii() and b"Traceback" not in done.stderr, words


@pytest.mark.parametrize(
    ("question", "environment"),
    [("Où?".encode(), C_LOCALE), ("Où?".encode("latin-1"), {"PYTHONIOENCODING": "latin-1"})],
)
def test_questions_of_a_pipe_are_utf_8_or_in_the_encoding_of_the_locale(small_store, question, environment):
    words = [sys.executable, "-m", MADE_UP, "ask", "--embeds", small_store, "--json"]
    done = subprocess.run(words, input=question, capture_output=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["question"] for line in done.stdout.splitlines()} == {"Où?"}


def test_what_is_in_no_encoding_is_refused_in_one_line(small_store, tmp_path):
    words = [sys.executable, "-m", "qvsplit", "ask", "--embeds", small_store]
    for more, piped in (([], b"O\xf9?\n"), ([b"O\xf9?"], b""), (["What?", "--system", b"\xff"], b""),
                        (["What?", "--choices", b"yes,\xff"], b""), (["What?", "--stop", b"\xff"], b"")):  # fmt: skip
        done = subprocess.run([*words, *more], input=piped, capture_output=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert b"utf-8" in done.stderr.lower()
