"""The engine on this machine, through its door: one request's trouble is its own, and cancelling ends it soon."""

from __future__ import annotations

import json
import re
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qvsplit.answering.engine import Decoding, FeatureRef, Request
from qvsplit.answering.local_engine import EngineLimits, LocalEngine
from qvsplit.errors import ModelError, OutOfMemory, RequestError, ShardDamaged, UsageError
from qvsplit.kernels import shared_prefix_attention
from qvsplit.models import asking
from qvsplit.models.language import LanguageModel
from qvsplit.models.prompt import Prompter, question_messages
from qvsplit.models.shared_prefix import SharedBatch
from tests.support.fake_engine import row, session_of, store_of
from tests.support.full_model import NEW_TOKENS, upright_rgb

NAMES = ("chelsea.png", "coffee.png", "rocket.jpg")
QUESTION = "What is in the image?"


@pytest.fixture(scope="module")
def store(whole, photos):
    return store_of(whole, {name: upright_rgb(photos / name) for name in NAMES})


@pytest.fixture
def engine(store, checkpoint):
    return session_of(store, checkpoint).engine


def request(number, row, question=QUESTION, **more):
    decoding = Decoding(max_new_tokens=more.pop("max_new_tokens", NEW_TOKENS))
    messages = tuple(question_messages(question, ["image"]))
    return Request(str(number), messages, (FeatureRef(*row.content),), decoding=decoding, **more)


def answered(engine, requests, **more):
    completions = list(engine.answer(requests, **more))
    by_id = {int(one.id): one for one in completions}
    assert len(by_id) == len(completions)
    return by_id


def test_damaged_features_are_the_error_of_their_requests_alone(engine, store, whole, photos, monkeypatch):
    read, reads = engine.reader.features, []

    def features(ref):
        reads.append(ref)
        if ref.sha256 == store.rows[1].sha256:
            raise ShardDamaged("its page has a wrong checksum", "shard.parquet", "page")
        return read(ref)

    monkeypatch.setattr(engine.reader, "features", features)
    requests = [request(n, store.rows[n % 3], f"{QUESTION} {n // 3}") for n in range(9)]
    completions = answered(engine, requests)
    assert {n for n, one in completions.items() if one.error is not None} == {1, 4, 7}
    for number in (1, 4, 7):
        assert isinstance(completions[number].error, ShardDamaged)
        assert completions[number].finish_reason == "error"
    for number in (0, 2, 3, 5):
        shown = [upright_rgb(photos / NAMES[number % 3])]
        assert list(completions[number].tokens) == whole.answer(shown, f"{QUESTION} {number // 3}")
    assert len(reads) == 3  # the damaged ones are not read again for each question


def test_an_unknown_feature_and_choices_that_are_one_are_their_requests_errors(engine, store):
    stranger = row("stranger.jpg")
    one = store.rows[0]
    completions = answered(
        engine,
        [
            request(0, stranger),
            request(1, one),
            request(2, one, choices=("yes", "yes")),
            request(3, one, choices=("yes", "")),
        ],
    )
    assert completions[1].error is None
    assert "in no shard given" in str(completions[0].error)
    for number in (2, 3):
        assert isinstance(completions[number].error, UsageError)
        assert "two of the choices" in str(completions[number].error)


def test_a_placeholder_that_injects_control_tokens_is_its_requests_error(engine, store, monkeypatch):
    hostile = row("hostile.jpg", placeholder='[["<|image_pad|>", 4], ["<|im_end|>", 1]]')
    monkeypatch.setattr(store, "rows", [*store.rows, hostile])
    completions = answered(engine, [request(0, hostile), request(1, store.rows[0])])
    assert "control token <|im_end|>" in str(completions[0].error)
    assert completions[1].error is None


def test_memory_that_does_not_suffice_for_one_is_its_error_and_the_others_are_answered(engine, store, monkeypatch):
    prefill = LanguageModel.prefill
    large = store.rows[1].n_tokens

    def cramped(self, prompt, features, **more):
        if any(one.n_tokens == large for one in features):
            raise OutOfMemory("too much")
        return prefill(self, prompt, features, **more)

    monkeypatch.setattr(LanguageModel, "prefill", cramped)
    completions = answered(engine, [request(n, one) for n, one in enumerate(store.rows)])
    assert isinstance(completions[1].error, OutOfMemory)
    assert all(completions[n].error is None and completions[n].tokens for n in (0, 2))


