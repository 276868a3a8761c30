"""One prefill an image, any number of questions behind it: still the full model's own tokens, one by one."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch

from qvsplit.answering.checks import Question
from qvsplit.answering.engine import FeatureRef, Request
from qvsplit.ask import PromptItems
from qvsplit.checkpoints.opening import DEMO_FOLDER, open_checkpoint
from qvsplit.errors import ModelError, OutOfMemory, UsageError
from qvsplit.kernels import packed_linear as packing
from qvsplit.kernels import prefix_products, shared_prefix_attention
from qvsplit.models import prefix_cache as prefix
from qvsplit.models.asking import PrefixedQuestion
from qvsplit.models.decoding import AnswerRules, Decoding, GrowingAnswer
from qvsplit.models.forward import Forward
from qvsplit.models.language import LanguageModel
from qvsplit.models.prompt import question_messages
from qvsplit.weights import load_language_model
from tests.support.fake_engine import session_of, store_of
from tests.support.full_model import NEW_TOKENS, FullModel, upright_rgb

NAMES = ("chelsea.png", "coffee.png", "rocket.jpg")
WORDS = [
    "What",
    "of",
    "the",
    "cat,",
    "the",
    "cup,",
    "or",
    "of",
    "anything",
    "else",
    "at",
    "all",
    "is",
    "on",
    "the",
    "left?",
]


def questions(number: int) -> list[str]:
    """Different ones, of 1 to 60 words."""
    return [" ".join((WORDS * 3)[n % 7 : n % 7 + 1 + (n * 11) % 53]) + f" {n}" for n in range(number)]


@pytest.fixture(scope="module")
def few(whole, photos):
    """Three photographs' rows, of three shapes, with the full model's own features."""
    store = store_of(whole, {name: upright_rgb(photos / name) for name in NAMES})
    return store, store.rows


@pytest.fixture
def session(few, checkpoint):
    return session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS)


def prepared(session, row, question):
    """The prompt of one question about one row, and its request with tokens."""
    messages = tuple(question_messages(question, ["image"]))
    return session.engine._prepare(Request("0", messages, (FeatureRef(*row.content),)))


@pytest.fixture(scope="module")
def told(few, photos, whole):
    """The full model's answer to a question about some of the photographs, from their pixels, one by one."""

    @functools.cache
    def answer(question, *names):
        return whole.answer([upright_rgb(photos / name) for name in names], question)

    return answer


@pytest.fixture
def counted(monkeypatch):
    """How often a prefix was computed, and how large every batch was."""
    seen = {"prefills": 0, "batches": []}
    prefill, generate = LanguageModel.prefill, LanguageModel.generate

    def counting_prefill(self, *given, **named):
        seen["prefills"] += 1
        return prefill(self, *given, **named)

    def counting_generate(self, asked, *given, **named):
        seen["batches"].append(len(asked))
        return generate(self, asked, *given, **named)

    monkeypatch.setattr(LanguageModel, "prefill", counting_prefill)
    monkeypatch.setattr(LanguageModel, "generate", counting_generate)
    return seen


NEAR_TIE = 1e-5  # of logits around 5 in float32: about what a random model's differ from the exact ones by rounding


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 7, 24])
def test_questions_behind_one_prefix_get_the_whole_models_answers(session, few, told, whole, photos, counted, number):
    row = few[1][1]
    answers = session.answers(row, questions(number))
    pairs = [(answer, told(answer.question, row.path)) for answer in answers]
    others = [(answer, expected) for answer, expected in pairs if answer.tokens != expected]
    assert len(others) <= 1
    for answer, expected in others:  # where the full model's two best logits are equal but for its own rounding
        image = upright_rgb(photos / row.path)
        place = next(at for at, pair in enumerate(zip(answer.tokens, expected, strict=True)) if len(set(pair)) > 1)
        assert whole.gaps([image], answer.question)[place] < NEAR_TIE
    assert counted == {"prefills": 1, "batches": [number]}
    assert [answer.question for answer in answers] == questions(number)


