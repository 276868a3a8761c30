"""Every question of every item, in order: rounds, windows, what is known already, and errors that stop nothing else."""

from __future__ import annotations

import math

import pytest

from qvsplit.answering.checks import Condition, Question
from qvsplit.answering.requests import PromptItems, Questioner
from qvsplit.answering.survey import Survey, SurveyOptions, WindowLimits
from qvsplit.errors import ShardDamaged, UsageError
from qvsplit.output.answer import Answer
from tests.support.fake_engine import FakeEngine, question_of, row

ROWS = [row(f"{name}.jpg") for name in "abcd"]
ITEMS = [PromptItems((one,)) for one in ROWS]
DOG = Question("Is there a dog?", "dog", choices=["yes", "no"], flag=("yes",))
HOW_MANY = Question("How many dogs?", "many", only_if=Condition("dog"))
DAMAGED = ShardDamaged("bad bytes", "shard.parquet", "page")


def survey(rule, questions, items=ITEMS, **options):
    engine = FakeEngine(rule)
    return engine, Survey(Questioner(engine, encoder_check="note"), items, questions, SurveyOptions(**options))


def shown(request):
    """The row that a request of one image is about."""
    return next(one for one in ROWS if one.content == tuple(request.features[0]))


def dogs(request):
    """Dogs in a and c."""
    if request.choices:
        yes = 0.9 if shown(request).path in ("a.jpg", "c.jpg") else 0.2
        return {"yes": yes / 2, "no": (1 - yes) / 2}
    return f"{shown(request).path} {question_of(request)}"


def test_answers_come_in_order_whatever_the_engines():
    engine, answers = survey(dogs, [Question("What?"), Question("Where?")])
    assert [answer.text for answer in answers] == [f"{one.path} {q}" for one in ROWS for q in ("What?", "Where?")]
    assert engine.calls == [8]
    assert answers.error is None


def test_a_question_waits_for_what_its_condition_asks_and_is_skipped_where_that_does_not_hold():
    engine, answers = survey(dogs, [HOW_MANY, DOG])
    many = {a.rows[0].path: a for a in answers if a.name == "many"}
    assert {path for path, a in many.items() if a.finish_reason == "skipped"} == {"b.jpg", "d.jpg"}
    assert many["a.jpg"].text == "a.jpg How many dogs?"
    assert engine.calls == [4, 2]
    assert all(a.encoder_check == "note" for a in many.values())


def test_an_error_is_its_answers_alone_and_the_first_is_known_at_the_end():
    def rule(request):
        return DAMAGED if shown(request).path == "b.jpg" else dogs(request)

    heard = []
    _, answers = survey(rule, [DOG, HOW_MANY, Question("What?")], on_answer=heard.append)
    told = list(answers)
    assert len(told) == 12
    failed = {(a.rows[0].path, a.name): a for a in told if a.error is not None}
    assert failed.keys() == {("b.jpg", "dog"), ("b.jpg", "many"), ("b.jpg", "What?")}
    assert failed["b.jpg", "dog"].error == str(DAMAGED)
    assert "dog" in failed["b.jpg", "many"].error  # not skipped: nobody knows whether there is a dog
    assert all((a.finish_reason, a.text, a.flagged) == ("error", "", None) for a in failed.values())
    assert answers.error is DAMAGED
    assert [a for a in told if a.error is None and a.finish_reason == "skipped"] == [
        a for a in told if a.name == "many" and a.rows[0].path == "d.jpg"
    ]
    assert len(heard) == 4 + 2 + 4


def test_a_row_without_features_is_its_answers_error():
    def check(one):
        if one.path == "b.jpg":
            raise UsageError("b.jpg has no features: it is failed")

    engine = FakeEngine()
    answers = Survey(Questioner(engine, check_row=check), ITEMS, [Question("What?")])
    assert [a.error for a in answers] == [None, "b.jpg has no features: it is failed", None, None]
    assert isinstance(answers.error, UsageError)
    assert engine.calls == [3]


def test_a_question_that_is_empty_and_no_image_at_all():
    _, answers = survey(dogs, [Question(" ")], ITEMS[:1])
    assert [a.error for a in answers] == ["an empty question"]
    _, answers = survey(dogs, [Question("What?")], [PromptItems(())])
    assert [a.error for a in answers] == ["no image or video to ask about"]


def test_what_is_known_is_not_asked_again():
    known = Answer((ROWS[0],), DOG.text, "no", [], 1, "scored", "note", "dog", "warn", False, recalled="2026")
    engine, answers = survey(
        dogs, [DOG, HOW_MANY], recall=lambda items, q: known if items.rows == (ROWS[0],) and q is DOG else None
    )
    told = list(answers)
    assert told[0] is known
    assert told[1].finish_reason == "skipped"  # by what is known
    assert [shown(request).path for request in engine.requests] == ["b.jpg", "c.jpg", "d.jpg", "c.jpg"]