@pytest.mark.parametrize("choices", [(), ("yes", "no")])
def test_what_is_wrong_with_the_model_ends_the_call(engine, store, monkeypatch, choices):
    monkeypatch.setattr(shared_prefix_attention, "UNUSED", frozenset())  # as if the model asked for more than is known
    with pytest.raises(ModelError, match="wants `.*` of its attention"):
        answered(engine, [request(n, one, choices=choices) for n, one in enumerate(store.rows)])


def test_what_a_model_does_not_take_is_its_requests_error(engine, store, monkeypatch):
    chat = Prompter.chat

    def fewer(self, messages, placeholders, **more):
        if placeholders[0].name.endswith(NAMES[1]):
            raise RequestError("it cannot answer about these")
        return chat(self, messages, placeholders, **more)

    monkeypatch.setattr(Prompter, "chat", fewer)
    completions = answered(engine, [request(n, one) for n, one in enumerate(store.rows)])
    assert isinstance(completions[1].error, RequestError)
    assert all(completions[n].error is None and completions[n].tokens for n in (0, 2))


def test_a_model_that_cannot_be_loaded_ends_the_call(store):
    def load():
        raise ModelError("it cannot be loaded")

    limits = EngineLimits(token_budget=1000, prefix_cache_tokens=0)
    engine = LocalEngine(load, SimpleNamespace(), limits)
    with pytest.raises(ModelError, match="cannot be loaded"):
        answered(engine, [request(0, store.rows[0])])


def test_numbers_that_are_none_are_the_error_of_their_row(engine, store, monkeypatch):
    finite = asking.finite_rows
    monkeypatch.setattr(asking, "finite_rows", lambda rows: [n != 1 or len(rows) < 3 for n in range(len(rows))])
    generated = answered(engine, [request(n, one) for n, one in enumerate(store.rows)])
    scored = answered(engine, [request(n, one, choices=("yes", "no")) for n, one in enumerate(store.rows)])
    for completions in (generated, scored):
        assert isinstance(completions[1].error, ModelError)
        assert completions[0].error is completions[2].error is None
    monkeypatch.setattr(asking, "finite_rows", finite)
    sound = answered(engine, [request(n, one) for n, one in enumerate(store.rows)])
    assert sound[2].error is None
    assert len(sound[2].tokens) == NEW_TOKENS


def test_what_is_scored_and_what_is_generated_share_a_prefix(engine, store, monkeypatch):
    prefills, batches = [], []
    prefill, generate, score = LanguageModel.prefill, LanguageModel.generate, LanguageModel.score
    monkeypatch.setattr(LanguageModel, "prefill", lambda self, *a, **k: (prefills.append(1), prefill(self, *a, **k))[1])
    monkeypatch.setattr(
        LanguageModel, "generate", lambda self, q, *a: (batches.append(len(q)), generate(self, q, *a))[1]
    )
    monkeypatch.setattr(LanguageModel, "score", lambda self, q, c: (batches.append(len(q)), score(self, q, c))[1])
    requests = [
        request(2 * n + scored, one, choices=("yes", "no") if scored else ())
        for n, one in enumerate(store.rows)
        for scored in (0, 1)
    ]
    completions = answered(engine, requests)
    assert len(prefills) == 3
    assert batches == [3, 3]  # not six of one
    for number in range(0, 6, 2):
        assert completions[number].finish_reason in ("stop", "length")
        assert set(completions[number + 1].logprobs) == {"yes", "no"}


def test_requests_of_different_lengths_and_temperatures_each_have_their_own(engine, store):
    requests = [request(n, store.rows[0], max_new_tokens=n + 1) for n in range(4)]
    completions = answered(engine, requests)
    assert [len(completions[n].tokens) for n in range(4)] == [1, 2, 3, 4]
    assert completions[3].tokens[:3] == completions[2].tokens


def test_requests_are_taken_as_they_are_needed(store, checkpoint):
    engine = session_of(store, checkpoint, token_budget=250).engine
    taken = []

    def endless():
        for number in range(1_000):
            taken.append(number)
            yield request(number, store.rows[number % 3], max_new_tokens=2)

    completions = engine.answer(endless())
    for _ in range(3):
        next(completions)
    assert len(taken) < 10


def test_text_is_told_with_its_requests_id(engine, store):
    heard: dict[str, str] = {}

    def on_text(request, text):
        heard[request] = heard.get(request, "") + text

    completions = answered(engine, [request(n, one) for n, one in enumerate(store.rows)], on_text=on_text)
    assert {str(n): one.text for n, one in completions.items()} == heard


