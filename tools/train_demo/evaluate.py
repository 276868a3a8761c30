"""Exact answers of the demo checkpoint on postcards and wordings that its training never saw.

    python -m train_demo.evaluate CHECKPOINT [--pictures 200] [--table FILE.md]

Postcards are drawn into files of many sizes, formats and shapes, extracted, and asked from the shards alone; the full
model of transformers answers the same questions from the pixels; and the shards' answers are asked for again with the
features of other pictures, which is what chance looks like. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from qvsplit.answering.checks import Question as Check
from qvsplit.ask import Session, load_session
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store
from train_demo import postcards, questions
from train_demo.questions import Question

FORMATS = ("card {:04d}.jpg", "card {:04d}.png", "card {:04d}.webp")
Answerer = Callable[[Sequence["Card"], str], str]


@dataclass(frozen=True)
class Card:
    """A held-out postcard in a file, and one question of every kind that it gives."""

    name: str
    scene: postcards.Scene
    asked: tuple[Question, ...]


@dataclass(frozen=True)
class Marked:
    """One question about some cards, and what was answered."""

    cards: tuple[Card, ...]
    question: Question
    answer: str

    @property
    def exact(self) -> bool:
        """Whether the answer is the truth, word for word."""
        return self.answer == self.question.answer


def held_out_cards(number: int, folder: Path) -> list[Card]:
    """Draw `number` postcards into `folder`."""
    cards = []
    for index in range(number):
        rng = random.Random(f"evaluation questions {index}")
        scene = postcards.make_scene(f"evaluation {index}")
        asked = [
            questions.ask(scene, kind, rng, wordings="held out")
            for kind in questions.KINDS_OF_QUESTION
            if kind != "two pictures"
        ]
        card = Card(FORMATS[index % len(FORMATS)].format(index), scene, tuple(one for one in asked if one))
        width = round(math.sqrt(31_000 * scene.aspect) * rng.uniform(0.9, 5))
        picture = postcards.draw(scene, width, round(width / scene.aspect), smooth=2)
        picture.save(folder / card.name, quality=rng.randint(80, 95))  # which a PNG does not heed
        cards.append(card)
    return cards


def mark(cards: Sequence[Card], answer: Answerer) -> list[Marked]:
    """All the cards' questions, and one about each card and the next together, answered by `answer`."""
    marked = [Marked((card,), asked, answer([card], asked.text)) for card in cards for asked in card.asked]
    for first, second in itertools.pairwise(cards):
        rng = random.Random(f"evaluation {first.name} {second.name}")
        asked = questions.ask_two(first.scene, second.scene, rng, wordings="held out")
        marked.append(Marked((first, second), asked, answer([first, second], asked.text)))
    return marked


def from_shards(session: Session) -> Answerer:
    """Answers from a store of the cards."""
    rows = {row.path: row for row in session.store}
    return lambda cards, question: session.answer([rows[card.name] for card in cards], question).text


def shuffled(session: Session, cards: Sequence[Card]) -> tuple[Answerer, dict[str, Card]]:
    """Answers that give every picture the features of another; and whose, by name."""
    others = {card.name: cards[(index + len(cards) // 2) % len(cards)] for index, card in enumerate(cards)}
    rows = {row.path: row for row in session.store}
    return lambda some, question: session.answer([rows[others[card.name].name] for card in some], question).text, others


def as_checks(session: Session, marked: Sequence[Marked]) -> list[Marked]:
    """The same questions as checks: the choices are all answers right for some card to that kind of question.

    Lists and descriptions are left out: nobody would write down all that they may be.
    """
    allowed: dict[str, set[str]] = {}
    for one in marked:
        allowed.setdefault(one.question.kind, set()).add(one.question.answer)
    rows = {row.path: row for row in session.store}
    checked = []
    for one in marked:
        if one.question.kind not in {"list", "describe"}:
            check = Check(
                one.question.text, choices={answer: (answer,) for answer in sorted(allowed[one.question.kind])}
            )
            checked.append(replace(one, answer=session.answer([rows[card.name] for card in one.cards], check).text))
    return checked


def from_full_model(checkpoint: Path, folder: Path) -> Answerer:
    """Answers of transformers' full model on the cards' pixels, without a line of qvsplit."""
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def answer(cards: Sequence[Card], question: str) -> str:
        content = [*({"type": "image"} for _ in cards), {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        images = [Image.open(folder / card.name).convert("RGB") for card in cards]
        inputs = processor(text=[text], images=images, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        return str(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def accuracy(marked: Iterable[Marked]) -> dict[str, float]:
    """Share of exact answers by kind of question."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one in marked:
        total[one.question.kind] += 1
        right[one.question.kind] += one.exact
    return {kind: right[kind] / total[kind] for kind in questions.KINDS_OF_QUESTION if total[kind]}


def blind(marked: Sequence[Marked]) -> dict[str, float]:
    """What a guesser would get who knows which answer is the most frequent one to a kind of question.

    Where a question itself names the two answers (`left of`), one half at least.
    """
    best = {}
    for kind in questions.KINDS_OF_QUESTION:
        answers = Counter(one.question.answer for one in marked if one.question.kind == kind)
        if answers:
            share = answers.most_common(1)[0][1] / answers.total()
            best[kind] = max(share, 0.5) if kind == "left of" else share
    return best


def main() -> None:
    """Draw, extract, ask three ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--table", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, store = Path(temporary) / "cards", Path(temporary) / "store"
        folder.mkdir()
        cards = held_out_cards(arguments.pictures, folder)
        extract_files([folder], out=store, options=ExtractOptions(model=str(arguments.checkpoint)))
        session = load_session(open_store(store))
        split = mark(cards, from_shards(session))
        full = mark(cards, from_full_model(arguments.checkpoint, folder))
        swapped = mark(cards, shuffled(session, cards)[0])
        checked = as_checks(session, split)
    columns = [accuracy(split), accuracy(full), accuracy(swapped), blind(split)]
    number = Counter(one.question.kind for one in split)
    lines = [
        "| kind of question | asked | from the shards | full model | another picture's features | blind guess |",
        "|--|--|--|--|--|--|",
        *(
            f"| {kind} | {number[kind]} | " + " | ".join(f"{column[kind]:.1%}" for column in columns) + " |"
            for kind in columns[0]
        ),
    ]
    share = [sum(one.exact for one in marked) / len(marked) for marked in (split, full, swapped)]
    share.append(sum(columns[3][kind] * number[kind] for kind in number) / len(split))
    lines.append(f"| **all** | {len(split)} | " + " | ".join(f"**{one:.1%}**" for one in share) + " |")
    table = "\n".join(lines)
    print(table)
    greedy = [one for one in split if one.question.kind not in {"list", "describe"}]
    print(
        f"as checks: {sum(one.exact for one in checked)} of {len(checked)} right; "
        f"greedy, the same questions: {sum(one.exact for one in greedy)}"
    )
    if arguments.table:
        arguments.table.write_text(table + "\n")
    for one in [one for one in split if not one.exact][:25]:
        print(f"{one.cards[0].name}: {one.question.text} {one.answer!r}, not {one.question.answer!r}")
    different = sum(a.answer != b.answer for a, b in zip(split, full, strict=True))
    print(
        json.dumps(
            {
                "pictures": arguments.pictures,
                "questions": len(split),
                "from_shards": share[0],
                "full_model": share[1],
                "another_pictures_features": share[2],
                "blind_guess": share[3],
                "answers_that_differ_from_the_full_model": different,
                "by_kind": columns[0],
            }
        )
    )


if __name__ == "__main__":
    main()
