"""Checks: read from TOML or YAML, told what is wrong with them, judged by probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qvsplit.answering.checks import (
    Condition,
    Question,
    normalised,
    outcome,
    read_checks,
    rounds,
    with_choices,
)
from qvsplit.errors import UsageError

GOOD = """
[[check]]
id = "person"
question = "Is there a person?"
choices = ["yes", "no"]
flag = "yes"
level = "info"

[[check]]
id = "mood"
question = "What is the mood?"
choices = { calm = ["calm", "Calm."], wild = ["wild"] }
threshold = 0.7
only_if = "person"

[[check]]
id = "name"
question = "Who is it?"
only_if = "mood = calm"
"""
SAME_IN_YAML = """
- id: person
  question: Is there a person?
  choices: ["yes", "no"]
  flag: "yes"
  level: info
- {id: mood, question: "What is the mood?", choices: {calm: [calm, Calm.], wild: [wild]}, threshold: 0.7, only_if: person}
- {id: name, question: "Who is it?", only_if: mood = calm}
"""


def written(folder, text, name="checks.toml"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_toml_and_yaml_say_the_same(tmp_path):
    person, mood, name = read_checks(written(tmp_path, GOOD))
    assert person == Question(
        "Is there a person?", "person", {"yes": ("yes",), "no": ("no",)}, ("yes",), None, "info", None
    )
    assert mood.choices == {"calm": ("calm", "Calm."), "wild": ("wild",)}
    assert (mood.threshold, mood.only_if) == (0.7, Condition("person"))
    assert (name.choices, name.only_if) == (None, Condition("mood", "calm"))
    assert read_checks(written(tmp_path, SAME_IN_YAML, "checks.yaml")) == [person, mood, name]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('id = "mood"', 'id = "person"', "two checks have the id person"),
        ('id = "mood"', 'id = "my mood"', "needs an id"),
        ('id = "mood"', "id = 3", "needs an id"),
        ('question = "Who is it?"', 'question = " "', r"check 3 \(name\): needs a question"),
        ('choices = ["yes", "no"]', 'choices = ["yes"]', "at least two choices"),
        ('choices = ["yes", "no"]', 'choices = ["yes", "yes"]', "twice"),
        ('choices = ["yes", "no"]', 'choices = "yes"', "a list, or a table"),
        ('choices = ["yes", "no"]', "choices = [true, false]", "put it in quotes"),
        ('["calm", "Calm."]', '["calm", "wild"]', "spelt the same"),
        ('["calm", "Calm."]', "[]", "spellings of calm"),
        ('flag = "yes"', 'flag = "maybe"', "flag maybe is none of its choices"),
        ("threshold = 0.7", "threshold = 7", "0 to 1"),
        ("threshold = 0.7", "threshold = true", "0 to 1"),
        ('level = "info"', 'level = "fatal"', "one of info, warn, block"),
        ('flag = "yes"', "", "a level needs flag"),
        ('only_if = "person"', 'only_if = "nobody"', "names nobody"),
        ('only_if = "person"', 'only_if = "mood"', "names mood"),
        ('only_if = "person"', 'only_if = "person = perhaps"', "perhaps is no choice of person"),
        ('only_if = "mood = calm"', 'only_if = "mood"', "mood has no flag"),
        ('only_if = "mood = calm"', "only_if = 3", "only_if is"),
        ('level = "info"', 'level = "info"\nonly_if = "mood = calm"', "in a circle: mood, name, person"),
        ('question = "Who is it?"', 'question = "Who?"\nthreshold = 0.5', "needs choices"),
        ('level = "info"', 'levl = "info"', "levl is not known"),
        ("[[check]]", "[[chek]]", "no checks|not known"),
        ("[[check]]", "[[check", "is not TOML"),
        pytest.param("[[check]]", "check = " + "[" * 20_000, "is not TOML", id="nested"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_check(tmp_path, old, new, said):
    assert old in GOOD
    file = written(tmp_path, GOOD.replace(old, new, 1) if "chek" not in new else GOOD.replace(old, new))
    with pytest.raises(UsageError, match=said) as caught:
        read_checks(file)
    assert "checks.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- id: x\n  question: q\n  choices: [yes, no]", "put it in quotes"),
        ("- id: [", "is not YAML"),
        ("- id: x\n  question: 2024-13-45", "is not YAML"),
        ("", "no checks"),
        ("- just text", "not a table"),
        ("!!python/object/apply:os.system ['false']", "is not YAML"),
        pytest.param("[" * 20_000, "is not YAML", id="nested"),
    ],
)
def test_yaml_that_is_no_checks(tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        read_checks(written(tmp_path, text, "checks.yml"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_checks(tmp_path / "none.toml")


def test_probabilities_add_up_and_keep_their_order():
    probabilities = normalised({"yes": -2.0, "no": -2.0 + math.log(3)})
    assert list(probabilities) == ["yes", "no"]
    assert probabilities == pytest.approx({"yes": 0.25, "no": 0.75})
    assert normalised({"a": -5000.0, "b": -5000.0}) == {"a": 0.5, "b": 0.5}
    assert normalised({"a": -math.inf, "b": -math.inf}) == {"a": 0.0, "b": 0.0}  # none of them: nothing is flagged
    with pytest.raises(ValueError, match="none"):
        normalised({"a": math.nan, "b": -1.0})


def test_an_answer_is_flagged_from_the_threshold_on():
    check = Question("?", "x", {"a": ("a",), "b": ("b",), "c": ("c",)}, flag=("a", "b"), threshold=0.4)
    assert outcome(check, {"a": 0.25, "b": 0.15, "c": 0.6}, 1.0).flagged is True  # together; though c is more probable
    assert outcome(check, {"a": 0.25, "b": 0.15, "c": 0.6}, 1.0).answer == "c"
    assert outcome(check, {"a": 0.2, "b": 0.15, "c": 0.65}, 1.0).flagged is False
    assert outcome(with_choices(Question("?"), ["a", "b"]), {"a": 0.5, "b": 0.5}, 1.0).answer == "a"


def test_a_choice_that_is_flagged_twice_counts_once(tmp_path):
    text = GOOD.replace('flag = "yes"', 'flag = ["yes", "yes"]')
    assert read_checks(written(tmp_path, text))[0].flag == ("yes",)


def test_choices_from_python_may_be_a_list_or_have_one_spelling():
    same = {"yes": ("yes",), "no": ("no",)}
    for given in (["yes", "no"], ("yes", "no"), {"yes": "yes", "no": "no"}, {"yes": ["yes"], "no": ("no",)}):
        assert Question("?", choices=given).choices == same
    for given in ([], {}, {"yes": ()}, {"yes": "yes", "no": "yes"}, ["yes"]):
        with pytest.raises(UsageError):
            Question("?", choices=given)


def test_a_condition_on_what_is_not_asked():
    with pytest.raises(UsageError, match="only_if names person, which is no other check that is asked"):
        rounds([Question("?", "x", only_if=Condition("person"))])


def test_without_a_flag_a_threshold_makes_it_unsure():
    check = Question("?", "x", {"a": ("a",), "b": ("b",)}, threshold=0.8)
    assert outcome(check, {"a": 0.79, "b": 0.21}, 1.0).answer == "unsure"
    assert outcome(check, {"a": 0.8, "b": 0.2}, 1.0).answer == "a"
    assert outcome(check, {"a": 0.8, "b": 0.2}, 1.0).flagged is None


@pytest.mark.parametrize("flag", ["a", ()])
def test_what_the_model_would_hardly_have_said_is_no_answer(flag):
    check = Question("?", "x", {"a": ("a",), "b": ("b",)}, flag=flag)
    wrong = outcome(check, {"a": 0.9999, "b": 0.0001}, 1e-34)
    assert (wrong.answer, wrong.flagged, wrong.uncertain) == ("unsure", None, True)
    assert wrong.score == (0.9999 if flag else None)
    assert outcome(check, {"a": 0.9, "b": 0.1}, 0.499).uncertain
    right = outcome(check, {"a": 0.9, "b": 0.1}, 0.5)
    assert (right.answer, right.flagged, right.uncertain) == ("a", True if flag else None, False)
    anything = replace(check, min_choice_mass=0.0)
    assert not outcome(anything, {"a": 0.9, "b": 0.1}, 1e-300).uncertain
    assert outcome(anything, {"a": 0.0, "b": 0.0}, 0.0).uncertain  # the model excludes them all


def test_all_choices_together_are_certain():
    for number in range(100):
        logs = {name: -0.1 * number * place for place, name in enumerate("abc")}
        check = Question("?", choices=list("abc"), flag=("a", "b", "c"), threshold=1.0)
        assert outcome(check, normalised(logs), 1.0).flagged


def test_no_choice_is_called_as_an_answer_that_is_none():
    with pytest.raises(UsageError, match="unsure is what an answer is called that is no choice"):
        Question("?", choices=["yes", "no", "unsure"])


@pytest.mark.parametrize(
    ("other", "condition", "said"),
    [
        ({}, "dog", "dog has no flag"), ({}, "dog = Yes", "Yes is no choice of dog"),
        ({"flag": "yes"}, "x", "names x, which is no other"),
    ],
)  # fmt: skip
def test_a_condition_that_never_holds_is_refused_from_python_too(other, condition, said):
    checks = [Question("Dog?", "dog", ["yes", "no"], **other), Question("?", "x", ["a", "b"], only_if=condition)]
    with pytest.raises(UsageError, match=said):
        rounds(checks)


def test_the_least_choice_mass_is_that_of_the_check_or_of_the_file(tmp_path):
    text = "min_choice_mass = 0.2\n" + GOOD.replace('level = "info"', 'level = "info"\nmin_choice_mass = 0.9')
    assert [check.min_choice_mass for check in read_checks(written(tmp_path, text))][:2] == [0.9, 0.2]
    assert read_checks(written(tmp_path, GOOD))[0].min_choice_mass == 0.5
    for wrong in ("1.5", "-0.1", '"half"', "true"):
        with pytest.raises(UsageError, match="min_choice_mass is a probability, 0 to 1"):
            read_checks(written(tmp_path, f"min_choice_mass = {wrong}\n" + GOOD))
        with pytest.raises(UsageError, match="min_choice_mass is a probability, 0 to 1"):
            read_checks(written(tmp_path, GOOD.replace('level = "info"', f"min_choice_mass = {wrong}")))
    with pytest.raises(UsageError, match="min_choice_mass"):
        Question("?", choices=["a", "b"], min_choice_mass=None)


def test_rounds_follow_the_conditions(tmp_path):
    asked = read_checks(written(tmp_path, GOOD))
    assert [[question.id for question in level] for level in rounds(asked[::-1])] == [["person"], ["mood"], ["name"]]
