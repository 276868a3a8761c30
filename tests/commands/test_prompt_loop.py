"""Questions typed on a terminal."""

from __future__ import annotations

import os
import signal

from tests.support.terminal import on_terminal, start_on_terminal


def test_the_prompt_loop_answers_until_an_empty_line(small_store):
    shown = on_terminal(
        ["ask", "--embeds", str(small_store), "--image", "coins.png", "--max-new-tokens", "4"],
        typed="What is it?\nIs it day or night?\n\n",
        TERM="xterm",
    )
    assert "1 image; type a question" in shown
    assert shown.count("coins.png") == 2
    assert "Traceback" not in shown


def test_sigterm_at_the_prompt_exits_143(small_store):
    pid, terminal = start_on_terminal(["ask", "--embeds", str(small_store)])
    shown = b""
    while not shown.rstrip().endswith(b"?"):
        shown += os.read(terminal, 4096)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert b"4 images; type a question" in shown
    assert os.waitstatus_to_exitcode(status) == 143
