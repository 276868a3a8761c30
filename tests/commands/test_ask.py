"""`qvsplit ask`: which questions about which images, and where the answers go."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.terminal import one_line

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_answers_to_stdout_and_nothing_else(run_cli, small_store):
    code, out, said = run_cli(
        "ask", "--embeds", small_store, "--image", "coins.png", "--max-new-tokens", 5, "What is it?"
    )
    assert (code, said) == (0, "")
    assert out.strip()
    code, out, said = run_cli("ask", "--embeds", small_store, "--max-new-tokens", 5, "What\tis it?", "Day or night?")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, len(rows), said) == (0, 8, "")
    assert {(Path(row[1]).name, row[3]) for row in rows} == {
        (path, question) for path in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg")
        for question in ("What is it?", "Day or night?")
    }  # fmt: skip


def test_json_lines(run_cli, small_store, whole, four_photos):
    from tests.support.full_model import upright_rgb

    _, out, _ = run_cli(
        "ask", "--embeds", small_store, "--image", "co*", "--json", "--max-new-tokens", 12, "What is it?"
    )
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["path"] for answer in answers] == ["coffee.png", "coins.png"]
    for answer in answers:
        assert {"path", "question", "answer", "encoder_check", "finish_reason"} <= answer.keys()
        assert answer["tokens"] == whole.answer([upright_rgb(four_photos / answer["path"])], "What is it?")


def test_reference_kernels_say_what_the_store_cannot_give(run_cli, small_store, tmp_path):
    """And they are a run of their own in a table."""
    words = ("ask", "-e", small_store, "-i", "coins.png", "--max-new-tokens", 5, "What?", "-o", tmp_path / "a.jsonl")
    assert run_cli(*words)[0] == 0
    code, _, said = run_cli(*words, "--kernels", "reference")
    assert (code, said.count("computed by the fused kernels: answers are those of the full model only")) == (0, 1)
    assert "extract again on cpu with --kernels reference" in said
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({record["run"] for record in records}) == len(records) == 2
    assert run_cli(*words, "--kernels", "exact")[0] == 2


def test_questions_from_a_pipe_and_a_file(run_cli, small_store, tmp_path):
    (tmp_path / "questions.txt").write_text("What is it?\n\nDay or night?\n")
    words = ("ask", "--embeds", small_store, "--image", "coins.png", "--max-new-tokens", 3, "--json")
    from_file = run_cli(*words, "--questions", tmp_path / "questions.txt")
    from_pipe = run_cli(*words, stdin="What is it?\n\nDay or night?\n")
    assert from_file == from_pipe
    assert [json.loads(line)["question"] for line in from_file[1].splitlines()] == ["What is it?", "Day or night?"]


def test_a_questions_file_with_a_mark_and_windows_line_ends(run_cli, small_store, tmp_path):
    (tmp_path / "q.txt").write_bytes("\ufeffWhat is it?\r\nOne\u2028line?\r\n".encode())
    _, out, _ = run_cli(
        "ask",
        "--embeds",
        small_store,
        "--image",
        "coins.png",
        "--questions",
        tmp_path / "q.txt",
        "--json",
        "--max-new-tokens",
        2,
    )
    assert [json.loads(line)["question"] for line in out.strip().split("\n")] == ["What is it?", "One\u2028line?"]


def test_any_script_goes_in_and_comes_out(run_cli, small_store):
    asked = "这是什么？ Что это? ما هذا؟ 👩‍👩‍👧"
    code, out, _ = run_cli(
        "ask", "--embeds", small_store, "--json", asked, "--system", "ты — кот", "--max-new-tokens", "2"
    )
    assert code == 0
    assert {json.loads(line)["question"] for line in out.splitlines()} == {asked}


def test_together(run_cli, small_store):
    code, out, _ = run_cli(
        "ask", "--embeds", small_store, "--image", "co*", "--together", "--json", "--max-new-tokens", 3, "Which?"
    )
    assert (code, json.loads(out)["paths"]) == (0, ["coffee.png", "coins.png"])


def test_several_places_and_globs(run_cli, small_store, checkpoint, tmp_path, photos):
    other = tmp_path / "other photos"
    other.mkdir()
    shutil.copyfile(photos / "color.png", other / "color.png")
    run_cli("extract", other, "--model", checkpoint, "--out", tmp_path / "more")
    code, out, _ = run_cli(
        "ask",
        "--embeds",
        small_store / "shard-*.parquet",
        "--embeds",
        tmp_path / "more",
        "--max-new-tokens",
        2,
        "What?",
    )
    assert (code, len(out.splitlines())) == (0, 5)


def test_images_of_two_roots_can_be_told_apart(run_cli, store, four_photos, checkpoint, tmp_path):
    (tmp_path / "more").mkdir()
    shutil.copyfile(four_photos / "coins.png", tmp_path / "more" / "coins.png")
    run_cli("extract", tmp_path / "more", "--model", checkpoint, "--out", store, "--quiet")
    _, out, _ = run_cli("ask", "--embeds", store, "--image", "coins.png", "--max-new-tokens", 2, "What?")
    assert {line.split("\t")[1] for line in out.splitlines()} == {
        str(four_photos / "coins.png"),
        str(tmp_path / "more" / "coins.png"),
    }


def test_a_name_that_looks_like_a_pattern_can_be_chosen(run_cli, some_photos, checkpoint, tmp_path):
    (some_photos / "coins.png").rename(some_photos / "photo[1].png")
    run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "e", "--quiet")
    assert run_cli("ask", "--embeds", tmp_path / "e", "--image", "photo[1].png", "--max-new-tokens", 2, "What?")[0] == 0


def test_choices_give_probabilities(run_cli, postcards):
    words = ("ask", "--embeds", postcards, "--image", "su*", "--choices", "day, night", "Day or night?")
    code, out, _ = run_cli(*words)
    file = postcards.parent / "postcards" / "sunday.jpg"
    assert (code, out) == (0, f"answer\t{file}\t\tDay or night?\tday\t1\t\t\n")
    assert run_cli(*words, "--format", "text") == (0, "day  1.000\n", "")
    _, out, _ = run_cli(*words, "--json")
    answer = json.loads(out)
    assert answer["answer"] == "day"
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert list(answer["probabilities"]) == ["day", "night"]
    assert answer["choice_mass"] > 0.99
    _, out, _ = run_cli(*words, "Is there a dog?", "--logprobs")
    lines = [line.split("\t") for line in out.splitlines()]
    assert [(line[3], line[4], line[6]) for line in lines] == [
        ("Day or night?", "day", ""), ("Is there a dog?", "unsure", "uncertain")
    ]  # fmt: skip
    assert all("day=-" in line[7] and "night=-" in line[7] for line in lines)


def test_compare_shows_each_image_behind_the_reference(run_cli, postcards):
    code, out, _ = run_cli("ask", "--embeds", postcards, "--image", "*.jpg", "--compare", "quiet-night.jpg",
                           "Which image has more people?", "--json")  # fmt: skip
    assert code == 0
    answers = [line for line in map(json.loads, out.splitlines()) if "answer" in line]
    assert all(one["paths"][0] == "quiet-night.jpg" != one["paths"][1] for one in answers)
    assert {one["paths"][1]: one["answer"] for one in answers}["sunday.jpg"] == "the second"


def test_seeds_and_stop_strings(run_cli, postcards):
    words = ("ask", "--embeds", postcards, "--image", "sunday.jpg", "--format", "text", "Describe the image.")
    sampled = [run_cli(*words, "--temperature", "3", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    _, whole, _ = run_cli(*words)
    _, cut, _ = run_cli(*words, "--stop", " with")
    assert whole.startswith(cut.strip() + " with")
    assert cut == whole.split(" with")[0] + "\n"


# ----------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail-on", "fatal", "?"], "--fail-on fatal: give info, warn or block"),
        (["--fail-on", "warn", "?"], "needs --checks"),
        (["--together", "--compare", "x", "?"], "choose one"),
        (["--compare", "none.jpg", "?"], "matches none of"),
        (["--compare", "*", "?"], "matches 4 of"),
        (["--choices", "yes", "?"], "at least two choices"),
        (["--choices", "yes,,no", "?"], "a choice is a text"),
        (["--checks", "none.toml"], "cannot be read from none.toml"),
        (["--json-schema", "none.json", "?"], "no JSON schema can be read"),
        (["--out", "answers.txt", "?"], "must end in"),
        (["--temperature", "0", "?"], "above 0"),
        (["--top-p", "1.5", "?"], "at most 1"),
        (["--top-k", "0", "?"], "at least 1"),
        (["--stop", "", "?"], "must not be empty"),
        (["--token-budget", "0", "?"], "at least 1"),
        (["--report", "none/page.html", "?"], "no folder at"),
        (["--out", "none/a.csv", "?"], "no folder at"),
        (["--report", "page.csv", "?"], "must end in .html"),
        (["--report", "same.html", "--out", "same.html", "?"], "must end in .parquet"),
        (["--json-schema", "none.json", "--stop", "x", "?"], "leave one out"),
    ],
)
def test_what_is_off_is_said_in_one_line(run_cli, small_store, words, said):
    code, out, line = run_cli("ask", "--embeds", small_store, *words)
    assert (code, out) == (2, "")
    assert said in one_line(line)


def test_a_question_by_the_name_of_a_check_does_not_displace_it(run_cli, postcards):
    code, out, said = run_cli("ask", "--embeds", postcards, "--checks", EXAMPLES / "demo" / "moderation.toml", "dog")
    assert (code, out) == (2, "")
    assert "two different questions have the name dog" in one_line(said)


def test_a_report_overwrites_only_a_report(run_cli, small_store, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html><title>my own</title>")
    code, out, said = run_cli("ask", "--embeds", small_store, "?", "--report", mine)
    assert (code, out) == (2, "")
    assert "no report of qvsplit" in one_line(said)
    assert mine.read_text() == "<!doctype html><title>my own</title>"
    for _ in range(2):
        assert (
            run_cli("ask", "--embeds", small_store, "?", "--report", tmp_path / "page.html", "--max-new-tokens", 2)[0]
            == 0
        )


def test_a_table_in_use_and_a_table_that_is_none(run_cli, small_store, tmp_path):
    from qvsplit.output.table import Table

    with Table(tmp_path / "a.csv"):
        code, _, said = run_cli("ask", "--embeds", small_store, "?", "--out", tmp_path / "a.csv")
        assert code == 5
        one_line(said)
    (tmp_path / "b.csv").write_text("name\nada\n")
    code, _, said = run_cli("ask", "--embeds", small_store, "?", "--out", tmp_path / "b.csv")
    assert code == 2
    assert "choose another name" in one_line(said)
    assert (tmp_path / "b.csv").read_text() == "name\nada\n"


# ------------------------------------------------------------------------------------------------ thinking, the context


@pytest.fixture
def thinks(monkeypatch):
    """Have the model think before every answer, asked to or not."""
    written = "<think>Is it a cat? Yes.</think>\n\nA cat."

    def processors(model, decoding, prompt_tokens):
        def forced(ids, scores):
            scores[:, tokens[min(ids.shape[1] - prompt_tokens, len(tokens) - 1)]] += 1000
            return scores

        tokens = [*tokenizers[-1].text_tokens(written), model.generation_config.eos_token_id]
        return forced

    tokenizers = []
    from qvsplit.models.prompt import Prompter

    make = Prompter.__init__
    monkeypatch.setattr(
        Prompter, "__init__", lambda self, *given: (make(self, *given), tokenizers.append(self), None)[2]
    )
    monkeypatch.setattr("qvsplit.models.language.logits_processors", processors)


def test_what_a_model_thinks_is_in_no_answer(run_cli, small_store, thinks, tmp_path):
    words = ("ask", "--embeds", small_store, "--image", "co*", "What is it?")
    for switch in ((), ("--thinking",)):
        code, out, _ = run_cli(*words, *switch)
        assert (code, [line.split("\t")[4] for line in out.splitlines()]) == (0, ["A cat.", "A cat."])
        _, out, _ = run_cli(*words, *switch, "--json")
        answers = [json.loads(line) for line in out.splitlines()]
        assert [(one["answer"], one["reasoning"]) for one in answers] == [("A cat.", "Is it a cat? Yes.")] * 2
        code, _, said = run_cli(*words, *switch, "--max-new-tokens", 12, "--out", tmp_path / "answers.jsonl")
        assert "2 answers were cut at --max-new-tokens before the model had done thinking" in said
        assert "2 asked" in said  # neither are known from the run with the other switch
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {(one["answer"], one["finish_reason"]) for one in records} == {("", "length")}
    assert all(one["reasoning"].startswith("Is it") for one in records)


def test_a_prompt_beyond_the_context_is_refused_in_one_line(run_cli, small_store, monkeypatch):
    from qvsplit.answering.local_engine import LocalEngine

    monkeypatch.setattr(LocalEngine, "context", 400)
    words = ("ask", "--embeds", small_store, "--max-new-tokens", 3)
    for more, advice in (
        (("--image", "coins.png", "What is it? " * 200), "ask a shorter question"),
        (("--together", "What is it?"), "1 of its 4 images would fit: ask about fewer together"),
    ):
        code, _, said = run_cli(*words, *more)
        (line,) = [line for line in said.splitlines() if "context" in line]
        assert code == 2
        assert re.search(r"the prompt has [\d,]+ tokens, and the model's context 400, the answer included; ", line)
        assert advice in line
        assert len(line) < 400  # neither a long question nor many names hide why
