"""Lines typed on a terminal: what they mean, how they are edited, and what ends what."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import struct
import termios
import time

import pytest
import typer

from qvsplit.commands.chat_items import ChatItems, readings, typeable
from qvsplit.commands.chat_loop import ChatLoop
from qvsplit.commands.chat_words import EXIT, HELP, IMAGE, NEW, Line, help_lines, meaning_of
from qvsplit.commands.line_history import MOST_KEPT, KeptHistory, history_file
from qvsplit.errors import DiskError, RequestError, StoreDamaged, UsageError
from qvsplit.output.printer import TEXT, AnswerPrinter, PrintOptions
from qvsplit.store.opening import open_store, read_store
from tests.support import forked, rows
from tests.support.chat_loops import GivenLines, session_of
from tests.support.memory_storage import MemoryStorage
from tests.support.processes import wait_until_stopped
from tests.support.terminal import Typist, exit_code, on_terminal, python_on_terminal

# ----------------------------------------------------------------------------------------------- what a line means


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("  Is there a dog? ", Line("", "Is there a dog?")),
        ("", Line("", "")),
        ("//etc is what?", Line("", "/etc is what?")),
        ("two\n/lines", Line("", "two\n/lines")),
        ("/image a b.jpg ", Line(IMAGE, "a b.jpg")),
        ("/image", Line(IMAGE, "")),
        ("/?", Line(HELP, "")),
        ("/quit", Line(EXIT, "")),
        ("/clear", Line(NEW, "")),
        ("/system one\ntwo", Line("/system", "one\ntwo")),
    ],
)
def test_what_a_line_means(typed, meant):
    assert meaning_of(typed, remembers=True) == meant


@pytest.mark.parametrize(
    ("typed", "said"),
    [("/imgae x", "did you mean /image?"), ("/xyzzy", "/help lists them"), ("/etc/passwd", "// begins a question")],
)
def test_a_command_that_there_is_not(typed, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        meaning_of(typed, remembers=True)


def test_what_is_of_no_use_to_independent_questions_is_no_command_of_theirs():
    with pytest.raises(UsageError, match="no such command /new"):
        meaning_of("/new", remembers=False)
    alone, together = (help_lines(remembers=remembers, is_edited=True) for remembers in (False, True))
    assert "stands alone" in alone[0] and not any("/new" in line for line in alone)
    assert "follows those before it" in together[0] and any("/new" in line for line in together)
    assert any("Alt-Enter" in line for line in together)
    assert not any("Alt-Enter" in line for line in help_lines(remembers=True, is_edited=False))


@pytest.mark.parametrize("typed", ["/new What colour is it?", "/exit now", "/? me"])
def test_text_behind_a_command_that_takes_none_is_not_dropped(typed):
    with pytest.raises(UsageError, match="takes nothing behind it"):
        meaning_of(typed, remembers=True)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a b.jpg", ["a b.jpg"]),
        ("it's.jpg", ["it's.jpg"]),
        (r"my\ photo.jpg", [r"my\ photo.jpg", "my photo.jpg"]),
        ("'a b.jpg'", ["'a b.jpg'", "a b.jpg"]),
        ("~/a.jpg", ["~/a.jpg", "/home/me/a.jpg"]),
    ],
)
def test_a_name_may_be_written_as_in_a_shell(typed, meant, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert readings(typed) == meant


@pytest.mark.parametrize("name", [" lead.png", "trail.png ", "plain one.png", "'q'.jpg"])
def test_what_completes_can_be_typed(name):
    assert name in readings(typeable(name).strip())


# ---------------------------------------------------------------------------------------------------- what goes on


@pytest.fixture
def answered(postcards, capsys):
    """Answer lines; gives the code that it ended with, what was printed, what was said, and what was asked about."""

    def run(*lines, are_typed=False, store=None, quiet=False, errors=None):
        chosen = ChatItems(session_of(store or open_store(postcards), **(errors or {})), [], quiet=quiet)
        code = 0
        try:
            given = GivenLines(*lines, are_typed=are_typed)
            ChatLoop(chosen, PrintOptions(TEXT), remembers=True, lines=given).run()
        except typer.Exit as end:
            code = end.exit_code
        return code, *capsys.readouterr(), chosen.items

    return run


def test_a_question_about_several_images_that_fails_is_an_error(answered):
    errors = {"never": RequestError("not that")}
    code, out, said, _ = answered("/image *side*", "one", "never", "two", errors=errors)
    assert code == 3
    assert out.count("not that") == 2 and out.count('"u:two"') == 2
    assert said == "qvsplit: not that; /new begins without the earlier answers\n"


@pytest.mark.parametrize(("error", "are_typed"), [(DiskError("full"), True), (StoreDamaged("torn"), False)])
def test_what_no_other_question_would_be_spared_ends_it(answered, error, are_typed):
    with pytest.raises(type(error)):
        answered("/image seaside.jpg", "never", "two", are_typed=are_typed, errors={"never": error})


@pytest.mark.parametrize("error", [RequestError("no"), StoreDamaged("torn")])
def test_on_a_terminal_another_question_follows(answered, error):
    code, out, said, _ = answered("/image seaside.jpg", "never", "two", are_typed=True, errors={"never": error})
    assert (code, out.count("u:two")) == (0, 1)
    assert str(error) in said


def test_quiet_is_quiet(answered):
    lines = ("/image seaside.jpg", "one", "/new")
    said, quiet = (answered(*lines, are_typed=True, quiet=quiet)[2].strip() for quiet in (False, True))
    assert said.count("qvsplit:") == 3
    assert quiet == ""


def test_ctrl_c_keeps_what_was_answered_of_several(answered, monkeypatch):
    printed, print_answer = [], AnswerPrinter.answer

    def interrupted(self, answer):
        printed.append(answer)
        if len(printed) == 2:
            raise KeyboardInterrupt
        print_answer(self, answer)

    monkeypatch.setattr(AnswerPrinter, "answer", interrupted)
    _, _, said, items = answered("/image *side*", "one", are_typed=True)
    assert "stopped" in said
    assert [len(one.earlier) for one in items] == [1, 0]


def test_names_say_the_root_where_there_are_several(answered):
    images = [rows.item("a.png", root="/one"), rows.item("b.png", root="/two")]
    store = read_store(rows.write_store(MemoryStorage(), images))
    _, out, _, _ = answered("/image a.png", "one", "/image *.png", "two", store=store)
    alone, *several = out.split("\n\n")
    assert "/one" not in alone
    assert ["/one/a.png" in several[0], "/two/b.png" in several[1]] == [True, True]


# --------------------------------------------------------------------------------------------------------- history


@pytest.mark.parametrize(
    ("state", "home", "file"),
    [
        ("/state", "/home/me", "/state/qvsplit/history"),
        ("rel", "/home/me", "/home/me/.local/state/qvsplit/history"),
        ("", "not/absolute", None),
    ],
)
def test_where_lines_are_kept(monkeypatch, state, home, file):
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("HOME", home)
    assert history_file() == file


def test_a_history_of_others_rights_and_of_any_length(tmp_path):
    file = tmp_path / "history"
    line = "x" * 1000
    file.write_text("".join(f"\n# then\n+{number} {line}\n" for number in range(3 * MOST_KEPT // 1000)))
    file.chmod(0o644)
    KeptHistory(str(file)).store_string("one\ntwo")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = [*KeptHistory(str(file)).load_history_strings()]
    assert kept[0] == "one\ntwo"
    assert all(one.endswith(line) for one in kept[1:])
    assert MOST_KEPT - 2000 < file.stat().st_size <= MOST_KEPT
    assert [*KeptHistory(str(file)).load_history_strings()] == kept


def test_a_pipe_in_its_place_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / "history")
    history = KeptHistory(str(tmp_path / "history"))
    history.store_string("one")
    assert [*history.load_history_strings()] == []


# --------------------------------------------------------------------------------------------- without escape codes


def test_the_loop_of_ask_answers_until_ctrl_d_and_an_empty_line_is_nothing(small_store):
    """Of which other terminals it is true that they show no escape codes is tested with `shows_escape_codes`."""
    shown = on_terminal(
        ["ask", "--embeds", str(small_store), "--image", "coins.png", "--max-new-tokens", "4"],
        typed="What is it?\n\n/image chelsea.png\n/imag x\nIs it day or night?\n\x04",
        prompt=".png>",
        start=forked.start_on_terminal,
        TERM="dumb",
    )
    assert "coins.png; type a question" in shown
    assert shown.count("coins.png> ") == 3
    assert shown.count("chelsea.png> ") == 3
    assert "no such command /imag; did you mean /image?" in shown
    assert "Traceback" not in shown
    assert "\x1b" not in shown


READ = (
    "import sys\nfrom qvsplit.commands import chat_lines\nfrom qvsplit.runtime import interrupts, streams\n"
    "streams.prepare()\ninterrupts.install()\n"
    "lines = chat_lines.open_lines(lambda text, files: [], remembers=True)\n"
    "while True:\n    try:\n        line = lines.read('ready> ')\n    except interrupts.Terminated:\n"
    "        interrupts.clear()\n        print('terminated', flush=True)\n        continue\n"
    "    if not line:\n        break\n    print('line', ascii(line), flush=True)\n"
)
BOTH = pytest.mark.parametrize("kind", ["dumb", "xterm"])


@pytest.fixture
def read_lines(tmp_path):
    """Start what reads lines, as a terminal of this kind allows."""

    def start(kind: str, start=forked.python_on_terminal, **environment: str) -> Typist:
        environment = {"TERM": kind, "NO_COLOR": "", "XDG_STATE_HOME": str(tmp_path)} | environment
        typist = Typist(start(READ, **environment))
        typist.read("ready>")
        return typist

    return start


@BOTH
def test_no_signal_at_the_prompt_is_lost(read_lines, kind):
    """Each comes as soon as the prompt is there, a little later each time: before, at, and after the wait begins."""
    typist = read_lines(kind)
    for number in range(60):
        time.sleep(number * 5e-6)
        os.kill(typist.pid, signal.SIGTERM if number % 2 else signal.SIGHUP)
        typist.read("terminated")
        typist.read("ready>")
    typist.type("\n")
    assert typist.ended() == 0


@BOTH
def test_a_line_can_be_edited_and_have_any_bytes(read_lines, kind):
    typist = read_lines(kind)
    typist.type("Wha\x7f\x7fho is  it?\n")
    typist.read("line 'Who is  it?'")
    typist.type("Où".encode() + b"\xff\n")
    typist.read("line 'O\\xf9\\udcff'")
    assert typist.leave("ready>") == 0


@BOTH
def test_the_prompt_is_there_again_after_a_stop(read_lines, kind):
    typist = read_lines(kind)
    os.kill(typist.pid, signal.SIGSTOP)
    wait_until_stopped(typist.pid)
    os.kill(typist.pid, signal.SIGCONT)
    typist.read("ready>")
    typist.type("\n")
    assert typist.ended() == 0


def test_lines_are_kept_for_the_next_time_and_only_for_the_user(read_lines, tmp_path):
    typist = read_lines("xterm")
    typist.line("one\x1b\rtwo", "line 'one\\ntwo'")  # Alt-Enter
    typist.line("three", "line 'three'")
    assert typist.leave("ready>") == 0
    kept = tmp_path / "qvsplit" / "history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    typist = read_lines("xterm")
    typist.line("\x1b[A\x1b[A\x1b[B", "line 'three'")  # up, up, down
    typist.read("ready>")
    typist.line("\x12TW\r", "line 'one\\ntwo'")  # Ctrl-R, whatever the case
    assert typist.leave("ready>") == 0


def test_where_lines_cannot_be_kept_nobody_is_told(read_lines, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    typist = read_lines("xterm", NO_COLOR="1", XDG_STATE_HOME=str(tmp_path / "file"))
    typist.type("one\r")
    shown = typist.read("line 'one'")
    typist.type("\x1b[A\r")
    shown += typist.read("line 'one'")
    assert typist.leave("ready>") == 0
    assert "Error" not in shown
    assert not re.search(r"\x1b\[[0-9;]*m", shown)  # NO_COLOR: the cursor moves, and nothing has a colour


@BOTH
def test_an_encoding_of_few_characters(read_lines, kind):
    typist = read_lines(kind, python_on_terminal, PYTHONIOENCODING="ascii")
    typist.line("Où?", "line 'O\\xf9?'", is_edited=kind == "xterm")
    typist.type("\n")
    assert typist.ended() == 0


# ------------------------------------------------------------------------------------------------ the loop, edited


@pytest.fixture
def loop(postcards, tmp_path):
    """Start a loop over the postcards, on a terminal of this kind; gives it at its prompt."""

    def start(kind: str = "xterm") -> Typist:
        environment = {"TERM": kind, "NO_COLOR": "", "XDG_STATE_HOME": str(tmp_path)}
        code = f"from tests.support import chat_loops\nchat_loops.main({str(postcards)!r})"
        return Typist(forked.python_on_terminal(code, **environment))

    return start


def test_a_conversation(loop):
    """Complete an image, ask, ask on, change the system message and the image, and begin anew."""
    typist = loop()
    assert "13 items in " in typist.read("no image>")
    assert "no image is chosen" in typist.line("Is there a dog?", "no image>")
    typist.type("/im")
    typist.read("ask about these images")  # what a command means, beside it
    typist.type("age red")
    typist.read("red")
    typist.type("\t")
    typist.read("-houses.png")
    typist.line("", "red-houses.png>")
    first = typist.line("one", "red-houses.png>")
    assert '["u:one"]' in first
    digest = re.search(r"([0-9a-f]{6}) \[", first)[1]
    assert f'["u:one", "a:{digest} [\\"u:one\\"]", "u:two"]' in typist.line("two", "red-houses.png>")
    assert "system message: Brief." in typist.line("/system Brief.", "red-houses.png>")
    assert '["s:Brief.", "u:one", ' in typist.line("three", "red-houses.png>")
    typist.line("/new", "red-houses.png>")
    assert '["s:Brief.", "u:/x"]' in typist.line("//x", "red-houses.png>")
    typist.line("/system -", "the chat template's own")
    second = typist.line("/image seaside.jpg", "seaside.jpg>")
    assert "a new conversation" in second
    other = typist.line("\x1b[A\x1b[A\x1b[A", "]")  # up to //x
    assert '["u:/x"]' in other and digest not in other
    typist.read("jpg>")
    assert "failed: torn.jpg" in typist.line("/image *.jpg", "11 images>")
    assert typist.line("all", "winter.jpg").count('["u:all"]') >= 9
    typist.read("11 images>")
    assert "some have it in their names: copies/seaside (1).jpg, seaside.jpg" in typist.line(
        "/image seasi", "11 images>"
    )
    assert "seaside.jpg" in typist.line("/images *side*", "11 images>")
    typist.type("/exit\r")
    assert typist.ended() == 0


def test_ctrl_c_ends_an_answer_and_at_the_prompt_clears_the_line(loop):
    typist = loop()
    typist.read("no image>")
    typist.line("/image seaside.jpg", "seaside.jpg>")
    typist.line("slow", "word word word")
    typist.type("\x03")
    typist.read("stopped; the conversation goes on without what was not answered")
    typist.read("seaside.jpg>")
    assert '["u:again"]' in typist.line("again", "seaside.jpg>")
    fcntl.ioctl(typist.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 50, 0, 0))
    for cleared in ("one", "two"):
        typist.type(f"{cleared}\x03")
        typist.read("Ctrl-C once more")
        typist.read("seaside.jpg>")
    assert '"u:after"]' in typist.line("after", "seaside.jpg>")
    os.kill(typist.pid, signal.SIGINT)  # not by a key
    typist.read("Ctrl-C once more")
    typist.read("seaside.jpg>")
    typist.type("\x03")
    assert typist.ended() == 0


def test_signals_end_it_at_the_prompt_and_the_terminal_is_as_it_was(loop):
    typist = loop()
    typist.read("no image>")
    assert not termios.tcgetattr(typist.terminal)[3] & termios.ICANON
    typist.type("unfinished")
    typist.read("unfinished")
    os.kill(typist.pid, signal.SIGTERM)
    typist.read("interrupted")
    assert termios.tcgetattr(typist.terminal)[3] & termios.ICANON
    assert typist.ended() == 143


def test_signals_end_it_without_editing_and_during_an_answer_too(loop):
    typist = loop("dumb")
    typist.read("no image> ")
    typist.line("/image seaside.jpg", "seaside.jpg> ", is_edited=False)
    typist.line("slow", "word word word", is_edited=False)
    typist.type("\x03")
    typist.read("stopped")
    typist.read("seaside.jpg> ")
    typist.type("\x03")
    typist.read("Ctrl-C once more")
    typist.read("seaside.jpg> ")
    assert '["u:again"]' in typist.line("again", "seaside.jpg> ", is_edited=False)
    typist.line("slow", "word word word", is_edited=False)
    os.kill(typist.pid, signal.SIGHUP)
    assert typist.ended() == 143


def test_a_terminal_that_disappears_during_an_answer_ends_it(loop):
    typist = loop()
    typist.read("no image>")
    typist.line("/image seaside.jpg", "seaside.jpg>")
    typist.line("slow", "word word word")
    os.close(typist.terminal)
    os.kill(typist.pid, signal.SIGHUP)
    assert exit_code(typist.process) == 143