def test_windows_are_bounded_by_questions_and_by_tokens():
    engine, answers = survey(dogs, [Question("What?")], limits=WindowLimits(questions=3))
    list(answers)
    assert engine.calls == [3, 1]
    engine, answers = survey(dogs, [DOG, HOW_MANY], limits=WindowLimits(tokens=2 * (64 + 4)))
    list(answers)
    assert engine.calls == [2, 1, 2, 1]  # both rounds of a window before the next
    large = [PromptItems((row(f"{n}.jpg", n_tokens=1000),)) for n in range(2)]
    engine, answers = survey(lambda request: "x", [Question("What?")], large, limits=WindowLimits(tokens=10))
    list(answers)
    assert engine.calls == [1, 1]


def test_nothing_is_asked_before_it_is_wanted():
    engine, answers = survey(dogs, [Question("What?")], iter(ITEMS), limits=WindowLimits(questions=1))
    assert engine.calls == []
    next(answers)
    assert engine.calls == [1]


def test_the_same_question_twice_is_asked_once():
    engine, answers = survey(dogs, [Question("What?"), Question("What?")], ITEMS[:1])
    first, second = answers
    assert first is second
    assert engine.calls == [1]


def test_an_engine_that_is_cancelled_ends_the_survey():
    engine, answers = survey(dogs, [Question("What?")], limits=WindowLimits(questions=2))
    next(answers)
    next(answers)
    engine.cancel()
    assert list(answers) == []
    assert answers.cancelled


def test_spellings_are_added_and_the_most_probable_choice_is_the_answer():
    question = Question("Mood?", "mood", choices={"calm": ["calm", "Calm."], "wild": ["wild"]})
    rule = {"calm": 0.2, "Calm.": 0.3, "wild": 0.4}
    engine, answers = survey(lambda request: rule, [question], ITEMS[:1])
    (answer,) = answers
    assert engine.requests[0].choices == ("calm", "Calm.", "wild")
    assert answer.text == "calm"
    assert answer.logprobs == pytest.approx({"calm": math.log(0.5), "wild": math.log(0.4)})
    assert answer.probabilities == pytest.approx({"calm": 5 / 9, "wild": 4 / 9})
    assert answer.choice_mass == pytest.approx(0.9)
    assert answer.level is None


def test_a_request_names_what_it_needs_and_no_more():
    engine, answers = survey(dogs, [Question("What?")], [PromptItems((ROWS[0], ROWS[1]), shared=1)])
    list(answers)
    (request,) = engine.requests
    assert request.features == tuple(one.content for one in ROWS[:2])
    assert request.shared == 1
    assert [part["type"] for part in request.messages[0]["content"]] == ["image", "image", "text"]


def test_seeds_depend_on_question_and_image_and_on_nothing_beside_them():
    def seeds(questions, items):
        engine, answers = survey(lambda request: "x", questions, items)
        list(answers)
        return {(r.features, question_of(r)): r.seed for r in engine.requests}

    all_of_them = seeds([Question("What?"), Question("Where?")], ITEMS)
    assert len(set(all_of_them.values())) == 8
    alone = seeds([Question("Where?")], ITEMS[2:3])
    assert alone.items() <= all_of_them.items()


@pytest.mark.parametrize("mass", [0.9, 1e-9])
def test_what_hangs_on_an_unsure_answer_is_asked(mass):
    """It may hold: a gate must not pass what it has not asked."""
    checks = [
        Question("Dog?", "dog", ["yes", "no"], threshold=0.9),
        Question("Gun?", "gun", ["yes", "no"], flag="yes", level="block", only_if="dog = yes"),
        Question("Cat?", "cat", ["yes", "no"], flag="yes"),
        Question("Lion?", "lion", ["yes", "no"], flag="yes", level="block", only_if="cat"),
    ]
    unsure = {"yes": 0.6 * mass, "no": 0.4 * mass}
    certain = {"yes": 0.9, "no": 0.1}

    def rule(request):
        return unsure if question_of(request) == "Dog?" else {"yes": mass, "no": 0.05 * mass} if (
            question_of(request) == "Cat?") else certain  # fmt: skip

    _, answers = survey(rule, checks, ITEMS[:1])
    by_id = {answer.id: answer for answer in answers}
    assert by_id["dog"].text == "unsure"
    assert (by_id["gun"].verdict, by_id["lion"].verdict) == ("block", "block")


def test_a_check_that_is_skipped_flags_nothing():
    checks = [
        Question("Dog?", "dog", ["yes", "no"]),
        Question("Gun?", "gun", ["yes", "no"], flag="yes", only_if="dog = yes"),
        Question("What?", "what", only_if="dog = yes"),
    ]
    _, answers = survey(lambda request: {"yes": 0.1, "no": 0.9}, checks, ITEMS[:1])
    _, gun, what = answers
    assert (gun.finish_reason, gun.flagged, gun.verdict) == ("skipped", False, "pass")
    assert (what.finish_reason, what.flagged, what.verdict) == ("skipped", None, None)