@pytest.mark.parametrize("number", [2, 24])
def test_the_same_on_the_demo_model_whose_answers_end_by_themselves(tmp_path, number):
    from qvsplit.demo import POSTCARDS, truths

    whole = FullModel(DEMO_FOLDER)
    limits = json.loads((DEMO_FOLDER / "processor_config.json").read_text())["image_processor"]["size"]
    whole.processor.image_processor.size = limits
    images = {name: upright_rgb(POSTCARDS / name) for name in ("boats-in-snow.jpg", "sunday.jpg")}
    store = store_of(whole, images)
    session = session_of(store, DEMO_FOLDER)
    kinds = [*truths()[0], "Is there a dog?", "List everything.", "What colour is the house?", "Where is the boat?"]
    asked = [f"{kinds[n % len(kinds)]}{' ' * (n // len(kinds))}" for n in range(number)]
    for row in store:
        expected = [whole.answer([images[row.path]], question, new_tokens=64) for question in asked]
        answers = session.answers(row, asked)
        assert [answer.tokens for answer in answers] == expected
        assert {answer.finish_reason for answer in answers} == {"stop"}
        if number > 6:
            assert len({len(tokens) for tokens in expected}) > 2  # they end one after the other


def test_several_images_share_a_batch(session, few, told, counted):
    rows, asked = few[1], questions(3)
    answers = list(session.survey([PromptItems((row,)) for row in rows], [Question(text) for text in asked]))
    assert [(answer.rows[0].path, answer.question) for answer in answers] == [(r.path, q) for r in rows for q in asked]
    assert [answer.tokens for answer in answers] == [told(question, row.path) for row in rows for question in asked]
    assert counted == {"prefills": 3, "batches": [9]}


def test_a_token_budget_splits_the_batch_and_changes_no_answer(few, told, counted, checkpoint):
    row, asked = few[1][0], questions(9)
    session = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS, token_budget=(row.n_tokens or 0) + 250)
    assert [answer.tokens for answer in session.answers(row, asked)] == [told(question, row.path) for question in asked]
    assert counted["prefills"] == 1
    assert len(counted["batches"]) > 2
    assert sum(counted["batches"]) == 9


def test_where_memory_does_not_suffice_the_batch_is_halved(session, few, told, monkeypatch):
    row, asked = few[1][0], questions(7)
    generate, sizes = LanguageModel.generate, []

    def cramped(self, batch, *given, **named):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise OutOfMemory("too much")
        return generate(self, batch, *given, **named)

    monkeypatch.setattr(LanguageModel, "generate", cramped)
    assert [answer.tokens for answer in session.answers(row, asked)] == [told(question, row.path) for question in asked]
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_rows_that_have_ended_are_computed_no_more(tmp_path, monkeypatch):
    from qvsplit.demo import POSTCARDS

    store = store_of(FullModel(DEMO_FOLDER), {"sunday.jpg": upright_rgb(POSTCARDS / "sunday.jpg")})
    session = session_of(store, DEMO_FOLDER)
    rows_a_step = []
    forward = Forward.hidden

    def watched(self, ids, *given, **named):
        rows_a_step.append(ids.shape[0])
        return forward(self, ids, *given, **named)

    monkeypatch.setattr(Forward, "hidden", watched)
    asked = ["Is this day or night?", "Describe the image.", "Is there a dog?"]
    answers = session.answers(next(iter(store)), asked)
    lengths = [len(answer.tokens) for answer in answers]
    decoded = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert rows_a_step == [1, 1, *decoded]  # the prefix, all suffixes in one row, a row a question
    assert decoded[-1] == 1 < decoded[0]


def test_a_checkpoints_own_penalties_hold_for_every_row(few, checkpoint, photos, tmp_path):
    """Penalties look at the prompt: padding and neighbours must not be in it."""
    shutil.copytree(checkpoint, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}))
    whole, row, asked = FullModel(tmp_path / "own"), few[1][1], questions(7)
    session = session_of(few[0], tmp_path / "own", max_new_tokens=NEW_TOKENS)
    expected = [whole.answer([upright_rgb(photos / row.path)], question) for question in asked]
    assert [answer.tokens for answer in session.answers(row, asked)] == expected
    plain = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS)
    assert [answer.tokens for answer in plain.answers(row, asked)] != expected


