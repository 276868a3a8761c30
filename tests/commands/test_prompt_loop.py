"""Questions typed on a terminal."""

from __future__ import annotations

import os
import signal
import time

from tests.support.terminal import on_terminal, python_on_terminal, read_until, start_on_terminal


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


PROMPTS = (
    "import sys\nfrom qvsplit.commands import prompt_loop\nfrom qvsplit.runtime import interrupts\n"
    "interrupts.install()\n"
    "while True:\n    try:\n        line = prompt_loop._typed()\n    except interrupts.Terminated:\n"
    "        interrupts.clear()\n        print('terminated', flush=True)\n        continue\n"
    "    if not line:\n        break\n    print('line', ascii(line), flush=True)\n"
)


def test_no_signal_at_the_prompt_is_lost():
    """Each comes as soon as the prompt is there, a little later each time: before, at, and after the wait begins."""
    pid, terminal = python_on_terminal(PROMPTS)
    read_until(terminal, "? ")
    for number in range(60):
        time.sleep(number * 5e-6)
        os.kill(pid, signal.SIGTERM if number % 2 else signal.SIGHUP)
        assert "terminated" in read_until(terminal, "? ", seconds=20)
    os.write(terminal, b"\n")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_a_line_can_be_edited_and_have_any_bytes():
    pid, terminal = python_on_terminal(PROMPTS)
    read_until(terminal, "? ")
    os.write(terminal, b"Wha\x7f\x7fho is  it?\n")
    read_until(terminal, "line 'Who is  it?'")
    os.write(terminal, "Où".encode() + b"\xff\n")
    read_until(terminal, "line 'O\\xf9\\udcff'")
    os.write(terminal, b"\x04")  # Ctrl-D
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_the_prompt_is_there_again_after_a_stop():
    pid, terminal = python_on_terminal(PROMPTS)
    read_until(terminal, "? ")
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    os.kill(pid, signal.SIGCONT)
    read_until(terminal, "? ")
    os.write(terminal, b"\n")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_no_escape_codes_where_the_terminal_shows_none(small_store):
    """Of which other terminals that is true is tested with `shows_escape_codes`."""
    shown = on_terminal(
        ["ask", "--embeds", str(small_store), "--max-new-tokens", "2"], typed="What is it?\n\n", TERM="dumb"
    )
    assert "coins.png" in shown
    assert "\x1b" not in shown
