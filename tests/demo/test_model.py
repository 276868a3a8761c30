"""The embedded model gives right answers, and right ones only from the right features."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from train_demo import evaluate, postcards, questions
from train_demo.evaluate import (
    accuracy,
    as_checks,
    blind,
    from_full_model,
    from_shards,
    held_out_cards,
    mark,
    shuffled,
)

from qvsplit import demo
from qvsplit.ask import load_session
from qvsplit.checkpoints.opening import DEMO_FOLDER
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store

CARDS = 30
HELD_AGAINST_THE_FULL_MODEL = 6  # 5 questions of each and more: every kind


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Held-out postcards as files, and a session on their store."""
    folder = tmp_path_factory.mktemp("held-out")
    drawn = held_out_cards(CARDS, folder)
    store = tmp_path_factory.mktemp("stores") / "held-out"
    extract_files([folder], out=store, options=ExtractOptions(model="demo"))
    return folder, drawn, load_session(open_store(store))


@pytest.fixture(scope="module")
def from_the_store(cards):
    """All questions about them, answered from the store."""
    _, drawn, session = cards
    return mark(drawn, from_shards(session))


def test_it_answers_on_images_and_wordings_that_training_never_saw(from_the_store):
    shares = accuracy(from_the_store)
    assert shares.keys() == set(questions.KINDS_OF_QUESTION)
    # the aims are 0.95 and 0.90, and docs/demo.md has the true figures on ten times as many; this is 30 images' noise
    assert sum(one.exact for one in from_the_store) / len(from_the_store) > 0.92
    assert min(shares.values()) > 0.8, shares


def normalised(text):
    return text.lower().replace("color", "colour").rstrip("?. ")


def texts(which):
    """Every question that can be asked in these wordings, as far as its form goes: openings, capitals and all aside."""
    slots = [{"kind": k, "shade": c, "many": m} for k in postcards.KINDS for c in ("", "red") for m in ("", "yes")]
    slots += [{"kind": light, "shade": "", "many": ""} for light in postcards.LIGHTS]
    pairs = [{"a": "dog", "b": "car"}, {"a": "car", "b": "dog"}]
    found = set()
    for wordings in questions.WORDINGS.values():
        for wording in wordings.of(which):
            for about in slots:
                for pair in pairs:
                    bare = wording.format(**questions._slots(about), **pair, colour="red")
                    found |= {normalised(opening + bare) for opening in {"", *questions.OPENINGS}}
    return found


def test_no_question_of_the_evaluation_can_occur_in_training():
    train, held_out = texts("train"), texts("held out")
    assert len(train) > 5_000
    assert len(held_out) > 1_000
    assert not train & held_out
    assert {normalised(question) for question in demo.truths()[0]} <= held_out
    assert all(len(wordings.held_out) >= 2 for wordings in questions.WORDINGS.values())


def test_from_the_store_is_exactly_the_full_model(cards, from_the_store):
    folder, drawn, _ = cards
    some = drawn[:HELD_AGAINST_THE_FULL_MODEL]
    full = mark(some, from_full_model(DEMO_FOLDER, folder))
    mine = [one for one in from_the_store if all(card in some for card in one.cards)]
    assert {one.question.kind for one in full} == set(questions.KINDS_OF_QUESTION)
    assert [(one.question, one.answer) for one in full] == [(one.question, one.answer) for one in mine]
    assert accuracy(full) == accuracy(mine)


def test_checks_are_right_at_least_as_often_as_greedy_answers(cards, from_the_store):
    session = cards[2]
    checked = as_checks(session, from_the_store)
    greedy = [one for one in from_the_store if one.question.kind not in {"list", "describe"}]
    assert [one.question for one in checked] == [one.question for one in greedy]
    assert sum(one.exact for one in checked) >= sum(one.exact for one in greedy) > 0.9 * len(greedy)


def test_with_the_features_of_other_images_it_falls_to_chance(cards, from_the_store):
    """And what it then says is true of those other images."""
    _, drawn, session = cards
    answerer, others = shuffled(session, drawn)
    swapped = [one for one in mark(drawn, answerer) if len(one.cards) == 1]
    truths = [questions.truth(others[m.cards[0].name].scene, m.question.kind, m.question.about) for m in swapped]
    same = np.mean([truth == one.question.answer for truth, one in zip(truths, swapped, strict=True)])
    right = np.mean([one.exact for one in swapped])
    assert right < same + 0.05  # where the other image happens to have the same answer
    assert right < 0.4
    for kind in ("list", "describe"):
        assert accuracy(swapped)[kind] <= blind(from_the_store)[kind] + 0.05
    of_the_other = [one.answer == truth for one, truth in zip(swapped, truths, strict=True) if truth is not None]
    assert np.mean(of_the_other) > 0.9


def test_turned_and_see_through_files_give_the_answers_of_the_upright_ones(cards, tmp_path):
    """Left is left whatever EXIF says of the file's rows; what is transparent lies over white."""
    _, drawn, _ = cards
    card = next(card for card in drawn if {"where", "left of"} <= {asked.kind for asked in card.asked})
    image = postcards.draw(card.scene, 420, round(420 / card.scene.aspect), smooth=2)
    ways = Image.Transpose
    turns = {1: None, 2: ways.FLIP_LEFT_RIGHT, 3: ways.ROTATE_180, 4: ways.FLIP_TOP_BOTTOM, 5: ways.TRANSPOSE,
             6: ways.ROTATE_90, 7: ways.TRANSVERSE, 8: ways.ROTATE_270}  # fmt: skip
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = image if turn is None else image.transpose(turn)
        turned.save(tmp_path / f"{orientation}.png", exif=exif)
    clear = np.dstack([np.asarray(image), np.full((image.height, image.width), 255, np.uint8)])
    clear[0:2, 0:2, 3] = 0  # a corner, white anyway
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    extract_files([tmp_path], out=tmp_path / "store", options=ExtractOptions(model="demo"))
    store = open_store(tmp_path / "store")
    session = load_session(store)
    answers = {row.path: [session.answer(row, asked.text).text for asked in card.asked] for row in store}
    assert len(answers) == 9
    assert all(these == answers["1.png"] for these in answers.values()), answers


def test_two_images_together(cards):
    """Row order is prompt order: swapped, the answer turns round."""
    _, drawn, session = cards
    answer = from_shards(session)
    turned = total = 0
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        for kind in postcards.KINDS:
            counts = [group.count if (group := card.scene.group(kind)) else 0 for card in (first, second)]
            if abs(counts[0] - counts[1]) < 2 or total >= 12:
                continue
            asked = f"In which image are more {questions.PLURALS[kind]}?"
            said = [answer([first, second], asked), answer([second, first], asked)]
            right = ["the first", "the second"] if counts[0] > counts[1] else ["the second", "the first"]
            total += 1
            turned += said == right
    assert total >= 8
    assert turned / total > 0.75, (turned, total)


def test_the_evaluation_marks_what_it_is_told():
    scene = postcards.make_scene("mark")
    card = evaluate.Card("a", scene, (questions.Question("weather", "Weather?", scene.weather, {}),))
    assert [one.exact for one in mark([card], lambda cards, question: scene.weather)] == [True]
    assert [one.exact for one in mark([card], lambda cards, question: "mild")] == [False]