def test_two_different_questions_of_one_name_are_refused(session, few):
    row = few[1][1]
    for first, second in [
        (Question("Is there a dog?", "x"), Question("Is it day?", "x")),
        (Question("dog"), Question("Is there a dog?", "dog")),
        (Question("?"), Question("?", choices=["yes", "no"])),
    ]:
        with pytest.raises(UsageError, match="two different questions"):
            session.answers(row, [first, second])
    twice = session.answers(row, ["What is it?", "What is it?"])
    assert twice[0] == twice[1]
    with pytest.raises(UsageError, match="a list of questions"):
        session.answers(row, "What is it?")
    with pytest.raises(UsageError, match="an empty question"):
        session.answer(row, " ")


def test_a_template_that_puts_text_first_gives_every_question_its_own_prefix(few, checkpoint, photos, tmp_path):
    """Text before an image is part of its prefix: two questions then have two."""
    shutil.copytree(checkpoint, tmp_path / "own")
    file = tmp_path / "own" / "chat_template.jinja"
    template = file.read_text()
    loop = "{%- for part in message.content -%}"
    assert loop in template
    file.write_text(template.replace(loop, "{%- for part in message.content | reverse -%}"))
    whole, row, asked = FullModel(tmp_path / "own"), few[1][1], questions(4)
    session = session_of(few[0], tmp_path / "own", max_new_tokens=NEW_TOKENS)
    expected = [whole.answer([upright_rgb(photos / row.path)], question) for question in asked]
    assert [answer.tokens for answer in session.answers(row, asked)] == expected
    assert [session.answer(row, question).tokens for question in asked] == expected


def test_values_that_are_not_finite_are_no_answer(session, few):
    row = few[1][1]
    session.answer(row, "?")  # its prefix is sound, and warm
    norm = session.engine.language.model.model.language_model.norm
    with torch.no_grad():
        norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        session.answer(row, "What is it?")
    with pytest.raises(ModelError, match="not finite"):
        session.answer(row, Question("Is it?", choices=["yes", "no"]))


def test_warm_images_make_room_where_memory_ends(few, told, monkeypatch, checkpoint):
    session = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS)
    first, second = few[1][:2]
    session.answer(first, "?")
    prefill = LanguageModel.prefill

    def cramped(self, *given, **named):
        if len(session.engine.prefix_cache):
            raise OutOfMemory("too much")
        return prefill(self, *given, **named)

    monkeypatch.setattr(LanguageModel, "prefill", cramped)
    question = questions(1)[0]
    assert session.answer(second, question).tokens == told(question, second.path)

    def hopeless(self, *given, **named):
        raise OutOfMemory("too much")

    monkeypatch.setattr(LanguageModel, "prefill", hopeless)
    with pytest.raises(OutOfMemory):
        session.answer(first, "Now?")


def test_a_image_above_the_budget_still_has_its_questions_in_one_batch(few, told, counted, checkpoint):
    row, asked = few[1][1], questions(3)
    session = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS, token_budget=250)
    assert (row.n_tokens or 0) > 250
    assert [answer.tokens for answer in session.answers(row, asked)] == [told(question, row.path) for question in asked]
    assert counted == {"prefills": 1, "batches": [3]}


# -- warm -------------------------------------------------------------------------------------------------------------


def test_the_last_images_stay_warm_each_with_its_own_positions(session, few, told, counted):
    for question in questions(3):
        for row in few[1]:
            assert session.answer(row, question).tokens == told(question, row.path)
    assert counted["prefills"] == 3


def test_what_is_kept_warm_is_bounded(few, counted, checkpoint):
    first, second, third = few[1]
    bound = (first.n_tokens or 0) + (second.n_tokens or 0) + 200
    session = session_of(few[0], checkpoint, max_new_tokens=1, prefix_cache_tokens=bound)
    for row in (first, second, first, third, first):
        session.answer(row, "?")
        assert len(session.engine.prefix_cache) <= bound
    assert counted["prefills"] == 3  # the second went, for it was the longest unused
    session.answer(second, "?")
    assert counted["prefills"] == 4
    cold = session_of(few[0], checkpoint, max_new_tokens=1, prefix_cache_tokens=0)
    for _ in range(2):
        cold.answer(first, "?")
    assert counted["prefills"] == 6


