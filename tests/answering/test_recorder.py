"""What a table knows of an answer, and when it is no answer to what is asked now."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from qvsplit.answering.checks import Question
from qvsplit.answering.options import AskOptions
from qvsplit.answering.recorder import Origin, Recorder, answer_of, prompt_hash
from qvsplit.answering.requests import PromptItems, judged
from qvsplit.output.answer import Answer
from qvsplit.output.table import Table
from qvsplit.output.wide import newest_runs, wide
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


@pytest.mark.parametrize(
    ("origin", "question", "options", "same"),
    [
        ({}, {}, {}, True),
        ({"model": "another name", "video_config": "x"}, {}, {}, True),
        ({}, {"threshold": 0.9, "level": "block", "min_choice_mass": 0.1, "flag": ("no",), "only_if": "x"}, {}, True),
        ({}, {}, {"device": "cpu", "token_budget": 9, "max_new_tokens": 3}, True),
        ({"weights": "x"}, {}, {}, False),
        ({"dtype": "bfloat16"}, {}, {}, False),
        ({"config": "x"}, {}, {}, False),
        ({}, {"text": "Was it?"}, {}, False),
        ({}, {"choices": ["yes", "no", "maybe"]}, {}, False),
        ({}, {}, {"system": "Be brief."}, False),
        ({}, {}, {"kernels": "reference"}, False),
    ],
)
def test_a_run_is_what_decides_answers_and_another_overwrites_nothing(table, origin, question, options, same):
    recorder(table).put(SCORED)
    other = replace(CHECK, **question)
    answer = judged(replace(SCORED, question=other.text, logprobs={"yes": -0.1, "no": -3.0}), other)
    recorder(table, other, AskOptions(**options), **origin).put(answer)
    assert len({one["run"] for one in table}) == len(table) == (1 if same else 2)
    assert all(re.fullmatch("[0-9a-f]{12}", one["run"]) for one in table)


def test_images_and_videos_of_one_store_are_of_one_run(table):
    mine = recorder(table, video_config="videos")
    mine.put(SCORED)
    mine.put(replace(SCORED, rows=(part(0),)))
    assert len(table) == 2
    assert len({one["run"] for one in table}) == 1
    assert len({one["config"] for one in table}) == 2


def test_every_form_that_is_scored_is_part_of_the_prompt():
    """Otherwise answers of a version with other forms would be taken for those of this one."""
    forms = CHECK.forms
    assert "Yes." in forms["yes"]
    before = prompt_hash(CHECK, AskOptions())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Question, "forms", property(lambda self: {name: mine[:1] for name, mine in forms.items()}))
        assert prompt_hash(CHECK, AskOptions()) != before


def test_a_record_has_the_judgement_in_columns_of_their_own(table):
    probabilities = {"yes": -0.2, "no": -1.9}
    flagged = judged(replace(SCORED, logprobs=probabilities, forms={"yes": "Yes.", "no": "no"}), CHECK)
    recorder(table).put(flagged)
    (record,) = table
    shares = [math.exp(-0.2) / (math.exp(-0.2) + math.exp(-1.9)), math.exp(-1.9) / (math.exp(-0.2) + math.exp(-1.9))]
    names = (
        "answer",
        "verdict",
        "score",
        "choice",
        "choice_probability",
        "choice_form",
        "choice_mass",
        "flagged",
        "level",
    )
    assert [record[name] for name in names] == [
        "yes", "warn", pytest.approx(shares[0]), "yes", pytest.approx(shares[0]), "Yes.",
        pytest.approx(math.exp(-0.2) + math.exp(-1.9)), True, "warn",
    ]  # fmt: skip
    assert record["choices"] == [
        {"choice": "yes", "form": "Yes.", "probability": pytest.approx(shares[0]), "logprob": -0.2},
        {"choice": "no", "form": "no", "probability": pytest.approx(shares[1]), "logprob": -1.9},
    ]
    recorder(table).put(judged(replace(flagged, logprobs={"yes": -3.0, "no": -0.1}), CHECK))
    (record,) = table
    assert (record["verdict"], record["flagged"], record["level"]) == ("pass", False, None)  # the level of nothing
    recorder(table).put(judged(replace(flagged, logprobs={"yes": -40.0, "no": -50.0}), CHECK))
    (record,) = table
    assert (record["answer"], record["verdict"], record["flagged"], record["level"]) == (
        "unsure",
        "uncertain",
        None,
        None,
    )
    assert (record["choice"], round(record["choice_probability"], 3)) == ("yes", 1.0)


def test_another_choice_mass_judges_anew_and_asks_nothing(table):
    recorder(table).put(judged(replace(SCORED, logprobs={"yes": -2.0, "no": -4.0}), CHECK))
    assert [one["verdict"] for one in table] == ["uncertain"]
    lenient = replace(CHECK, min_choice_mass=0.1)
    again = recorder(table, lenient)
    again.put(again.recall(ITEMS, lenient))
    assert [(one["verdict"], one["answer"]) for one in table] == [("warn", "yes")]
    assert (again.asked, again.recalled) == (0, 1)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_what_the_model_excludes_is_recalled_as_that(tmp_path, suffix):
    """JSON has no infinity: Polars would refuse the whole table."""
    file = tmp_path / f"a{suffix}"
    with Table(file) as table:
        recorder(table).put(judged(replace(SCORED, logprobs={"yes": -math.inf, "no": -0.1}), CHECK))
    assert b"Infinity" not in file.read_bytes()
    with Table(file) as table:
        answer = recorder(table).recall(ITEMS, CHECK)
        assert answer.logprobs == {"yes": -math.inf, "no": -0.1}
        assert (answer.text, answer.flagged, answer.score) == ("no", False, 0.0)


def test_an_answer_is_made_of_its_record_again(table):
    mine = recorder(table)
    whole = judged(replace(SCORED, forms={"yes": "Yes", "no": "no"}, reasoning="Is it?"), CHECK)
    several = replace(whole, rows=(part(0), part(1), row("a.jpg")))
    passed = replace(
        whole, rows=(row("b.jpg"),), text="", finish_reason="skipped", flagged=False, level=None, score=None,
        logprobs=None, probabilities=None, forms=None,
    )  # fmt: skip
    for answer in (whole, several, passed, replace(SCORED, rows=(part(2),), finish_reason="error", error="no memory", text="",
                                           logprobs=None, probabilities=None)):  # fmt: skip
        mine.put(answer)
        *_, record = table
        again = answer_of(record)
        assert replace(again, rows=(), recalled=None) == replace(answer, rows=())
        assert again.verdict == answer.verdict
        names = [(one.root, one.path, one.sha256, one.kind, one.part, one.start, one.end) for one in answer.rows]
        assert [(one.root, one.path, one.sha256, one.kind, one.part, one.start, one.end) for one in again.rows] == names


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
               AskOptions(thinking=True), AskOptions(kernels="reference")]  # fmt: skip
    assert len({base, *(prompt_hash(plain, options) for options in changes)}) == 1 + len(changes)
    assert prompt_hash(plain, AskOptions(seed=3, device="cpu", token_budget=9)) == base
    # the names of runs in tables that are there: what is new, and not asked for, is not part of them
    assert prompt_hash(Question("What?"), AskOptions()).startswith("8b245ab397d7bbde")
    scored = prompt_hash(CHECK, AskOptions())
    assert prompt_hash(CHECK, AskOptions(temperature=1.0, max_new_tokens=3, thinking=True)) == scored != base
    assert prompt_hash(replace(CHECK, threshold=0.9, id="other"), AskOptions()) == scored
    assert prompt_hash(replace(CHECK, choices={"yes": ["yes"], "no": ["no", "No"]}), AskOptions()) != scored


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_what_could_not_be_asked_about_is_in_the_table_until_it_can(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    sound, torn = row("a.jpg"), row("b.jpg", status="failed", error="is torn")
    late = row("late.jpg", status="failed", sha256=None, error="is not yet extracted")
    rows = {one.key: one for one in (sound, torn)}

    def now(table):
        return recorder(table, current=lambda root, path: rows.get((root, path)))

    def errors(table):
        return {record["path"]: record["error"] for record in table if record["finish_reason"] == "error"}

    with Table(file) as table:
        first = now(table)
        for one in (torn, late):
            first.put_failed(one, one.error, [CHECK])
        first.drop_stale()
        assert errors(table) == {"b.jpg": "is torn", "late.jpg": "is not yet extracted"}
        assert {(record["verdict"], record["answer"]) for record in table} == {("error", None)}
        assert (first.asked, first.recalled) == (0, 0)
        assert first.recall(PromptItems((torn,)), CHECK) is None
    written = file.read_bytes()
    with Table(file) as table:
        again = now(table)
        for one in (torn, late):
            again.put_failed(one, one.error, [CHECK])
        again.drop_failed()
        again.drop_stale()
    assert file.read_bytes() == written  # nothing is new, so nothing is written
    with Table(file) as table:
        now(table).drop_stale()  # another selection: late.jpg is missed no more, b.jpg has still failed
        assert errors(table) == {"b.jpg": "is torn"}
    rows[torn.key] = row("b.jpg", sha256="c" * 64)
    with Table(file) as table:
        now(table).drop_stale()
        assert len(table) == 0


def test_no_part_of_a_video_that_could_not_be_asked_about_keeps_an_answer(tmp_path):
    torn = replace(part(0), status="failed", sha256=None, error="has changed on disk")
    caption = Question("What is it?", "caption")
    with Table(tmp_path / "a.jsonl") as table:
        before = recorder(table)
        for rows in ([part(0)], [part(1)], [part(2)], [part(1, "other.mp4")], [ITEMS.rows[0], part(2)]):
            before.put(replace(SCORED, rows=tuple(rows)))
        words = recorder(table, caption)
        words.put(replace(SCORED, rows=(part(1),), question=caption.text, id=caption.id))
        now = recorder(table)
        now.drop_failed()
        assert len(table) == 6
        now.put_failed(torn, torn.error, [CHECK])
        now.drop_failed()
        left = [(record["path"], record["part"], record["verdict"]) for record in table]
    assert left == [("film.mp4", 0, "error"), ("other.mp4", 1, "pass")]


# -- an earlier wording or model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_the_run_that_was_asked_last_is_the_newest_also_where_its_answers_were_known(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    yes = replace(SCORED, text="yes", logprobs={"yes": -0.1, "no": -3.0})
    written = []
    for model, answer in (("one", SCORED), ("two", yes), ("one", None), ("one", None), ("two", None)):
        with Table(file) as table:
            mine = recorder(table, weights=model)
            known = mine.recall(ITEMS, CHECK)
            assert (known is None) == (answer is not None)
            mine.put(known or answer)
            mine.put(mine.recall(ITEMS, CHECK))
            assert newest_runs(table) == mine.runs
        with Table(file) as table:
            assert newest_runs(table) == mine.runs
            (row,) = wide(table).to_pylist()
            assert row["it"] == ("no" if model == "one" else "yes")
            assert [record["answer"] for record in table][: len(written) + 1] == ["no", "yes"][: len(written) + 1]
        written.append(file.read_bytes())
    assert written[2] == written[3]  # asked again, nothing is new
    with Table(file) as table:
        assert all(record["time"] < record["asked"] for record in table)  # when they were answered stays


def test_an_error_of_an_earlier_run_is_of_the_newest_again(table):
    torn = row("b.jpg", status="failed", error="is torn")
    for model in ("one", "two", "one"):
        mine = recorder(table, weights=model)
        mine.put_failed(torn, torn.error, [CHECK])
        assert newest_runs(table) == mine.runs
