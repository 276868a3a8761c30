"""How far a run is: a bar on a pseudo-terminal, drawn, stopped and continued; or lines, by a clock set by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

import pytest

from qvsplit.output import progress
from qvsplit.output.meter import Meter
from qvsplit.output.progress import ProgressBar
from qvsplit.runtime import loading
from tests.support.terminal import python_on_terminal, read_until

BAR = (
    "import sys, time\nfrom qvsplit.output import progress\nprogress.LINE_SECONDS = 0\n"
    "with progress.ProgressBar() as bar:\n    bar.start('images', 3)\n    bar.advance()\n"
    "    bar.failure('a  b\\x1b.jpg', 'is torn')\n    bar.advance()\n    sys.stdin.readline()\n"
)
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bar_leaves_the_cursor_alone_and_comes_back_after_a_stop():
    pid, terminal = python_on_terminal(BAR, TERM="xterm")
    shown = read_until(terminal, "2/3")
    os.kill(pid, signal.SIGSTOP)  # as Ctrl-Z, which the kernel withholds where no shell is there to continue it
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(pid, signal.SIGCONT)
    again = read_until(terminal, "2/3")
    os.write(terminal, b"\n")
    shown += again + read_until(terminal, None)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    assert "failed: a  b\\x1b.jpg is torn" in shown
    assert "\x1b[2K" in shown  # it is drawn
    assert "\x1b[?25l" not in shown  # nobody would show the cursor again after Ctrl-Z or a kill


def test_nothing_is_drawn_from_the_background(monkeypatch):
    shown = _on_a_terminal(monkeypatch)
    monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp() + 1)
    with ProgressBar() as bar:
        bar.start("images", 3)
        bar.advance()
        bar.note("a note")
        assert shown.text == "qvsplit: a note\n"
        monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp())
        _wait_for(shown, "images")  # it is drawn again by itself


class _Shown:
    """A terminal that keeps what it was sent."""

    encoding = "utf-8"
    closed = False

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def _on_a_terminal(monkeypatch, columns: int = 100) -> _Shown:
    shown = _Shown()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp())
    return shown


def _wait_for(shown: _Shown, text: str) -> None:
    end = time.monotonic() + 20
    while text not in shown.text:
        assert time.monotonic() < end, shown.text
        time.sleep(0.01)


@pytest.mark.parametrize("columns", [80, 160])
def test_a_bar_is_as_wide_as_the_terminal(monkeypatch, columns):
    shown = _on_a_terminal(monkeypatch, columns)
    with ProgressBar() as bar:
        bar.start("images", 3)
    lines = re.sub(r"\x1b\[[0-9;]*[mK]", "", shown.text).strip("\n").split("\r")
    assert lines[0].startswith("images ━")
    assert {len(line) for line in lines} == {columns - 1}  # behind the last column is room for a blank


def test_a_bar_has_rate_and_time_left(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "Meter", lambda *of, **more: Meter(*of, clock=clock, **more))
    shown = _on_a_terminal(monkeypatch)
    with ProgressBar() as bar:
        bar.start("images", 4000)
        for _ in range(20):
            clock.now += 2
            bar.advance()
        clock.now += 1
        _wait_for(shown, "20/4,000")
        _wait_for(shown, "30/min")
        _wait_for(shown, "about 2 h 13 min left")


def test_stdout_goes_where_it_goes_while_a_bar_is_drawn(tmp_path):
    """`ask … > answers.txt` on a terminal: the answers are in the file."""
    code = (
        f"import os\nos.dup2(os.open({str(tmp_path / 'out')!r}, os.O_WRONLY | os.O_CREAT), 1)\n"
        "from qvsplit.output.progress import ProgressBar\nwith ProgressBar(prints=True) as bar:\n"
        "    bar.start('answers', 3)\n    bar.advance()\n    print('an answer', flush=True)\n    bar.advance()\n"
    )
    pid, terminal = python_on_terminal(code, TERM="xterm", NO_COLOR="")
    shown = read_until(terminal, None)
    os.waitpid(pid, 0)
    os.close(terminal)
    assert "2/3" in shown
    assert "an answer" not in shown
    assert (tmp_path / "out").read_text() == "an answer\n"


def test_no_bar_stands_between_answers_on_the_same_terminal():
    """But one is there while the model is loaded, and leaves nothing behind."""
    code = (
        "from qvsplit.output.progress import ProgressBar\nwith ProgressBar(prints=True) as bar:\n"
        "    bar.loading('tensors', 1000000, 2000000)\n    bar.loading('ready', 0, 0)\n"
        "    bar.start('answers', 3)\n    print('an answer', flush=True)\n    bar.advance()\n"
    )
    pid, terminal = python_on_terminal(code, TERM="xterm", NO_COLOR="")
    shown = read_until(terminal, None)
    os.waitpid(pid, 0)
    os.close(terminal)
    assert "loading model: tensors" in shown
    assert "1.00 MB of 2.00 MB" in shown
    assert shown.endswith("\r\x1b[1A\x1b[2Kan answer\r\n")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_lines_in_place_of_a_bar_where_escape_codes_are_not_shown(environment):
    pid, terminal = python_on_terminal(BAR, **environment)
    shown = read_until(terminal, "images 2 of 3")
    os.write(terminal, b"\n")
    shown += read_until(terminal, None)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    assert "\x1b" not in shown
    assert re.search(rf"^{STAMP} images 2 of 3\r$", shown, re.MULTILINE)


def test_a_bar_that_was_asked_for_is_drawn_without_colours_too(monkeypatch):
    shown = _on_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with ProgressBar("bar") as bar:
        bar.start("images", 3)
    assert re.search(r"images +0/3", shown.text)
    assert "\x1b[3" not in shown.text


def test_lines_come_once_a_minute_and_not_before_the_first_is_over(capsys):
    """A short run says nothing: cron mails every line. The minute is that of the whole run, not of its phases."""
    clock = Clock()
    lines = progress._Lines(60.0, progress._as_line, clock=clock)
    meter = Meter("images", 4000, clock=clock)
    lines._meter = meter
    for second in range(1, 301):
        clock.now += 1
        if second % 2 == 0:
            meter.advance()
        if second == 150:
            lines._meter = meter = Meter("answers", 100, clock=clock)
        lines.tick()
        said = capsys.readouterr().err
        assert (said != "") == (second % 60 == 0)
        if second == 120:
            assert re.fullmatch(rf"{STAMP} images 60 of 4,000, 30/min, about 2 h 11 min left\n", said)
        if second == 180:
            assert re.fullmatch(rf"{STAMP} answers 15 of 100, 30/min, about 3 min left\n", said)


def test_a_line_comes_also_where_nothing_comes_to_an_end(monkeypatch):
    """A prefill that takes an hour: what was said last is said again."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    shown = _Shown()
    shown.isatty = lambda: False
    monkeypatch.setattr(sys, "stderr", shown)
    with ProgressBar("plain") as bar:
        bar.start("answers", 5)
        _wait_for(shown, "answers 0 of 5\n")
    assert re.match(rf"{STAMP} answers 0 of 5\n", shown.text)
    before = shown.text
    bar.advance()
    bar.stop()
    assert shown.text == before  # nothing after the end


