from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qvsplit.answering.forms import forms_of


def test_case_full_stop_and_leading_blank():
    forms = forms_of({"yes": ("yes",), "no": ("no",)})
    assert forms["yes"][0] == "yes"
    assert set(forms["yes"]) == {"yes", " yes", "yes.", " yes.", "Yes", " Yes", "Yes.", " Yes."}
    assert set(forms["no"]) == {"no", " no", "no.", " no.", "No", " No", "No.", " No."}


def test_a_full_stop_that_is_given_may_be_missing():
    assert {"Yes.", "Yes", "yes", " yes."} <= set(forms_of({"yes": ("Yes.",), "no": ("No.",)})["yes"])
    assert forms_of({"stop": (".",), "go": ("go",)})["stop"] == (".", " .")


def test_a_chinese_choice_has_a_chinese_full_stop():
    assert set(forms_of({"是": ("是",), "否": ("否",)})["是"]) == {"是", " 是", "是。", " 是。"}


def test_a_form_that_two_choices_claim_goes_to_the_nearer_or_to_none():
    forms = forms_of({"US": ("US",), "us": ("us",)})
    assert {"US", "US.", " US"} <= set(forms["US"])
    assert {"us", "us.", " us"} <= set(forms["us"])
    assert not any("Us" in form for mine in forms.values() for form in mine)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=6).filter(str.strip)


@given(st.dictionaries(words, st.lists(words, min_size=1, max_size=2, unique=True), min_size=2, max_size=4))
def test_every_form_has_one_choice_and_every_spelling_stays(spellings):
    everything = [spelling for mine in spellings.values() for spelling in mine]
    if len(set(everything)) < len(everything):
        return  # refused before
    forms = forms_of({choice: tuple(mine) for choice, mine in spellings.items()})
    every_form = [form for mine in forms.values() for form in mine]
    assert len(set(every_form)) == len(every_form)
    for choice, mine in spellings.items():
        assert list(forms[choice][: len(mine)]) == mine
