"""Features at hand, of images and of clips, as the engine reads them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qvsplit.answering.at_hand import FeaturesAtHand
from qvsplit.answering.engine import Decoding, FeatureRef, Request
from qvsplit.answering.local_engine import LocalEngine
from qvsplit.models.prompt import question_messages
from qvsplit.store.features import Features
from tests.support.fake_engine import CONFIG
from tests.support.families.reference import noise_clip
from tests.support.families.split import NEW_TOKENS, Split
from tests.support.language_models import noise

CLIP, LONG, IMAGE = noise_clip(1), noise_clip(4, 40, 64, 96), noise(5)


@pytest.fixture(scope="module")
def split(family_checkpoint, family_reference):
    return Split(family_checkpoint("qwen2_5_vl"), family_reference("qwen2_5_vl"))


def at_hand(split, item) -> Features:
    one = split.placeholder(item)
    config = replace(CONFIG, family="qwen2_5_vl")
    return replace(
        split.features(item), config=config, grid_thw=one.grid_thw, placeholder=one.runs, inputs=one.inputs,
        kind=one.kind,
    )  # fmt: skip


def test_a_clip_has_the_row_of_a_clip(split):
    rows = FeaturesAtHand().hold([at_hand(split, IMAGE), at_hand(split, CLIP), at_hand(split, CLIP)])
    assert [row.kind for row in rows] == ["image", "video", "video"]
    assert [row.path for row in rows] == ["image 1", "video 2", "video 3"]
    assert rows[1].content == rows[2].content
    assert json.loads(rows[1].inputs).keys() == {"second_per_grid_ts"}
    assert rows[1].grid_thw == split.placeholder(CLIP).grid_thw


def test_all_that_decides_an_answer_decides_the_hash(split):
    whole, held = at_hand(split, CLIP), FeaturesAtHand()
    (seconds,) = whole.inputs.values()
    others = [
        replace(whole, kind="image"),
        replace(whole, inputs={"second_per_grid_ts": {**seconds, "values": [2 * one for one in seconds["values"]]}}),
        at_hand(split, LONG),
    ]
    hashes = {row.sha256 for row in held.hold([whole, *others])}
    assert len(hashes) == 1 + len(others)


@pytest.mark.parametrize("shown", [[CLIP], [IMAGE, LONG], [CLIP, IMAGE, LONG]], ids=["clip", "mixed", "three"])
def test_the_engine_answers_about_them(split, shown):
    held = FeaturesAtHand()
    rows = held.hold([at_hand(split, item) for item in shown])
    engine = LocalEngine(lambda: split.language, held)
    question = "What happens?"
    refs = tuple(FeatureRef(*row.content) for row in rows)
    messages = tuple(question_messages(question, [row.kind for row in rows]))
    request = Request("0", messages, refs, decoding=Decoding(max_new_tokens=NEW_TOKENS))
    (completion,) = engine.answer([request])
    assert completion.error is None
    assert list(completion.tokens) == split.expected(shown, question)