def test_json_is_an_object_a_line(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress, "Meter", lambda *of, **more: Meter(*of, clock=clock, **more))
    with ProgressBar("json") as bar:
        bar.loading(loading.LIBRARIES, 0, 0)
        bar.loading(loading.TENSORS, 3, 7)
        bar.loading(loading.READY, 0, 0)
        bar.start("images", 3)
        for _ in range(2):
            clock.now += 10
            bar.advance()
        clock.now += 1
        bar.note("a note")
    printed = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line != "qvsplit: a note"]
    assert all(re.fullmatch(STAMP, one.pop("time")) for one in printed)
    whole = [one for one in printed if one["done"]]
    assert [one["phase"] for one in printed if not one["done"]] == ["loading model", "images"]  # as each begins
    assert whole == [
        {
            "type": "progress", "phase": "loading model", "part": "tensors", "done": 3, "total": 7, "unit": "bytes",
            "rate": None, "seconds_left": None,
        },
        {
            "type": "progress", "phase": "images", "done": 2, "total": 3, "unit": "images", "rate": 0.1,
            "seconds_left": 9.0,
        },
    ]  # fmt: skip


def test_counting_goes_on_behind_loading(monkeypatch, capsys):
    """The encoder is loaded when the first image needs it: that is no part of what images take."""
    clock = Clock()
    monkeypatch.setattr(progress, "Meter", lambda *of, **more: Meter(*of, clock=clock, **more))
    monkeypatch.setattr(progress, "active_seconds", clock)
    with ProgressBar("json") as bar:
        bar.start("images", 100)
        for _ in range(5):
            clock.now += 2
            bar.advance()
        bar.loading(loading.TENSORS, 0, 7)
        clock.now += 1000
        bar.loading(loading.READY, 0, 0)
        for _ in range(5):
            clock.now += 2
            bar.advance()
        clock.now += 1
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["phase"], last["done"], last["rate"]) == ("images", 10, 0.5)


@pytest.mark.parametrize("bar", [ProgressBar("none"), ProgressBar("json", shown=False), ProgressBar(shown=False)])
def test_nothing_where_nothing_is_to_be_shown(bar, capsys):
    with bar:
        bar.loading(loading.TENSORS, 3, 7)
        bar.loading(loading.READY, 0, 0)
        bar.start("images", 1)
        bar.advance()
        bar.note("a note")
    assert capsys.readouterr().err == "qvsplit: a note\n"


def test_a_closed_stderr_ends_nothing():
    """Nobody is told, and nothing is lost for want of somebody who listens."""
    code = (
        "import os\nos.close(2)\nfrom qvsplit.runtime import streams\nstreams.prepare()\n"
        "from qvsplit.output import progress\nprogress.LINE_SECONDS = 0\n"
        "with progress.ProgressBar('plain') as bar:\n    bar.start('images', 2)\n    bar.advance()\n"
        "    bar.note('a note')\nprint('done')\n"
    )
    pid, terminal = python_on_terminal(code)
    shown = read_until(terminal, None)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    assert shown == "done\r\n"