def test_a_shared_beginning_is_computed_once(session, few, told):
    reference, *others = few[1]
    lengths = []
    prefill = session.engine.language.prefill

    def watched(prompt, images, *, after=None):
        lengths.append((len(after) if after else 0, prompt.prefix_tokens))
        return prefill(prompt, images, after=after)

    session.engine.language.prefill = watched
    shown = [PromptItems((reference, other), shared=1) for other in others]
    answers = list(session.survey(shown, [Question(text) for text in questions(2)]))
    expected = [told(question, reference.path, other.path) for other in others for question in questions(2)]
    assert [answer.tokens for answer in answers] == expected
    assert [before for before, _ in lengths] == [0, lengths[0][1], lengths[0][1]]


def test_a_prefix_of_another_beginning_is_refused(session, few):
    two, one = few[1][:2]  # the longer one first
    ready = [prepared(session, row, "?") for row in (one, two)]
    features = [few[0].features(row) for row in (one, two)]
    first = session.engine.language.prefill(ready[0].prompt, features[:1])
    with pytest.raises(ValueError, match="does not begin"):
        session.engine.language.prefill(ready[1].prompt, features[1:], after=first)
    with pytest.raises(ValueError, match="tokens of items in the prompt"):
        session.engine.language.prefill(ready[1].prompt, features[:1])


