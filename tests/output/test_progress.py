"""A progress bar on a pseudo-terminal: drawn, stopped and continued, or a line now and then."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from qvsplit.output import progress
from qvsplit.output.progress import ProgressBar
from tests.support.terminal import python_on_terminal, read_until

BAR = (
    "import sys, time\nfrom qvsplit.output import progress\nprogress.LINE_SECONDS = 0\n"
    "with progress.ProgressBar(shown=True) as bar:\n    bar.start('images', 3)\n    bar.advance()\n"
    "    bar.failure('a  b\\x1b.jpg', 'is torn')\n    bar.advance()\n    sys.stdin.readline()\n"
)


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
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "shows_escape_codes", lambda stream: True)
    monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp() + 1)
    shown = _Shown()
    monkeypatch.setattr(sys, "stderr", shown)
    with ProgressBar(shown=True) as bar:
        bar.start("images", 3)
        bar.advance()
        bar.note("a note")
        assert shown.text == "qvsplit: a note\n"
        monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp())
        end = time.monotonic() + 20
        while "images" not in shown.text:  # it is drawn again by itself
            assert time.monotonic() < end
            time.sleep(0.01)


class _Shown:
    """A terminal that keeps what it was sent."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_lines_in_place_of_a_bar_where_escape_codes_are_not_shown(environment):
    pid, terminal = python_on_terminal(BAR, **environment)
    shown = read_until(terminal, "2 of 3 images")
    os.write(terminal, b"\n")
    shown += read_until(terminal, None)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    assert "\x1b" not in shown
    assert "qvsplit: 1 of 3 images" in shown


def test_no_bar_where_nothing_is_shown(capsys):
    with ProgressBar(shown=False) as bar:
        bar.start("images", 1)
        bar.advance()
        bar.note("a note")
    assert capsys.readouterr().err == "qvsplit: a note\n"
