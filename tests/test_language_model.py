"""Answers from features at hand, without a store: those of the full model, and of a session over a store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qvsplit.answering.checks import Question
from qvsplit.answering.options import AskOptions
from qvsplit.ask import load_language_model, load_session
from qvsplit.encode import load_encoder
from qvsplit.errors import ConfigError, UsageError
from qvsplit.splitting import split_checkpoint
from qvsplit.store.features import StoredTensor
from qvsplit.store.opening import open_store
from tests.support.checkpoints import make_tiny
from tests.support.fake_engine import row
from tests.support.full_model import NEW_TOKENS, QUESTIONS, upright_rgb

NAMES = ("coffee.png", "rocket.jpg", "turned.jpg")
OPTIONS = AskOptions(max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return load_encoder(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def features(encoder, photos):
    return encoder.encode([photos / name for name in NAMES])


@pytest.fixture(scope="module")
def lm(checkpoint):
    return load_language_model(checkpoint, device="cpu", options=OPTIONS)


@pytest.fixture
def prefills(lm, monkeypatch):
    """How many images went into each prefill."""
    counted, prefill = [], lm.engine.language.prefill
    monkeypatch.setattr(
        lm.engine.language, "prefill",
        lambda prompt, tensors, **more: (counted.append(len(tensors)), prefill(prompt, tensors, **more))[1],
    )  # fmt: skip
    return counted


def test_answers_are_the_full_models(lm, features, whole, photos):
    for name, one in zip(NAMES, features, strict=True):
        answer = lm.answer(one, QUESTIONS[0])
        assert answer.tokens == whole.answer([upright_rgb(photos / name)], QUESTIONS[0]), name
        assert (answer.encoder_check, answer.rows[0].path) == ("fingerprint", "image 1")
    both = lm.answer(features[:2], QUESTIONS[1])
    assert both.tokens == whole.answer([upright_rgb(photos / name) for name in NAMES[:2]], QUESTIONS[1])
    assert [one.path for one in both.rows] == ["image 1", "image 2"]


def test_answers_are_those_of_a_session_over_a_store(lm, features, store_folder, photos):
    session = load_session(store_folder, OPTIONS, device="cpu")
    checked = Question("Day or night?", choices=["day", "night"])
    for name, one in zip(NAMES, features, strict=True):
        stored = session.store.current(str(photos), name)
        asked = [*QUESTIONS[:3], checked]
        mine, theirs = lm.answers(one, asked), session.answers(stored, asked)
        assert [answer.tokens for answer in mine] == [answer.tokens for answer in theirs]
        assert [answer.text for answer in mine] == [answer.text for answer in theirs]
        # a store's batch may round otherwise; the very features give the very probabilities
        again = lm.answer(session.store.features(stored), checked)
        assert again.logprobs == session.answer(stored, checked).logprobs


def test_one_prefill_for_all_questions_about_an_image(lm, features, prefills):
    assert len(lm.answers(features[0], [f"{question}!" for question in QUESTIONS])) == len(QUESTIONS)
    assert len(prefills) <= 1
    lm.answer(features[0], "Anything else?")
    lm.answer([features[0]], "What?")
    assert len(prefills) <= 1  # the same features are the same prefix, in whichever call


def test_features_changed_in_place_are_other_features(lm, features, prefills):
    changed = replace(
        features[1], tensors={"pooler_output": StoredTensor(features[1].tensors["pooler_output"].raw.copy(), "float32")}
    )
    before = lm.answer(changed, Question("Is it?", choices=["yes", "no"]))
    changed.tensors["pooler_output"].raw.view("<f4")[:] *= -1
    after = lm.answer(changed, Question("Is it?", choices=["yes", "no"]))
    assert before.logprobs != after.logprobs


def test_words_are_heard_as_they_come(lm, features):
    heard = []
    answer = lm.answer(features[0], QUESTIONS[0], on_text=heard.append)
    assert "".join(heard) == answer.text


def test_features_of_another_encoder_are_refused(features, checkpoint, tmp_path):
    make_tiny(tmp_path / "other", seed=1)
    other = load_language_model(tmp_path / "other", device="cpu", options=OPTIONS)
    with pytest.raises(
        ConfigError,
        match=r"the features were made by another encoder \(encoder: .*ask with the model that made them, or",
    ):
        other.answer(features[0], "What?")
    lm = load_language_model(checkpoint, device="cpu", options=OPTIONS)
    strange = replace(features[1], config=replace(features[1].config, family="qwen9_vl"))
    with pytest.raises(ConfigError, match="the features do not fit .*family: qwen9_vl, not qwen2_vl"):
        lm.answers([features[0], strange], ["What?"])


def test_a_language_model_alone_needs_evidence(features, checkpoint, tmp_path):
    split_checkpoint(checkpoint, language_model=tmp_path / "language")
    noted = load_language_model(tmp_path / "language", device="cpu", options=OPTIONS)
    assert noted.answer(features[0], "What?").encoder_check == "note"
    for note in (tmp_path / "language").glob("qvsplit*.json"):
        note.unlink()
    bare = load_language_model(tmp_path / "language", device="cpu", options=OPTIONS)
    with pytest.raises(
        ConfigError, match="nothing shows that the features were made by the encoder of .*`unchecked_encoder=True`"
    ):
        bare.answer(features[0], "What?")
    trusted = replace(OPTIONS, unchecked_encoder=True)
    bare = load_language_model(tmp_path / "language", device="cpu", options=trusted)
    assert bare.answer(features[0], "What?").encoder_check == "unchecked"


def test_features_that_no_encoder_makes(lm, features):
    torn = replace(
        features[0], tensors={"pooler_output": StoredTensor(features[0].tensors["pooler_output"].raw[1:], "float32")}
    )
    with pytest.raises(UsageError, match=r"features\[1\] has \d+ tokens, and its grid .* no encoder makes such"):
        lm.answer([features[0], torn], "What?")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "features: give features, or a list of them, not None"),
        ("coffee.png", "features: give .*, not str 'coffee.png'"),
        (row(), "features: give .*, not a Row"),
        (np.zeros((4, 64)), r"features\[0\]: give .*, not a ndarray"),
        ([], "features: give .*, not none"),
    ],
)
def test_what_are_no_features(lm, given, message):
    with pytest.raises(UsageError, match=message):
        lm.answer(given, "What?")
    with pytest.raises(UsageError, match=message):
        lm.answers(given, ["What?"])


def test_what_are_no_questions(lm, features, store_folder):
    with pytest.raises(UsageError, match="questions: give a list of questions"):
        lm.answers(features[0], "What?")
    with pytest.raises(UsageError, match="question: give a text or a Question, not a list"):
        lm.answer(features[0], ["What?"])
    with pytest.raises(UsageError, match="on_text: give a function, not True"):
        lm.answer(features[0], "What?", on_text=True)
    with pytest.raises(UsageError, match="features: give .*, not a Store"):
        lm.answer(open_store(store_folder), "What?")
    assert repr(lm) == f"<FeatureSession of {lm.model}>"