@pytest.mark.parametrize("spread", ["auto", "hooks"])
def test_a_model_that_accelerate_spreads_gives_the_same_answers(few, told, spread, checkpoint):
    from accelerate import dispatch_model

    row, asked = few[1][1], questions(3)
    session = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS, device="auto")
    if spread == "hooks":  # as on two GPUs: one before every module
        opened = open_checkpoint(checkpoint, "language")
        half = load_language_model(opened, dtype=torch.float32, kernels="reference")
        names = ["embed_tokens", "rotary_emb", "norm", *(f"layers.{layer}" for layer in range(4))]
        where = {f"model.language_model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
        dispatch_model(half, where, force_hooks=True)
        assert hasattr(half, "hf_device_map")
        session.engine._model.loaded = LanguageModel(half, session.engine.language.prompter, "causal")
    assert [answer.tokens for answer in session.answers(row, asked)] == [told(question, row.path) for question in asked]


# -- attention, packed layers -----------------------------------------------------------------------------------------


def attended(step, query, key, value, scaling):
    """The attention of layer 0 with `step` in force."""
    module = type("Layer", (), {"layer_idx": 0})()
    with shared_prefix_attention.in_force(step):
        return shared_prefix_attention.attention(module, query, key, value, None, scaling=scaling)[0]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("least", [1, 1000])  # with and without products in oneDNN's layout
def test_shared_prefix_attention_is_attention_over_the_joined_sequence(monkeypatch, dtype, close, new, least):
    monkeypatch.setattr(prefix_products, "LEAST_TOKENS", least)
    torch.manual_seed(0)
    heads, key_heads, width, suffix = 6, 2, 8, 7
    prefixes = [
        prefix.Prefix(tuple(range(n)), (torch.randn(key_heads, n, width, dtype=dtype),),
                      (torch.randn(key_heads, n, width, dtype=dtype),), n)
        for n in (11, 4)
    ]  # fmt: skip
    rows, padding = [prefixes[0], prefixes[0], prefixes[1]], [0, 2, 1]
    query = torch.randn(3, heads, new, width, dtype=dtype)
    key, value = (torch.randn(3, key_heads, suffix, width, dtype=dtype) for _ in range(2))
    suffixes = prefix.SuffixCache(rows, padding)
    suffixes.update(key[:, :, :-new], value[:, :, :-new], 0)
    step = suffixes.step(new, torch.device("cpu"))
    seen = step.seen
    for scores in (1, 1 << 20):  # a token at a time, and all at once
        monkeypatch.setattr(prefix_products, "SCORE_VALUES", scores)
        got = attended(step, query, key, value, 0.3)
        for row, its in enumerate(rows):
            keys = torch.cat([its.keys[0], key[row]], 1).repeat_interleave(heads // key_heads, 0)
            values = torch.cat([its.values[0], value[row]], 1).repeat_interleave(heads // key_heads, 0)
            mask = torch.cat([torch.ones(new, len(its), dtype=torch.bool), seen[row]], 1)
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[row].float(), keys.float(), values.float(), mask, scale=0.3
            )
            assert (got[row].transpose(0, 1).float() - expected).abs().max() < close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_attended_as_exactly_as_sdpa_does(dtype):
    torch.manual_seed(0)
    heads, width, n, suffix = 4, 128, 200, 9
    behind = prefix.Prefix(tuple(range(n)), (2 * torch.randn(2, n, width),), (torch.randn(2, n, width),), n)
    query, key, value = (2 * torch.randn(1, count, suffix, width) for count in (heads, 2, 2))
    narrow = prefix.Prefix(behind.input_ids, (behind.keys[0].to(dtype),), (behind.values[0].to(dtype),), n)
    suffixes = prefix.SuffixCache([narrow], [0])
    step = suffixes.step(suffix, torch.device("cpu"))
    seen = step.seen
    got = attended(step, query.to(dtype), key.to(dtype), value.to(dtype), width**-0.5)
    keys = torch.cat([narrow.keys[0][None], key.to(dtype)], 2).repeat_interleave(2, 1)
    values = torch.cat([narrow.values[0][None], value.to(dtype)], 2).repeat_interleave(2, 1)
    mask = torch.cat([torch.ones(suffix, n, dtype=torch.bool), seen[0]], 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(query.to(dtype).double(), keys.double(), values.double(), mask)
    theirs = (attend(query.to(dtype), keys, values, mask).double() - exact).abs().mean()
    assert (got.transpose(1, 2).double() - exact).abs().mean() < 1.5 * theirs


def test_every_linear_layer_is_packed(few, checkpoint):
    model = session_of(few[0], checkpoint).engine.language.model
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]


@pytest.mark.parametrize("trouble", ["wrong", "missing"])
def test_a_torch_that_cannot_pack_is_left_alone(few, told, monkeypatch, request, trouble, checkpoint):
    def broken(self, x):
        if trouble == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(packing.PackedLinear, "forward", broken)
    packing.can_pack.cache_clear()  # it is tried once a process
    request.addfinalizer(packing.can_pack.cache_clear)
    session = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS)
    assert type(session.engine.language.model.lm_head) is torch.nn.Linear
    row = few[1][1]
    assert [a.tokens for a in session.answers(row, questions(3))] == [told(q, row.path) for q in questions(3)]


# -- sampling, stop strings, streaming --------------------------------------------------------------------------------


def test_sampling_is_transformers_own(session, few, whole, photos):
    """The same seed draws the very tokens that the full model draws from it."""
    row, question = few[1][1], "What is it?"
    inputs = whole.inputs([upright_rgb(photos / row.path)], question)
    ready = prepared(session, row, question)
    behind = session.engine.language.prefill(ready.prompt, [few[0].features(row)])
    seen = set()
    for seed, told in (
        (1, {"temperature": 1.5}),
        (2, {"temperature": 0.9, "top_p": 0.7}),
        (3, {"temperature": 3.0, "top_k": 9}),
    ):
        torch.manual_seed(seed)
        with torch.inference_mode():
            drawn = whole.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True,
                                         **{"top_p": None, "top_k": None} | told)  # fmt: skip
        expected = drawn[0, inputs["input_ids"].shape[1] :].tolist()
        decoding = Decoding(max_new_tokens=NEW_TOKENS, **told)
        (got,) = session.engine.language.generate([PrefixedQuestion(behind, ready.suffix, seed)], decoding)
        assert got.tokens == expected
        seen.add(tuple(got.tokens))
    assert len(seen) == 3


