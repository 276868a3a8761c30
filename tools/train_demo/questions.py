"""Questions about postcards, in several wordings, with the one right answer of each.

`WORDINGS` has for every kind of question the wordings that training uses and others that it never sees (made of
words it knows). An answer is a function of scene and question, so that it can be held against a model's word for word.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from train_demo.postcards import ALLOWED, COLOURS, KINDS, LIGHTS, SKY, Scene, third

NUMBERS = ("none", "one", "two", "three", "four")
PLURALS = {kind: f"{kind}s" for kind in (*KINDS, *LIGHTS)} | {"person": "people"}
WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
PLACE = {
    "meadow": "in a meadow",
    "sea": "by the sea",
    "mountains": "in the mountains",
    "city": "in the city",
}


Which = Literal["first", "train", "held out"]


@dataclass(frozen=True)
class Wordings:
    """Ways to ask one kind of question: those training begins with, those it ends with too, those it never sees."""

    first: tuple[str, ...]
    more: tuple[str, ...]
    held_out: tuple[str, ...]

    def of(self, which: Which) -> tuple[str, ...]:
        """The wordings of one part."""
        return {"first": self.first, "train": (*self.first, *self.more), "held out": self.held_out}[which]


# {thing}: a kind, singular or plural as `is`/`are` wants; {one}: singular; {all}: plural; {a}, {b}: two kinds
WORDINGS: dict[str, Wordings] = {
    "what": Wordings(
        (
            "What is {colour}?",
            "Which thing is {colour}?",
            "What do you see that is {colour}?",
            "Name the {colour} thing.",
            "Which thing has the colour {colour}?",
            "Say what is {colour}.",
            "Is there something {colour}, and what is it?",
            "Find something {colour}.",
        ),
        (
            "Tell me what is {colour}.",
            "Which one is {colour}?",
            "What in the picture is {colour}?",
            "Say which thing is {colour}.",
            "Do you see something {colour}? What is it?",
            "What is of the colour {colour}?",
            "Name what is {colour}.",
            "Which thing in the picture has the colour {colour}?",
            "Say what has the colour {colour}.",
            "Which thing there is {colour}?",
        ),
        ("What has the colour {colour}?", "Name something {colour}.", "Which thing do you see that is {colour}?"),
    ),
    "colour": Wordings(
        (
            "What colour {is} the {thing}?",
            "Which colour {is} the {thing}?",
            "What is the colour of the {thing}?",
            "Name the colour of the {thing}.",
            "The {thing} {is} which colour?",
            "Of what colour {is} the {thing}?",
            "Which colour {do} the {thing} have?",
            "Say what colour the {thing} {is}.",
            "{thing}: what colour?",
        ),
        (
            "Tell me the colour of the {thing}.",
            "Say the colour of the {thing}.",
            "The colour of the {thing}?",
            "Tell me what colour the {thing} {is}.",
            "In which colour {is} the {thing}?",
            "{thing}: which colour?",
            "Say of what colour the {thing} {is}.",
            "What is the colour of the {thing} in the picture?",
            "Do you see what colour the {thing} {is}?",
            "Name the colour that the {thing} {do} have.",
        ),
        (
            "What colour {do} the {thing} have?",
            "Say which colour the {thing} {is}.",
            "Which is the colour of the {thing}?",
        ),
    ),
    "how many": Wordings(
        (
            "How many {all} are there?",
            "How many {all} do you see?",
            "How many {all} are in the picture?",
            "Count the {all}.",
            "What is the number of {all}?",
            "Say how many {all} there are.",
            "How many {all} does the picture show?",
            "Name the number of {all} in the picture.",
            "How many {all} can be seen?",
            "{all}: how many?",
        ),
        (
            "Tell me how many {all} there are.",
            "Tell me the number of {all}.",
            "Name the number of {all}.",
            "What number of {all} do you see?",
            "Count all the {all}.",
            "How many {all}?",
            "Say how many {all} you see.",
            "Give the number of {all} in the picture.",
            "Count the {all} in the picture.",
            "How many {all} does it show?",
            "What is the number of {all} that you see?",
        ),
        ("How many {all} can you see?", "Say the number of {all}.", "Count the {all} that you see."),
    ),
    "where": Wordings(
        (
            "Where is the {one}?",
            "On which side is the {one}?",
            "In which part of the picture is the {one}?",
            "Where in the picture is the {one}?",
            "Where do you see the {one}?",
            "Is the {one} on the left, in the middle or on the right?",
            "Say where the {one} is.",
            "Find the {one}.",
            "{one}: where?",
        ),
        (
            "Tell me where the {one} is.",
            "In the picture, where is the {one}?",
            "Say on which side the {one} is.",
            "Where do you find the {one}?",
            "Which part of the picture has the {one}?",
            "Where can the {one} be seen?",
            "Tell me on which side the {one} is.",
            "In which part is the {one}?",
            "The {one} is where?",
        ),
        (
            "Where can you see the {one}?",
            "Say in which part of the picture the {one} is.",
            "On which side do you see the {one}?",
        ),
    ),
    "is there": Wordings(
        (
            "Is there a {one}?",
            "Are there any {all}?",
            "Do you see a {one}?",
            "Does the picture show a {one}?",
            "Can a {one} be seen?",
            "Is a {one} in the picture?",
            "Do you see any {all}?",
            "Are {all} in the picture?",
            "Does it have any {all}?",
        ),
        (
            "Tell me if there is a {one}.",
            "Is there any {one} in the picture?",
            "Do you see any {one}?",
            "Are there {all} in the picture?",
            "Can you find a {one}?",
            "Can any {all} be seen?",
            "Say if you see a {one}.",
            "Does the picture have a {one}?",
            "Is a {one} there?",
            "Does it show a {one}?",
        ),
        ("Can you see a {one}?", "Does it show any {all}?", "Is any {one} there?"),
    ),
    "left of": Wordings(
        (
            "Which is further left, the {a} or the {b}?",
            "What is more to the left, the {a} or the {b}?",
            "Which of the two is further left: the {a} or the {b}?",
            "Which thing is left of the other, the {a} or the {b}?",
            "Of the {a} and the {b}, which is more to the left?",
            "Of the {a} and the {b}, say which is further left.",
            "Is the {a} or the {b} further left?",
        ),
        (
            "Tell me which is further left, the {a} or the {b}.",
            "Is it the {a} or the {b} that is further left?",
            "The {a} or the {b}: which is more to the left?",
            "Which one is further left, the {a} or the {b}?",
            "Of the {a} and the {b}, which is left of the other?",
            "Say what is more to the left, the {a} or the {b}.",
            "The {a} and the {b}: say which is further left.",
        ),
        (
            "Is the {a} or the {b} more to the left?",
            "Say which is further left, the {a} or the {b}.",
            "Which of the two is left of the other: the {a} or the {b}?",
        ),
    ),
    "day or night": Wordings(
        (
            "Is it day or night?",
            "Day or night?",
            "What time of day is it?",
            "Is this by day or at night?",
            "Was the picture made by day or at night?",
            "Say if it is day or night.",
            "Which is it, day or night?",
            "Does the picture show day or night?",
        ),
        (
            "Tell me if it is day or night.",
            "Is the picture made by day or at night?",
            "Say which it is, night or day.",
            "Night or day?",
            "Is it night or day?",
            "Is it by day or at night?",
            "What does it show, day or night?",
            "Say what time of day it is.",
            "What time of day does the picture show?",
        ),
        ("Is this day or night?", "Do you see day or night?", "Was it made at night or by day?"),
    ),
    "weather": Wordings(
        (
            "What is the weather?",
            "How is the weather?",
            "What is the weather like?",
            "What weather is it?",
            "Is it clear, cloudy, rainy or snowy?",
            "Say what the weather is like.",
            "What weather does the picture show?",
        ),
        (
            "Tell me what the weather is like.",
            "What is the weather like in the picture?",
            "How is the weather in the picture?",
            "Name the weather.",
            "What weather do you see?",
            "Is the weather clear, cloudy, rainy or snowy?",
            "Tell me how the weather is.",
        ),
        ("Which weather is it?", "Say how the weather is.", "What is the weather in the picture?"),
    ),
    "place": Wordings(
        (
            "Where was the picture made?",
            "Which place is this?",
            "What place does the picture show?",
            "Where are we?",
            "Is this a meadow, the sea, the mountains or the city?",
            "Say which place this is.",
            "Name the place.",
        ),
        (
            "Tell me where we are.",
            "Tell me which place this is.",
            "Where is this?",
            "What place do you see?",
            "Say what place this is.",
            "Where was it made?",
            "Is it a meadow, the sea, the mountains or the city?",
            "In which place was the picture made?",
            "Which place do you see?",
        ),
        ("Which place does the picture show?", "What place is this?", "Say where we are."),
    ),
    "list": Wordings(
        (
            "What do you see?",
            "List what you see.",
            "What is in the picture?",
            "Name everything you see.",
            "Which things are in the picture?",
            "What does the picture show?",
            "List the things in the picture.",
            "What can be seen?",
            "List everything.",
        ),
        (
            "Tell me what you see.",
            "Say what you see.",
            "Name everything that can be seen.",
            "What are the things in the picture?",
            "List everything in the picture.",
            "List all things.",
            "Which things do you see?",
            "What can be seen in the picture?",
            "Name all you see.",
            "List the things you see.",
            "Say what is in the picture.",
        ),
        ("What can you see?", "List everything you see.", "Name the things in the picture."),
    ),
    "describe": Wordings(
        (
            "Describe the picture.",
            "Describe the picture in one sentence.",
            "Describe it in one sentence.",
            "Say in one sentence what the picture shows.",
            "Give a description of the picture.",
            "Say in one sentence what you see.",
            "Describe what you see.",
        ),
        (
            "Tell me in one sentence what you see.",
            "Describe everything in one sentence.",
            "Give me a description.",
            "Say in one sentence what can be seen.",
            "Describe this.",
            "In one sentence, what do you see?",
            "In one sentence, describe the picture.",
            "A description, please.",
            "Give a description of what you see.",
            "Tell me in one sentence what the picture shows.",
        ),
        (
            "Give a description in one sentence.",
            "Describe what the picture shows.",
            "Describe what you see in one sentence.",
        ),
    ),
    "two pictures": Wordings(
        (
            "Which picture has more {all}?",
            "Which of the two pictures has more {all}?",
            "Which picture shows more {all}?",
            "Are there more {all} in the first or the second picture?",
            "Where are more {all}, in the first or the second picture?",
            "Say which picture has more {all}.",
        ),
        (
            "Tell me which picture has more {all}.",
            "Where do you see more {all}, in the first or the second picture?",
            "Which one has more {all}, the first or the second picture?",
            "Does the first or the second picture have more {all}?",
            "Which of the two shows more {all}?",
            "Of the two pictures, which has more {all}?",
            "Say in which picture there are more {all}.",
        ),
        ("In which picture are more {all}?", "Which of the two pictures shows more {all}?"),
    ),
}
KINDS_OF_QUESTION = tuple(WORDINGS)
OPENINGS = ("", "", "", "", "Please: ", "Look at the picture. ", "One question: ", "Hello! ", "Tell me: ")


@dataclass(frozen=True)
class Question:
    """One question about a scene (or two), as text, with the right answer. `about` is what it asks for."""

    kind: str
    text: str
    answer: str
    about: Mapping[str, str]


def ask(scene: Scene, kind: str, rng: random.Random, *, wordings: Which) -> Question | None:
    """A question of `kind` about `scene`; None where the scene gives no such question."""
    about = _CHOOSERS[kind](scene, rng) if kind in _CHOOSERS else {}
    if about is None:
        return None
    answer = truth(scene, kind, about)
    assert answer is not None
    return _worded(kind, about, answer, rng, wordings)


def ask_two(first: Scene, second: Scene, rng: random.Random, *, wordings: Which) -> Question:
    """A question about two postcards together."""
    seen = [group.kind for scene in (first, second) for group in scene.groups]
    thing = rng.choice(seen) if seen and rng.random() < 0.9 else rng.choice(KINDS)
    counts = [_count(scene, thing) for scene in (first, second)]
    answer = "both the same" if counts[0] == counts[1] else ("the first" if counts[0] > counts[1] else "the second")
    return _worded("two pictures", {"kind": thing}, answer, rng, wordings)


def truth(scene: Scene, kind: str, about: Mapping[str, str]) -> str | None:
    """The right answer to a question of `kind` about `scene`; None where it has no one right answer there."""
    return _ANSWERS[kind](scene, about)


def some_questions(scene: Scene, number: int, rng: random.Random, *, wordings: Which) -> list[Question]:
    """`number` questions about one scene, of kinds drawn by how hard they are to learn."""
    shares = _FIRST_SHARES if wordings == "first" else _SHARES
    asked: list[Question] = []
    while len(asked) < number:
        question = ask(scene, rng.choices(list(shares), list(shares.values()))[0], rng, wordings=wordings)
        if question:
            asked.append(question)
    return asked


def _worded(kind: str, about: Mapping[str, str], answer: str, rng: random.Random, wordings: Which) -> Question:
    text = rng.choice(WORDINGS[kind].of(wordings)).format(**_slots(about))
    if wordings != "first":
        text = text.replace(" a orange", " an orange")
    text = text[0].upper() + text[1:]
    opening = rng.choice(OPENINGS)
    if opening.endswith(": ") and rng.random() < 0.5:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2:
        text = text.replace("colour", "color")
    if wordings != "held out" and rng.random() < 0.1:  # as people type
        text = text[0].lower() + text[1:].rstrip("?.")
    return Question(kind, opening + text, answer, about)


def _slots(about: Mapping[str, str]) -> dict[str, str]:
    """What a wording may name."""
    slots = dict(about)
    if "kind" in about:
        kind, shade, many = about["kind"], about.get("shade", ""), about.get("many", "")
        slots["one"], slots["all"] = f"{shade} {kind}".strip(), f"{shade} {PLURALS[kind]}".strip()
        slots["thing"] = PLURALS[kind] if many else kind
        slots["is"], slots["do"] = ("are", "do") if many else ("is", "does")
    return slots


# -- choosing what to ask for: None where the scene gives no such question ---------------------------------------------

_About = dict[str, str] | None


def _things(scene: Scene) -> list[str]:
    """Kinds that are seen, lights included, in the order of every list."""
    return [group.kind for group in scene.groups] + ([scene.light_kind] if scene.light else [])


def _count(scene: Scene, kind: str) -> int:
    group = scene.group(kind)
    return group.count if group else 0


def _singles(scene: Scene) -> list[str]:
    return [kind for kind in _things(scene) if _count(scene, kind) == 1]


def _absent(scene: Scene, rng: random.Random) -> str:
    return rng.choice([kind for kind in (*KINDS, *LIGHTS) if not scene.group(kind)])


def _choose_what(scene: Scene, rng: random.Random) -> _About:
    sure = [group for group in scene.groups if _answer_what(scene, {"colour": group.colour})]
    return {"colour": rng.choice(sure).colour} if sure else None


def _choose_colour(scene: Scene, rng: random.Random) -> _About:
    if not scene.groups or rng.random() < 0.1:
        return {"kind": rng.choice([kind for kind in KINDS if not scene.group(kind)])}
    group = rng.choice(scene.groups)
    return {"kind": group.kind} | ({"many": "yes"} if group.count > 1 else {})


def _choose_how_many(scene: Scene, rng: random.Random) -> _About:
    return {"kind": rng.choice(scene.groups).kind if scene.groups and rng.random() < 0.88 else rng.choice(KINDS)}


def _choose_where(scene: Scene, rng: random.Random) -> _About:
    if rng.random() < 0.1:
        return {"kind": _absent(scene, rng)}
    singles = _singles(scene)
    return {"kind": rng.choice(singles)} if singles else None


def _choose_is_there(scene: Scene, rng: random.Random) -> _About:
    """Half the answers are yes; a third of the questions ask for a colour too."""
    if rng.random() < 0.35 and scene.groups:
        group = rng.choice(scene.groups)
        shade = group.colour if rng.random() < 0.5 else rng.choice([c for c in COLOURS if c != group.colour])
        return {"kind": group.kind, "shade": shade}
    seen = _things(scene)
    if seen and rng.random() < 0.5:
        return {"kind": rng.choice(seen)}
    likely = [kind for kind in (*ALLOWED[scene.place], *SKY, scene.light_kind) if kind not in seen]
    return {"kind": rng.choice(likely) if likely and rng.random() < 0.8 else _absent(scene, rng)}


def _choose_left_of(scene: Scene, rng: random.Random) -> _About:
    singles = _singles(scene)
    pairs = [{"a": a, "b": b} for a in singles for b in singles if a != b and _answer_left_of(scene, {"a": a, "b": b})]
    return rng.choice(pairs) if pairs else None


# -- answers: None where the scene has no one right answer -------------------------------------------------------------


def _answer_what(scene: Scene, about: Mapping[str, str]) -> str | None:
    found = [group for group in scene.groups if group.colour == about["colour"]]
    if len(found) != 1 or about["colour"] in ("yellow", "white"):  # as sun and moon are
        return None
    return f"the {found[0].kind if found[0].count == 1 else PLURALS[found[0].kind]}"


def _answer_colour(scene: Scene, about: Mapping[str, str]) -> str | None:
    group = scene.group(about["kind"])
    return group.colour if group else f"there is no {about['kind']}"


def _answer_how_many(scene: Scene, about: Mapping[str, str]) -> str | None:
    return NUMBERS[_count(scene, about["kind"])]


def _answer_where(scene: Scene, about: Mapping[str, str]) -> str | None:
    group = scene.group(about["kind"])
    if group is None:
        return f"there is no {about['kind']}"
    return WHERE[third(group.spots[0][0])] if group.count == 1 else None


def _answer_is_there(scene: Scene, about: Mapping[str, str]) -> str | None:
    group = scene.group(about["kind"])
    return "yes" if group and about.get("shade", group.colour) == group.colour else "no"


def _answer_left_of(scene: Scene, about: Mapping[str, str]) -> str | None:
    if any(_count(scene, kind) != 1 for kind in about.values()):
        return None
    a, b = (group.spots[0][0] for kind in about.values() if (group := scene.group(kind)))
    if abs(a - b) <= 0.12:
        return None
    return f"the {about['a'] if a < b else about['b']}"


def _answer_list(scene: Scene, about: Mapping[str, str]) -> str | None:
    return ", ".join(_named(scene, kind, coloured=False) for kind in _things(scene)) or "nothing"


def _answer_describe(scene: Scene, about: Mapping[str, str]) -> str | None:
    named = [_named(scene, kind, coloured=True) for kind in _things(scene)]
    told = f"A {scene.weather} {scene.time} {PLACE[scene.place]}"
    if named:
        told += " with " + (named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1])
    return told + "."


def _named(scene: Scene, kind: str, *, coloured: bool) -> str:
    group = scene.group(kind)
    assert group is not None
    if kind in LIGHTS:
        return f"the {kind}"
    colour = f"{group.colour} " if coloured else ""
    if group.count > 1:
        return f"{NUMBERS[group.count]} {colour}{PLURALS[kind]}"
    return f"{'an' if colour.startswith('o') else 'a'} {colour}{kind}"


_CHOOSERS: dict[str, Callable[[Scene, random.Random], _About]] = {
    "what": _choose_what, "colour": _choose_colour, "how many": _choose_how_many, "where": _choose_where,
    "is there": _choose_is_there, "left of": _choose_left_of,
}  # fmt: skip
_ANSWERS: dict[str, Callable[[Scene, Mapping[str, str]], str | None]] = {
    "what": _answer_what, "colour": _answer_colour, "how many": _answer_how_many, "where": _answer_where,
    "is there": _answer_is_there, "left of": _answer_left_of, "day or night": lambda scene, _: scene.time,
    "weather": lambda scene, _: scene.weather, "place": lambda scene, _: PLACE[scene.place], "list": _answer_list,
    "describe": _answer_describe,
}  # fmt: skip
_FIRST_SHARES = {
    "what": 3, "colour": 3, "how many": 4, "where": 3, "is there": 3, "left of": 4, "day or night": 0.7, "weather": 1,
    "place": 0.7, "list": 3, "describe": 4,
}  # fmt: skip
_SHARES = {
    "what": 3, "colour": 2, "how many": 6, "where": 2, "is there": 4, "left of": 3, "day or night": 1, "weather": 1,
    "place": 1, "list": 4, "describe": 6,
}  # fmt: skip
