"""The usual forms of a choice: whoever asks for `yes` or `no` means a model's `Yes.` as well. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_LITERAL, _AROUND, _CASE = range(3)  # how much a form differs: not, by blank or full stop, by case
_FULL_STOPS = (".", "。")


def forms_of(spellings: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Give every form of each choice: its spellings, then these with other case, full stop and leading blank.

    A form has one choice. One that could be of several is of the choice that is the least changed for it, and where
    that is a tie of none: with the choices `US` and `us`, `us.` is one of `us`, and `Us` of neither.
    """
    claims: dict[str, dict[str, int]] = {}
    for choice, mine in spellings.items():
        for spelling in mine:
            for form, change in _variants(spelling):
                of_form = claims.setdefault(form, {})
                of_form[choice] = min(change, of_form.get(choice, change))
    owners = {form: _least(of_form) for form, of_form in claims.items()}
    return {
        choice: tuple(dict.fromkeys([*mine, *(form for form, owner in owners.items() if owner == choice)]))
        for choice, mine in spellings.items()
    }


def _least(changes: Mapping[str, int]) -> str | None:
    """Give the choice with the least change; None where two have it."""
    least = min(changes.values())
    choices = [choice for choice, change in changes.items() if change == least]
    return choices[0] if len(choices) == 1 else None


def _variants(spelling: str) -> Iterator[tuple[str, int]]:
    """Give the forms of one spelling, and how each differs."""
    lower = spelling.lower()
    cased = dict.fromkeys((spelling, lower, spelling[:1].upper() + spelling[1:], lower[:1].upper() + lower[1:]))
    for text in cased:
        for around in _with_and_without_stop(text):
            for form in (around, f" {around}"):
                change = _CASE if text != spelling else _AROUND if form != spelling else _LITERAL
                yield form, change


def _with_and_without_stop(text: str) -> tuple[str, ...]:
    for stop in _FULL_STOPS:
        if text.endswith(stop):
            bare = text.removesuffix(stop)
            return (text, bare) if bare.strip() else (text,)
    is_chinese_or_japanese = "\u3040" <= text[-1:] <= "\u9fff"
    return text, text + (_FULL_STOPS[1] if is_chinese_or_japanese else _FULL_STOPS[0])