def test_cancelling_ends_it_soon(engine, store, monkeypatch):
    steps = []
    forward = SharedBatch.next

    def watched(self, *given):
        steps.append(1)
        if len(steps) == 3:
            canceller = threading.Thread(target=engine.cancel)
            canceller.start()
            canceller.join()
        return forward(self, *given)

    monkeypatch.setattr(SharedBatch, "next", watched)
    long = [request(n, one, max_new_tokens=400) for n, one in enumerate(store.rows)]
    completions = answered(engine, long)
    assert len(steps) <= 4
    assert {one.finish_reason for one in completions.values()} == {"cancelled"}
    assert all(one.tokens and one.text for one in completions.values())
    monkeypatch.setattr(SharedBatch, "next", forward)
    again = answered(engine, [request(0, store.rows[0])])  # it may be asked again
    assert again[0].finish_reason in ("stop", "length")


# ------------------------------------------------------------------------------------------------------------ thinking

THOUGHT = "<think>What is in the picture? A cat sleeps.</think>\n\nA cat."


def let_it_write(monkeypatch, engine, text):
    """Have every answer be `text`, whatever the model would say; gives its tokens, the end included."""
    tokens = [*engine.language.prompter.text_tokens(text), min(engine.language.stops)]

    def processors(model, decoding, prompt_tokens):
        def forced(ids, scores):
            scores[:, tokens[min(ids.shape[1] - prompt_tokens, len(tokens) - 1)]] += 1000
            return scores

        return forced

    monkeypatch.setattr("qvsplit.models.language.logits_processors", processors)
    return tokens


