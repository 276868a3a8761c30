"""What a table knows of an answer, and when it is no answer to what is asked now."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qvsplit.answering.checks import Question
from qvsplit.answering.options import AskOptions
from qvsplit.answering.recorder import Origin, Recorder, prompt_hash
from qvsplit.answering.requests import PromptItems
from qvsplit.output.answer import Answer
from qvsplit.output.table import Table
from tests.support.fake_engine import row

ORIGIN = Origin("demo", "config", "weights", "float32")
CHECK = Question("Is it?", "it", choices=["yes", "no"], flag=("yes",))
ITEMS = PromptItems((row("a.jpg"),))
SCORED = Answer(
    ITEMS.rows, CHECK.text, "no", [], 40, "scored", "fingerprint", "it", "warn", False,
    logprobs={"yes": -3.0, "no": -0.1}, probabilities={"yes": 0.05, "no": 0.95},
)  # fmt: skip


@pytest.fixture
def table(tmp_path):
    with Table(tmp_path / "answers.jsonl") as table:
        yield table


def recorder(table, question=CHECK, options=None, current=lambda root, path: None, **origin):
    hashes = {question.name: prompt_hash(question, options or AskOptions())}
    return Recorder(table, replace(ORIGIN, **origin), hashes, current)


def test_an_answer_is_recalled_and_judged_by_the_threshold_of_now(table):
    first = recorder(table)
    first.put(SCORED)
    first.put(SCORED)  # as it is done, and again in its order
    assert (first.asked, first.recalled, first.failed) == (1, 0, 0)
    strict = replace(CHECK, threshold=0.01, level="block")
    answer = recorder(table, strict).recall(ITEMS, strict)
    assert (answer.flagged, answer.level, answer.text) == (True, "block", "no")
    assert answer.recalled is not None


@pytest.mark.parametrize("change", [{"config": "x"}, {"weights": "x"}, {"dtype": "bfloat16"}])
def test_another_origin_is_another_answer(table, change):
    recorder(table).put(SCORED)
    assert recorder(table, **change).recall(ITEMS, CHECK) is None
    assert recorder(table, model="another name").recall(ITEMS, CHECK) is not None


def test_other_bytes_or_another_part_of_them_are_another_answer(table):
    mine = recorder(table)
    mine.put(SCORED)
    assert mine.recall(PromptItems((row("b.jpg"),)), CHECK) is None
    assert mine.recall(PromptItems((row("b.jpg", sha256=ITEMS.rows[0].sha256),)), CHECK) is not None
    assert mine.recall(PromptItems((row("a.jpg", part=1),)), CHECK) is None


def part(number: int, path: str = "film.mp4"):
    start = 10.0 * number
    return row(path, sha256="f" * 64, kind="video", part=number, start=start, end=start + 10, duration=30.0)


def test_parts_of_one_file_are_two_subjects(table, tmp_path):
    mine = recorder(table, video_config="videos")
    parts = [PromptItems((part(number),)) for number in range(2)]
    mine.put(replace(SCORED, rows=parts[0].rows))
    assert mine.recall(parts[0], CHECK) is not None
    assert mine.recall(parts[1], CHECK) is None
    mine.put(replace(SCORED, rows=parts[1].rows, text="yes", logprobs={"yes": -0.1, "no": -3.0}))
    assert [mine.recall(one, CHECK).text for one in parts] == ["no", "yes"]
    assert mine.recall(PromptItems((part(1, "copy.mp4"),)), CHECK).text == "yes"
    names = ("path", "sha256", "kind", "part", "start", "end", "items", "answer")
    assert [tuple(record[name] for name in names) for record in table] == [
        ("film.mp4", "f" * 64, "video", 0, 0.0, 10.0, None, "no"),
        ("film.mp4", "f" * 64, "video", 1, 10.0, 20.0, None, "yes"),
    ]
    with Table(tmp_path / "again.parquet") as other:
        for record in table:
            other.put(record)
    with Table(tmp_path / "again.parquet") as other:
        again = recorder(other, video_config="videos")
        assert [again.recall(one, CHECK).text for one in parts] == ["no", "yes"]


def test_of_items_shown_together_each_is_named(table):
    mine = recorder(table)
    pairs = [PromptItems((part(0), part(number), row("a.jpg"))) for number in (1, 2)]
    mine.put(replace(SCORED, rows=pairs[0].rows))
    assert mine.recall(pairs[0], CHECK) is not None
    assert mine.recall(pairs[1], CHECK) is None
    mine.put(replace(SCORED, rows=pairs[1].rows))
    first, second = table
    assert (first["kind"], first["part"], first["start"], first["path"]) == (
        None, None, None, '["film.mp4", "film.mp4", "a.jpg"]'
    )  # fmt: skip
    assert first["items"] == [
        {"root": "/photos", "path": "film.mp4", "kind": "video", "part": 0, "start": 0.0, "end": 10.0},
        {"root": "/photos", "path": "film.mp4", "kind": "video", "part": 1, "start": 10.0, "end": 20.0},
        {"root": "/photos", "path": "a.jpg", "kind": "image", "part": 0, "start": None, "end": None},
    ]
    assert [item["part"] for item in second["items"]] == [0, 2, 0]


def test_answers_about_images_stay_known_when_videos_are_added_to_their_store(table):
    recorder(table, video_config="none").put(SCORED)
    recorder(table, video_config="none").put(replace(SCORED, rows=(part(0),)))
    later = recorder(table, video_config="two frames a second")
    assert later.recall(ITEMS, CHECK) is not None
    assert later.recall(PromptItems((part(0),)), CHECK) is None
    assert later.recall(PromptItems((row("a.jpg"), part(0))), CHECK) is None


def test_answers_about_a_part_go_when_its_file_has_other_bytes(table):
    mine = recorder(table, current=lambda root, path: part(0))
    for number in range(2):
        mine.put(replace(SCORED, rows=(part(number),)))
    mine.drop_stale()
    assert len(table) == 2
    other = recorder(table, current=lambda root, path: replace(part(0), sha256="e" * 64))
    other.drop_stale()
    assert len(table) == 0


def test_an_answer_that_failed_is_recorded_and_asked_again(table):
    failed = replace(SCORED, text="", flagged=None, level=None, logprobs=None, probabilities=None,
                     finish_reason="error", error="no memory")  # fmt: skip
    mine = recorder(table)
    mine.put(failed)
    assert (mine.asked, mine.failed) == (1, 1)
    (record,) = table
    assert (record["answer"], record["finish_reason"], record["error"]) == (None, "error", "no memory")
    assert recorder(table).recall(ITEMS, CHECK) is None
    recorder(table).put(SCORED)
    (record,) = table
    assert (record["answer"], record["error"]) == ("no", None)


def test_reasoning_is_recorded_and_recalled(table):
    plain = replace(SCORED, text="A cat.", finish_reason="stop", flagged=None, level=None, logprobs=None,
                    probabilities=None, reasoning="Is it?")  # fmt: skip
    recorder(table).put(plain)
    assert next(iter(table))["reasoning"] == "Is it?"
    recalled = recorder(table).recall(ITEMS, CHECK)
    assert (recalled.text, recalled.reasoning) == ("A cat.", "Is it?")


def test_an_answer_that_was_cut_short_is_not_recorded(table):
    recorder(table).put(replace(SCORED, finish_reason="cancelled", logprobs=None, probabilities=None))
    assert len(table) == 0


@pytest.mark.parametrize(
    ("now", "is_kept"),
    [
        (ITEMS.rows[0], True),
        (None, True),
        (row("a.jpg", sha256="0" * 64), False),
        (row("a.jpg", status="deleted"), False),
    ],
)
def test_answers_about_other_bytes_are_dropped(table, now, is_kept):
    mine = recorder(table, current=lambda root, path: now)
    mine.put(SCORED)
    mine.drop_stale()
    assert len(table) == is_kept


def test_what_decides_a_prompt():
    plain = Question("Is it?")
    base = prompt_hash(plain, AskOptions())
    changes = [AskOptions(system="x"), AskOptions(max_new_tokens=3), AskOptions(stop=("x",)), AskOptions(top_k=2),
               AskOptions(temperature=1.0), AskOptions(temperature=1.0, seed=1), AskOptions(json_schema={"a": 1}),
               AskOptions(thinking=True)]  # fmt: skip
    assert len({base, *(prompt_hash(plain, options) for options in changes)}) == 1 + len(changes)
    assert prompt_hash(plain, AskOptions(seed=3, device="cpu", token_budget=9)) == base
    scored = prompt_hash(CHECK, AskOptions())
    assert prompt_hash(CHECK, AskOptions(temperature=1.0, max_new_tokens=3, thinking=True)) == scored != base
    assert prompt_hash(replace(CHECK, threshold=0.9, id="other"), AskOptions()) == scored
    assert prompt_hash(replace(CHECK, choices={"yes": ["yes"], "no": ["no", "No"]}), AskOptions()) != scored
