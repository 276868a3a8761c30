"""`qvsplit chat`: a conversation as the full model has it, about an image of a store or a file; lines from a pipe."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from qvsplit.answering.options import AskOptions
from qvsplit.ask import load_session
from qvsplit.commands.ask_files import open_items
from qvsplit.commands.chat_items import ChatItems
from qvsplit.commands.placement import Placement
from qvsplit.errors import UsageError, printable
from qvsplit.store.opening import read_store
from tests.support import forked, rows
from tests.support.full_model import upright_rgb
from tests.support.memory_storage import MemoryStorage
from tests.support.terminal import Typist, one_line, start_on_terminal

NEW_TOKENS = 8
KEPT = "\n\t"
FIRST, SECOND, THIRD = "What is in the picture?", "And what colour is it?", "图片里有什么？"


def full_answer(whole, image, turns, question, system=None) -> list[int]:
    """What the full model says in a conversation, by its own chat template and processor."""
    chat = [] if system is None else [{"role": "system", "content": system}]
    for number, (asked, answer) in enumerate([*turns, (question, None)]):
        shown = [] if number else [{"type": "image"}]
        chat.append({"role": "user", "content": [*shown, {"type": "text", "text": asked}]})
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
    text = whole.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = whole.processor(text=[text], images=[image], return_tensors="pt")
    with torch.inference_mode():
        made = whole.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None
        )
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def said_by(whole, tokens: list[int]) -> str:
    tokenizer = whole.processor.tokenizer
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_question_behind_others_is_answered_as_by_the_full_model(small_store, whole, photos):
    image = upright_rgb(photos / "coins.png")
    session = load_session(small_store, AskOptions(max_new_tokens=NEW_TOKENS))
    turns: list[tuple[str, str]] = []
    cached: set[int] = set()
    for question in (FIRST, SECOND, THIRD):
        answer = session.answer("coins.png", question, earlier=turns)
        assert answer.tokens == full_answer(whole, image, turns, question)
        turns.append((question, answer.text))
        cached.add(len(session.engine.prefix_cache))
    assert len(cached) == 1  # the image's part of the prompt, once for all questions
    alone = session.answer("coins.png", THIRD)
    assert alone.prompt_tokens < answer.prompt_tokens
    brief = session.over(session.store, system="Be brief.")
    assert brief.answer("coins.png", THIRD, earlier=turns).tokens == full_answer(
        whole, image, turns, THIRD, "Be brief."
    )


@pytest.mark.parametrize("earlier", ["ab", [("a",)], [("a", None)], ["ab"], 5])
def test_what_are_no_earlier_questions(small_store, earlier):
    session = load_session(small_store, loaded=False)
    with pytest.raises(UsageError, match="^earlier"):
        session.answer("coins.png", "Q", earlier=earlier)


def test_the_same_seed_draws_again_in_another_conversation(small_store):
    """What is drawn depends on all that was said: else a question asked twice would be answered the same way."""
    session = load_session(small_store, AskOptions(max_new_tokens=NEW_TOKENS, temperature=5.0))
    first, again = (session.answer("coins.png", FIRST, earlier=[("Q", "A")]).tokens for _ in range(2))
    assert first == again != session.answer("coins.png", FIRST, earlier=[("Q", "B")]).tokens


def test_lines_of_a_pipe_are_a_conversation(run_cli, small_store, whole, photos):
    image = upright_rgb(photos / "coins.png")
    words = ("chat", "coins.png", "-e", small_store, "--max-new-tokens", NEW_TOKENS)
    lines = f"{FIRST}\n\n/system Be brief.\n{SECOND}\n/new\n{SECOND}\n/image chelsea.png\n{FIRST}"
    code, out, said = run_cli(*words, stdin=lines)
    assert code == 0
    first = said_by(whole, full_answer(whole, image, [], FIRST))
    second = said_by(whole, full_answer(whole, image, [(FIRST, first)], SECOND, "Be brief."))
    third = said_by(whole, full_answer(whole, image, [], SECOND, "Be brief."))
    other = said_by(whole, full_answer(whole, upright_rgb(photos / "chelsea.png"), [], FIRST, "Be brief."))
    assert out == "".join(f"{printable(text.strip(), keep=KEPT)}\n" for text in (first, second, third, other))
    assert {second, third} != {first}
    assert set(said.splitlines()) <= {"qvsplit: 4 answers were cut at --max-new-tokens; allow more for longer answers"}


def test_an_error_is_a_line_and_a_question_that_follows_is_answered(run_cli, small_store):
    words = ("chat", "-e", small_store, "--max-new-tokens", 2)
    code, out, said = run_cli(*words, stdin="Q?\n/image coffee.png\nQ?\n/exit\nQ?\n")
    assert (code, len(out.splitlines())) == (2, 1)
    assert "no image is chosen" in said.splitlines()[0]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("/image nosuch", "/image nosuch matches none of the store's 4 images"),
        ("/imgae coffee.png", "did you mean /image?"),
        ("/new Q?", "/new takes nothing behind it"),
    ],
)
def test_a_command_of_a_pipe_that_fails_ends_it(run_cli, small_store, command, why):
    """Else the questions behind it would be asked about the image before."""
    code, out, said = run_cli("chat", "-e", small_store, "coins.png", stdin=f"{command}\nQ?\n")
    assert (code, out) == (2, "")
    assert why in one_line(said)


def test_a_prompt_that_has_grown_too_long_is_refused_and_a_new_conversation_is_not(run_cli, small_store):
    words = ("chat", "coffee.png", "-e", small_store, "--max-new-tokens", 2)
    long = "long " * 40_000
    code, out, said = run_cli(*words, stdin=f"Q?\n{long}\n/new\nQ?\n")
    first, second = out.splitlines()
    assert (code, first) == (2, second)
    (refused,) = (line for line in said.splitlines() if "cut at" not in line)
    assert refused.endswith("; /new begins without the earlier answers")


def test_each_of_several_images_has_a_conversation(run_cli, small_store):
    words = ("chat", "c*.png", "-e", small_store, "--max-new-tokens", 2)
    _, out, _ = run_cli(*words, stdin=f"{FIRST}\n{SECOND}\n")
    apart = [
        run_cli("chat", name, *words[2:], stdin=f"{FIRST}\n{SECOND}\n")[1].splitlines()
        for name in ("chelsea.png", "coffee.png", "coins.png")
    ]
    blocks = [block.splitlines() for block in out.strip().split("\n\n")]
    assert [block[0].partition("  ")[0] for block in blocks] == ["chelsea.png", "coffee.png", "coins.png"] * 2
    assert [block[1] for block in blocks] == [one[0] for one in apart] + [one[1] for one in apart]


# ----------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def file(photos, tmp_path, monkeypatch):
    """A file in the current folder that is in no store."""
    shutil.copyfile(photos / "turned.jpg", tmp_path / "new one.jpg")
    monkeypatch.chdir(tmp_path)
    return "new one.jpg"


def test_a_file_needs_no_store_and_another_can_follow(run_cli, file, photos, checkpoint, tmp_path):
    shutil.copyfile(photos / "coins.png", tmp_path / "other.png")
    words = ("--model", checkpoint, "--max-new-tokens", 4)
    lines = f"{FIRST}\n/image other.png\n{FIRST}\n/image 'new one.jpg'\n{FIRST}\n/image none.jpg\n"
    code, out, said = run_cli("chat", file, *words, stdin=lines)
    assert code == 2
    first, second, third = out.splitlines()
    asked = [run_cli("ask", "-i", name, *words, "--format", "text", FIRST)[1].strip() for name in (file, "other.png")]
    assert ([first, second], third) == (asked, first)
    assert said.count("1 file was encoded") == 2  # and not again what has been asked about before
    assert said.splitlines()[-2] == "qvsplit: none.jpg: there is no such file"
    assert sorted(os.listdir()) == [file, "other.png"]


def test_a_file_beside_a_store(run_cli, file, small_store):
    lines = f"{FIRST}\n/image {file}\n{FIRST}\n/image coins.png\n{FIRST}\n"
    code, out, said = run_cli("chat", "coins.png", "-e", small_store, "--max-new-tokens", 4, stdin=lines)
    first, _, third = out.splitlines()
    assert (code, first) == (0, third)
    assert "1 file was encoded" in said


def test_a_comparison_with_a_file_goes_on_with_another_file(file, photos, postcards, tmp_path):
    shutil.copyfile(photos / "coins.png", tmp_path / "other.png")
    placement, options = Placement(reference=file), AskOptions(model="demo")
    found = open_items([str(postcards)], [file], options, has_flags=False, quiet=True, progress="none")
    chosen = ChatItems(load_session(found, options, loaded=False), [], placement, quiet=True)
    chosen.keep(found)
    for name in ("other.png", "seaside.jpg"):
        chosen.choose(name)
        (items,) = chosen.items
        assert [row.path for row in items.rows] == [file, name]
        assert all(chosen.session.store.home(row.content) is not None for row in items.rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no store at embeds; name a file, as in `qvsplit chat photo.jpg`"),
        (["none.jpg"], "there is no file none.jpg, and no store at embeds"),
        ([""], "IMAGE is empty"),
        (
            ["."],
            ". is a folder, and there is no store at embeds; name a file in it, or make a store of it first: qvsplit",
        ),
        (["-e", "none"], "no store or shard at none"),
    ],
)
def test_nothing_to_chat_about(run_cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, told = run_cli("chat", *words)
    assert (code, out) == (2, "")
    assert said in one_line(told)


def test_a_name_that_names_nothing_is_no_option(run_cli, postcards):
    said = one_line(run_cli("chat", "nosuch.jpg", "-e", postcards)[2])
    assert said.startswith("qvsplit: nosuch.jpg matches none")


def test_what_failed_says_why(run_cli, postcards):
    code, _, said = run_cli("chat", "torn.jpg", "-e", postcards)
    assert code == 2
    assert said.startswith("qvsplit: failed: torn.jpg")
    code, _, said = run_cli("chat", "seaside.jpg", "-e", postcards, stdin="/image torn.jpg")
    assert code == 2
    assert said.splitlines()[-2].startswith("qvsplit: failed: torn.jpg")


# -------------------------------------------------------------------------------------------------- on a terminal


def test_on_a_terminal_with_a_model(postcards, tmp_path):
    words = ["chat", "-e", str(postcards), "seaside.jpg", "--max-new-tokens", "12"]
    typist = Typist(forked.start_on_terminal(words, TERM="xterm", NO_COLOR="", XDG_STATE_HOME=str(tmp_path)))
    assert "seaside.jpg; type a question" in typist.read("seaside.jpg>")
    assert "day" in typist.line("Is it day or night?", "seaside.jpg>")
    typist.type("\x04")
    assert typist.ended() == 0


def test_names_that_complete():
    """Whatever the case, also from within a name; wildcards are characters, and what failed is not offered."""
    images = [rows.item(name) for name in ("50%_off!.jpg", "in/coffee.png", "in/coins.png")]
    store = read_store(rows.write_store(MemoryStorage(), [*images, (rows.failed("in/cold.jpg"), None)]))

    def found(text: str, most: int = 10) -> list[str]:
        return [path for _, path in store.catalogue.names_containing(text, most)]

    assert found("CO") == ["in/coffee.png", "in/coins.png"]
    assert found("", 2) == ["50%_off!.jpg", "in/coffee.png"]
    assert [found(text) for text in ("%", "_", "!", "0%_o")] == [["50%_off!.jpg"]] * 4
    assert found("c%s") == []


def test_loading_is_ended_by_ctrl_c(postcards, tmp_path):
    environment = {"TERM": "xterm", "NO_COLOR": "", "XDG_STATE_HOME": str(tmp_path)}
    typist = Typist(start_on_terminal(["chat", "-e", str(postcards)], **environment))
    typist.read("loading")
    os.kill(typist.pid, signal.SIGINT)
    assert typist.ended() == 130