def test_a_seed_gives_the_same_answers_whatever_is_asked_beside_them(few, checkpoint):
    row, asked = few[1][0], questions(5)
    session = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS, temperature=2.0, seed=7)
    together = [answer.tokens for answer in session.answers(row, asked)]
    assert together == [session.answer(row, question).tokens for question in asked]
    assert len({tuple(tokens) for tokens in together}) == 5
    other = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS, temperature=2.0, seed=8)
    assert all(a.tokens != b for a, b in zip(other.answers(row, asked), together, strict=True))
    first = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS, top_k=1)
    greedy = session_of(few[0], checkpoint, max_new_tokens=NEW_TOKENS)
    assert [a.tokens for a in first.answers(row, asked)] == [a.tokens for a in greedy.answers(row, asked)]


def test_an_answer_ends_before_a_stop_string_and_none_of_it_is_told(few, checkpoint):
    row = few[1][1]
    free = session_of(few[0], checkpoint, max_new_tokens=40).answer(row, "What is it?")
    stop = free.text[9:12]
    session = session_of(few[0], checkpoint, max_new_tokens=40, stop=("never to be met", stop))
    grown: list[str] = []
    cut = session.answer(row, "What is it?", on_text=grown.append)
    assert cut.text == free.text[: free.text.index(stop)]
    assert "".join(grown) == cut.text
    assert cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < len(free.tokens)


def test_text_grows_by_whole_characters():
    told: list[str] = []
    texts = {1: "a", 2: "a\ufffd", 3: "a图", 4: "a图ST", 5: "a图STx"}
    rules = AnswerRules(
        Decoding(stop=("STOP",)), frozenset({99}), lambda tokens: texts[len(tokens)], on_text=told.append
    )
    row = GrowingAnswer(rules, [1, 1])
    heard = []
    for token in range(5):
        row.take(token)
        heard.append("".join(told))
    assert heard == ["a", "a", "a图", "a图", "a图STx"]


# -- allowed answers --------------------------------------------------------------------------------------------------


def test_scores_are_the_whole_models_log_probabilities_of_whole_answers(session, few, whole, photos):
    spelt = {"yes": ("yes", "Yes, of course."), "no": ("no",), "a cat on a chair": ("a cat on a chair",)}
    asked = [Question(text, choices=spelt) for text in questions(2)]
    rows = few[1][:2]
    answers = list(session.survey([PromptItems((row,)) for row in rows], asked))
    assert {"Yes.", " yes"} < set(asked[0].forms["yes"])
    ends = sorted(session.engine.language.stops)
    assert all(sum(answer.probabilities.values()) == pytest.approx(1) for answer in answers)
    each_once = [answers[0], answers[3]]  # of two images, two questions
    assert [(one.rows, one.question) for one in each_once] == [
        ((row,), question.text) for row, question in zip(rows, asked, strict=True)
    ]
    for answer in each_once:
        inputs = whole.inputs([upright_rgb(photos / answer.rows[0].path)], answer.question)
        for name, forms in asked[0].forms.items():
            of_forms = {}
            for form in forms:
                tokens = whole.processor.tokenizer(form, add_special_tokens=False)["input_ids"]
                ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
                types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, len(tokens), dtype=torch.long)], 1)
                with torch.inference_mode():
                    logits = whole.model(
                        **{
                            **inputs,
                            "input_ids": ids,
                            "mm_token_type_ids": types,
                            "attention_mask": torch.ones_like(ids),
                        }
                    ).logits[0, -len(tokens) - 1 :]
                logs = torch.log_softmax(logits.double(), -1)
                each = logs[range(len(tokens)), tokens].sum() + torch.logsumexp(logs[-1, ends], 0)
                of_forms[form] = float(torch.exp(each))
            total = torch.tensor(sum(of_forms.values())).double()
            assert answer.logprobs[name] == pytest.approx(total.log().item(), abs=2e-3)
            assert answer.forms[name] == max(of_forms, key=of_forms.get)
        assert answer.choice == max(answer.logprobs, key=answer.logprobs.get)
        assert (answer.text, answer.verdict) == ("unsure", "uncertain")  # a random model would say something else
        assert (answer.tokens, answer.finish_reason) == ([], "scored")
