"""The standard streams in odd states, each as a process of its own would have them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qvsplit.runtime.streams import shows_escape_codes

PREPARED = "import os, sys\nfrom qvsplit.runtime import streams\nstreams.prepare()\n"


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PREPARED + code], text=True, check=False, timeout=60, **options)


def shell(code: str, redirections: str) -> subprocess.CompletedProcess[str]:
    command = f'exec "$0" -c "$1" {redirections}'
    words = ["sh", "-c", command, sys.executable, PREPARED + code]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(closed, tmp_path):
    code = (
        f"stream = open({str(tmp_path / 'data')!r}, 'w')\nassert stream.fileno() > 2\n"
        "print('output')\nprint('said', file=sys.stderr)\nassert sys.stdin.read() == ''\nstreams.flush()\n"
    )
    assert shell(code, closed).returncode == 0
    assert (tmp_path / "data").read_text() == ""


@pytest.mark.parametrize(("where", "error"), [("/dev/full", "DiskError"), ("pipe", "ReaderGone")])
def test_what_becomes_of_the_output_is_an_error_of_its_own(where, error):
    if where == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(where, os.O_WRONLY)
    code = (
        "try:\n    print('output', flush=True)\nexcept Exception as error:\n    print(type(error).__name__, file=sys.stderr)\n"
        "streams.discard_output()\n"
    )
    done = python(code, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, f"{error}\n")


def test_a_run_goes_on_where_nobody_can_be_told():
    with open("/dev/full", "w") as full:
        code = "print('said', file=sys.stderr, flush=True)\nprint('done')"
        done = python(code, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_all_is_written_to_a_pipe_that_does_not_block():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = PREPARED + "print('x' * 1_000_000)\nprint('end')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    assert process.wait() == 0
    assert text == "x" * 1_000_000 + "\nend\n"


def test_all_is_read_from_a_pipe_that_does_not_block():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    code = PREPARED + "print('ready', flush=True)\nprint(sys.stdin.read())"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=reader, stdout=subprocess.PIPE, text=True)
    os.close(reader)
    assert process.stdout.readline() == "ready\n"
    os.write(writer, b"a question")
    os.close(writer)
    assert process.communicate(timeout=60)[0] == "a question\n"


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"\\xe9\\u5bb6\\U0001f5bc"), ("latin-1", b"\xe9\\u5bb6\\U0001f5bc")]
)
def test_escapes_begin_where_the_encoding_ends(encoding, printed):
    code = PREPARED + "print('é家🖼')\nprint('é家🖼', file=sys.stderr)"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed + b"\n", printed + b"\n")


@pytest.mark.parametrize(
    ("term", "no_color", "shown"),
    [("xterm", "", True), ("dumb", "", False), ("unknown", "", False), ("", "", False), ("xterm", "1", False)],
)
def test_escape_codes_are_for_terminals_that_know_them(monkeypatch, term, no_color, shown):
    class Terminal:
        closed = False

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert shows_escape_codes(Terminal()) is shown
    assert not shows_escape_codes(None)