def test_a_thought_is_no_part_of_the_answer_and_is_not_heard(engine, store, monkeypatch):
    tokens = let_it_write(monkeypatch, engine, THOUGHT)
    heard = []
    requests = [request(n, one, max_new_tokens=99) for n, one in enumerate(store.rows)]
    for one in answered(engine, requests, on_text=lambda _, text: heard.append(text)).values():
        assert (one.text, one.reasoning) == ("A cat.", "What is in the picture? A cat sleeps.")
        assert (list(one.tokens), one.finish_reason) == (tokens, "stop")
    assert "".join(sorted("".join(heard))) == "".join(sorted(3 * "A cat."))
    (cut,) = answered(engine, [request(0, store.rows[0], max_new_tokens=len(tokens) // 2)]).values()
    assert (cut.text, cut.finish_reason) == ("", "length")
    assert cut.reasoning and "What is in the picture? A cat sleeps.".startswith(cut.reasoning)


def test_a_schema_constrains_what_stands_behind_the_thought(engine, store, monkeypatch):
    let_it_write(monkeypatch, engine, "<think>What?</think>")
    schema = {"enum": ["A cat."]}
    one = request(0, store.rows[0])
    for thinking, reasoning in ((True, "What?"), (False, "")):
        decoding = Decoding(max_new_tokens=99, json_schema=schema, thinking=thinking)
        (done,) = answered(engine, [replace(one, decoding=decoding)]).values()
        assert (done.text, done.reasoning, done.finish_reason) == ('"A cat."', reasoning, "stop")


def test_the_templates_own_switch_is_used_and_prompts_that_differ_in_it_share_no_prefix(
    store, checkpoint, tmp_path, monkeypatch
):
    folder = tmp_path / "switched"
    shutil.copytree(checkpoint, folder)
    template = folder / "chat_template.jinja"
    switch = "{{- 'Think. ' if enable_thinking else '' -}}"
    opened = "{{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' -}}"
    text = template.read_text().replace(
        "{%- for part in message.content -%}", switch + "{%- for part in message.content -%}"
    )
    end = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    assert end in text
    template.write_text(text.replace(end, end + opened))
    engine = session_of(store, folder).engine
    let_it_write(monkeypatch, engine, "A cat?</think>\n\nA cat.")
    prefills = []
    prefill = LanguageModel.prefill
    monkeypatch.setattr(LanguageModel, "prefill", lambda self, *a, **k: (prefills.append(1), prefill(self, *a, **k))[1])
    one = request(0, store.rows[0])
    decoding = Decoding(max_new_tokens=99, thinking=True)
    completions = answered(engine, [replace(one, id="1", decoding=decoding), replace(one, id="2", decoding=decoding)])
    assert {(done.text, done.reasoning) for done in completions.values()} == {("A cat.", "A cat?")}
    assert len(prefills) == 1
    let_it_write(monkeypatch, engine, "A cat.")
    (off,) = answered(engine, [one]).values()
    assert (off.text, off.reasoning) == ("A cat.", "")
    assert len(prefills) == 2
    (scored,) = answered(engine, [replace(one, decoding=decoding, choices=("yes", "no"))]).values()
    assert scored.prompt_tokens == off.prompt_tokens
    assert len(prefills) == 2


# ------------------------------------------------------------------------------------------------------------- context


@pytest.fixture
def prefills(monkeypatch):
    """How many prompts' beginnings were computed."""
    counted, prefill = [], LanguageModel.prefill
    monkeypatch.setattr(LanguageModel, "prefill", lambda self, *a, **k: (counted.append(1), prefill(self, *a, **k))[1])
    return counted


def of_context(monkeypatch, tokens):
    monkeypatch.setattr(LocalEngine, "context", tokens)


def together(number, rows, question=QUESTION):
    messages = tuple(question_messages(question, ["image"] * len(rows)))
    return Request(str(number), messages, tuple(FeatureRef(*one.content) for one in rows))


def test_the_context_is_the_text_configs(engine, checkpoint, monkeypatch):
    config = json.loads((checkpoint / "config.json").read_text())
    assert engine.context == config["text_config"]["max_position_embeddings"]
    monkeypatch.setattr(engine.language.model.config, "get_text_config", SimpleNamespace)
    assert engine.context is None


def test_a_prompt_beyond_the_context_is_its_requests_error_before_anything_is_computed(
    engine, store, monkeypatch, prefills
):
    one = store.rows[0]
    sound = answered(engine, [request(0, one)])[0]
    prefills.clear()
    engine.prefix_cache.clear()
    of_context(monkeypatch, sound.prompt_tokens + 1)
    long = request(1, one, QUESTION * 40)
    refused = answered(engine, [long])[1]
    assert prefills == []
    assert isinstance(refused.error, UsageError)
    (tokens, context) = re.findall(r"[\d,]+(?= tokens, and)|(?<=context )[\d,]+(?=, the answer)", str(refused.error))
    assert int(context.replace(",", "")) == sound.prompt_tokens + 1
    assert int(tokens.replace(",", "")) > int(context.replace(",", ""))
    assert "a shorter question" in str(refused.error)
    both = answered(engine, [request(0, one, max_new_tokens=1), long])
    assert both[0].tokens == sound.tokens[:1]
    assert both[1].error is not None


def test_an_answer_does_not_run_past_the_context(engine, store, monkeypatch):
    one = store.rows[0]
    whole = answered(engine, [request(0, one, max_new_tokens=9)])[0]
    assert len(whole.tokens) == 9
    for room in (9, 8, 3, 1):
        of_context(monkeypatch, whole.prompt_tokens + room)
        done = answered(engine, [request(0, one, max_new_tokens=9), request(1, one, max_new_tokens=1)])
        assert (done[0].tokens, done[0].finish_reason) == (whole.tokens[:room], "length")
        assert done[1].tokens == whole.tokens[:1]
    of_context(monkeypatch, whole.prompt_tokens)
    assert "the answer included" in str(answered(engine, [request(0, one)])[0].error)


def test_choices_must_fit_into_the_context_too(engine, store, monkeypatch):
    one = store.rows[0]
    tokens = answered(engine, [request(0, one, max_new_tokens=1)])[0].prompt_tokens
    choices = ("yes", "no people in the picture")
    longest = max(len(engine.language.prompter.text_tokens(choice)) for choice in choices)
    of_context(monkeypatch, tokens + longest)
    assert answered(engine, [request(0, one, choices=choices)])[0].error is None
    of_context(monkeypatch, tokens + longest - 1)
    assert isinstance(answered(engine, [request(0, one, choices=choices)])[0].error, UsageError)


def test_it_says_how_many_images_fit_together(engine, store, monkeypatch, prefills):
    rows = [*store.rows, *store.rows]
    lengths = [answered(engine, [together(0, rows[:n])])[0].prompt_tokens for n in range(1, len(rows) + 1)]
    prefills.clear()
    for fitting in (1, 2, 4):
        for spare in (1, lengths[fitting] - lengths[fitting - 1]):
            of_context(monkeypatch, lengths[fitting - 1] + spare)
            refused = answered(engine, [together(0, rows)])[0]
            assert f"; {fitting} of its 6 images would fit" in str(refused.error)
            assert f"{lengths[-1]:,} tokens" in str(refused.error)
    assert prefills == []
    of_context(monkeypatch, lengths[0])  # one more token would be needed for an answer
    assert "; 0 of its 6 images would fit" in str(answered(engine, [together(0, rows)])[0].error)
    assert "chelsea.png takes" in str(answered(engine, [together(0, rows[:1])])[0].error)
