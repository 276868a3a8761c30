"""One prefill a picture, any number of questions behind it: still the whole model's own tokens, one by one."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from conftest import NEW_TOKENS, WholeModel, upright_rgb

from qvsplit import language as language_room
from qvsplit import packing, prefix
from qvsplit.album import open_album
from qvsplit.ask import Settings as AskSettings
from qvsplit.ask import Shown, open_asker
from qvsplit.checkpoint import DEMO_FOLDER
from qvsplit.checks import Question
from qvsplit.errors import ModelError, OutOfMemory, UsageError
from qvsplit.extract import Settings, extract_pictures
from qvsplit.language import Asked, Decoding, Language
from qvsplit.weights import load_language

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
def few(album_folder):
    """Three photographs' rows, of three shapes."""
    album = open_album(album_folder)
    rows = {row.path: row for row in album}
    return album, [rows[name] for name in NAMES]


@pytest.fixture
def asker(few):
    return open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS))


@pytest.fixture(scope="module")
def told(few, photos, whole):
    """The whole model's answer to a question about some of the photographs, from their pixels, one by one."""

    @functools.cache
    def answer(question, *names):
        return whole.answer([upright_rgb(photos / name) for name in names], question)

    return answer


@pytest.fixture
def counted(monkeypatch):
    """How often a prefix was computed, and how large every batch was."""
    seen = {"prefills": 0, "batches": []}
    prefill, generate = Language.prefill, Language.generate

    def counting_prefill(self, *given, **named):
        seen["prefills"] += 1
        return prefill(self, *given, **named)

    def counting_generate(self, asked, *given, **named):
        seen["batches"].append(len(asked))
        return generate(self, asked, *given, **named)

    monkeypatch.setattr(Language, "prefill", counting_prefill)
    monkeypatch.setattr(Language, "generate", counting_generate)
    return seen


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_questions_behind_one_prefix_get_the_whole_models_answers(asker, few, told, counted, number):
    row = few[1][1]
    answers = asker.answers(row, questions(number))
    assert [answer.tokens for answer in answers] == [told(question, row.path) for question in questions(number)]
    assert counted == {"prefills": 1, "batches": [number]}
    assert [answer.question for answer in answers] == questions(number)


@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_the_same_on_the_demo_model_whose_answers_end_by_themselves(tmp_path, number):
    from qvsplit.demo import POSTCARDS, truths

    whole = WholeModel(DEMO_FOLDER)
    limits = json.loads((DEMO_FOLDER / "processor_config.json").read_text())["image_processor"]["size"]
    whole.processor.image_processor.size = limits
    names = ("boats-in-snow.jpg", "sunday.jpg")
    for name in names:
        shutil.copyfile(POSTCARDS / name, tmp_path / name)
    extract_pictures([tmp_path], out=tmp_path / "album", settings=Settings(model="demo"))
    album = open_album(tmp_path / "album")
    asker = open_asker(album)
    kinds = [*truths()[0], "Is there a dog?", "List everything.", "What colour is the house?", "Where is the boat?"]
    asked = [f"{kinds[n % len(kinds)]}{' ' * (n // len(kinds))}" for n in range(number)]
    for row in album:
        expected = [whole.answer([upright_rgb(tmp_path / row.path)], question, new_tokens=64) for question in asked]
        answers = asker.answers(row, asked)
        assert [answer.tokens for answer in answers] == expected
        assert {answer.finish_reason for answer in answers} == {"stop"}
        if number > 6:
            assert len({len(tokens) for tokens in expected}) > 2  # they end one after the other


def test_several_pictures_share_a_batch(asker, few, told, counted):
    rows, asked = few[1], questions(3)
    answers = list(asker.survey([Shown((row,)) for row in rows], [Question(text) for text in asked]))
    assert [(answer.rows[0].path, answer.question) for answer in answers] == [(r.path, q) for r in rows for q in asked]
    assert [answer.tokens for answer in answers] == [told(question, row.path) for row in rows for question in asked]
    assert counted == {"prefills": 3, "batches": [9]}


def test_a_token_budget_splits_the_batch_and_changes_no_answer(few, told, counted):
    row, asked = few[1][0], questions(9)
    asker = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS, token_budget=(row.n_tokens or 0) + 250))
    assert [answer.tokens for answer in asker.answers(row, asked)] == [told(question, row.path) for question in asked]
    assert counted["prefills"] == 1
    assert len(counted["batches"]) > 2
    assert sum(counted["batches"]) == 9


def test_where_memory_does_not_suffice_the_batch_is_halved(asker, few, told, monkeypatch):
    row, asked = few[1][0], questions(7)
    generate, sizes = Language.generate, []

    def cramped(self, batch, *given, **named):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise OutOfMemory("too much")
        return generate(self, batch, *given, **named)

    monkeypatch.setattr(Language, "generate", cramped)
    assert [answer.tokens for answer in asker.answers(row, asked)] == [told(question, row.path) for question in asked]
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_rows_that_have_ended_are_computed_no_more(tmp_path, monkeypatch):
    from qvsplit.demo import POSTCARDS

    shutil.copyfile(POSTCARDS / "sunday.jpg", tmp_path / "sunday.jpg")
    extract_pictures([tmp_path], out=tmp_path / "album", settings=Settings(model="demo"))
    album = open_album(tmp_path / "album")
    asker = open_asker(album)
    rows_a_step = []
    forward = Language._forward

    def watched(self, ids, *given, **named):
        rows_a_step.append(ids.shape[0])
        return forward(self, ids, *given, **named)

    monkeypatch.setattr(Language, "_forward", watched)
    asked = ["Is this day or night?", "Describe the picture.", "Is there a dog?"]
    answers = asker.answers(next(iter(album)), asked)
    lengths = [len(answer.tokens) for answer in answers]
    decoded = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert rows_a_step == [1, 3, *decoded]
    assert decoded[-1] == 1 < decoded[0]


def test_a_checkpoints_own_penalties_hold_for_every_row(few, checkpoint, photos, tmp_path):
    """Penalties look at the prompt: padding and neighbours must not be in it."""
    shutil.copytree(checkpoint, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}))
    whole, row, asked = WholeModel(tmp_path / "own"), few[1][1], questions(7)
    asker = open_asker(few[0], AskSettings(model=str(tmp_path / "own"), max_new_tokens=NEW_TOKENS))
    expected = [whole.answer([upright_rgb(photos / row.path)], question) for question in asked]
    assert [answer.tokens for answer in asker.answers(row, asked)] == expected
    plain = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS))
    assert [answer.tokens for answer in plain.answers(row, asked)] != expected


def test_two_different_questions_of_one_name_are_refused(asker, few):
    row = few[1][1]
    for first, second in [
        (Question("Is there a dog?", "x"), Question("Is it day?", "x")),
        (Question("dog"), Question("Is there a dog?", "dog")),
        (Question("?"), Question("?", answers=["yes", "no"])),
    ]:
        with pytest.raises(UsageError, match="two different questions"):
            asker.answers(row, [first, second])
    twice = asker.answers(row, ["What is it?", "What is it?"])
    assert twice[0] == twice[1]
    with pytest.raises(UsageError, match="a list of questions"):
        asker.answers(row, "What is it?")
    with pytest.raises(UsageError, match="an empty question"):
        asker.answer(row, " ")


def test_a_template_that_puts_text_first_gives_every_question_its_own_prefix(few, checkpoint, photos, tmp_path):
    """Text before a picture is part of its prefix: two questions then have two."""
    shutil.copytree(checkpoint, tmp_path / "own")
    file = tmp_path / "own" / "chat_template.jinja"
    template = file.read_text()
    loop = "{%- for part in message.content -%}"
    assert loop in template
    file.write_text(template.replace(loop, "{%- for part in message.content | reverse -%}"))
    whole, row, asked = WholeModel(tmp_path / "own"), few[1][1], questions(4)
    asker = open_asker(few[0], AskSettings(model=str(tmp_path / "own"), max_new_tokens=NEW_TOKENS))
    expected = [whole.answer([upright_rgb(photos / row.path)], question) for question in asked]
    assert [answer.tokens for answer in asker.answers(row, asked)] == expected
    assert [asker.answer(row, question).tokens for question in asked] == expected


def test_values_that_are_not_finite_are_no_answer(asker, few):
    row = few[1][1]
    asker.answer(row, "?")  # its prefix is sound, and warm
    norm = asker.language.model.model.language_model.norm
    with torch.no_grad():
        norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        asker.answer(row, "What is it?")
    with pytest.raises(ModelError, match="not finite"):
        asker.answer(row, Question("Is it?", answers=["yes", "no"]))


def test_warm_pictures_make_room_where_memory_ends(few, told, monkeypatch):
    asker = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS))
    first, second = few[1][:2]
    asker.answer(first, "?")
    prefill = Language.prefill

    def cramped(self, *given, **named):
        if len(asker._warm):
            raise OutOfMemory("too much")
        return prefill(self, *given, **named)

    monkeypatch.setattr(Language, "prefill", cramped)
    question = questions(1)[0]
    assert asker.answer(second, question).tokens == told(question, second.path)

    def hopeless(self, *given, **named):
        raise OutOfMemory("too much")

    monkeypatch.setattr(Language, "prefill", hopeless)
    with pytest.raises(OutOfMemory):
        asker.answer(first, "Now?")


def test_a_picture_above_the_budget_still_has_its_questions_in_one_batch(few, told, counted):
    row, asked = few[1][1], questions(3)
    asker = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS, token_budget=250))
    assert (row.n_tokens or 0) > 250
    assert [answer.tokens for answer in asker.answers(row, asked)] == [told(question, row.path) for question in asked]
    assert counted == {"prefills": 1, "batches": [3]}


# -- warm -------------------------------------------------------------------------------------------------------------


def test_the_last_pictures_stay_warm_each_with_its_own_positions(asker, few, told, counted):
    for question in questions(3):
        for row in few[1]:
            assert asker.answer(row, question).tokens == told(question, row.path)
    assert counted["prefills"] == 3


def test_what_is_kept_warm_is_bounded(few, counted):
    first, second, third = few[1]
    bound = (first.n_tokens or 0) + (second.n_tokens or 0) + 200
    asker = open_asker(few[0], AskSettings(max_new_tokens=1, warm_tokens=bound))
    for row in (first, second, first, third, first):
        asker.answer(row, "?")
        assert len(asker._warm) <= bound
    assert counted["prefills"] == 3  # the second went, for it was the longest unused
    asker.answer(second, "?")
    assert counted["prefills"] == 4
    cold = open_asker(few[0], AskSettings(max_new_tokens=1, warm_tokens=0))
    for _ in range(2):
        cold.answer(first, "?")
    assert counted["prefills"] == 6


def test_a_shared_beginning_is_computed_once(asker, few, told):
    reference, *others = few[1]
    lengths = []
    prefill = asker.language.prefill

    def watched(prompt, pictures, *, after=None):
        lengths.append((len(after) if after else 0, prompt.prefix_tokens))
        return prefill(prompt, pictures, after=after)

    asker.language.prefill = watched
    shown = [Shown((reference, other), shared=1) for other in others]
    answers = list(asker.survey(shown, [Question(text) for text in questions(2)]))
    expected = [told(question, reference.path, other.path) for other in others for question in questions(2)]
    assert [answer.tokens for answer in answers] == expected
    assert [before for before, _ in lengths] == [0, lengths[0][1], lengths[0][1]]


def test_a_prefix_of_another_beginning_is_refused(asker, few):
    two, one = few[1][:2]  # the longer one first
    ready = [asker._prepare(Shown((row,)), Question("?")) for row in (one, two)]
    embeds = [language_room.as_tensor(few[0].embeds(row)) for row in (one, two)]
    first = asker.language.prefill(ready[0].prompt, embeds[:1])
    with pytest.raises(ValueError, match="does not begin"):
        asker.language.prefill(ready[1].prompt, embeds[1:], after=first)
    with pytest.raises(ValueError, match="picture tokens"):
        asker.language.prefill(ready[1].prompt, embeds[:1])


@pytest.mark.parametrize("spread", ["auto", "hooks"])
def test_a_model_that_accelerate_spreads_gives_the_same_answers(few, told, spread, checkpoint):
    from accelerate import dispatch_model

    from qvsplit.checkpoint import open_checkpoint

    row, asked = few[1][1], questions(3)
    asker = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS, device="auto"), loaded=False)
    if spread == "hooks":  # as on two GPUs: one before every module
        half = load_language(open_checkpoint(checkpoint, "language"), dtype=torch.float32)
        names = ["embed_tokens", "rotary_emb", "norm", *(f"layers.{layer}" for layer in range(4))]
        where = {f"model.language_model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
        dispatch_model(half, where, force_hooks=True)
        assert hasattr(half, "hf_device_map")
        asker.__dict__["language"] = Language(half, asker.language.prompter)
    assert [answer.tokens for answer in asker.answers(row, asked)] == [told(question, row.path) for question in asked]


# -- attention, packed layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("new", [1, 5])
def test_shared_prefix_attention_is_attention_over_the_joined_sequence(monkeypatch, dtype, close, new):
    torch.manual_seed(0)
    heads, key_heads, width, tail = 6, 2, 8, 7
    prefixes = [
        prefix.Prefix(tuple(range(n)), (torch.randn(key_heads, n, width, dtype=dtype),),
                      (torch.randn(key_heads, n, width, dtype=dtype),), n)
        for n in (11, 4)
    ]  # fmt: skip
    rows, padding = [prefixes[0], prefixes[0], prefixes[1]], [0, 2, 1]
    tails = prefix.Tails(rows, padding)
    tails.length = tail - new
    query = torch.randn(3, heads, new, width, dtype=dtype)
    key, value = (torch.randn(3, key_heads, tail, width, dtype=dtype) for _ in range(2))
    seen = tails.seen(new, torch.device("cpu"))
    module = type("Layer", (), {"layer_idx": 0})()
    for scores in (1, 1 << 20):  # a token at a time, and all at once
        monkeypatch.setattr(prefix, "SCORE_VALUES", scores)
        got, _ = prefix.attention(module, query, key, value, seen, scaling=0.3, tails=tails)
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
    heads, width, n, tail = 4, 128, 200, 9
    behind = prefix.Prefix(tuple(range(n)), (2 * torch.randn(2, n, width),), (torch.randn(2, n, width),), n)
    query, key, value = (2 * torch.randn(1, count, tail, width) for count in (heads, 2, 2))
    narrow = prefix.Prefix(behind.input_ids, (behind.keys[0].to(dtype),), (behind.values[0].to(dtype),), n)
    tails = prefix.Tails([narrow], [0])
    module = type("Layer", (), {"layer_idx": 0})()
    seen = tails.seen(tail, torch.device("cpu"))
    got, _ = prefix.attention(module, query.to(dtype), key.to(dtype), value.to(dtype), seen, scaling=width**-0.5,
                              tails=tails)  # fmt: skip
    keys = torch.cat([narrow.keys[0][None], key.to(dtype)], 2).repeat_interleave(2, 1)
    values = torch.cat([narrow.values[0][None], value.to(dtype)], 2).repeat_interleave(2, 1)
    mask = torch.cat([torch.ones(tail, n, dtype=torch.bool), seen[0]], 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(query.to(dtype).double(), keys.double(), values.double(), mask)
    theirs = (attend(query.to(dtype), keys, values, mask).double() - exact).abs().mean()
    assert (got.transpose(1, 2).double() - exact).abs().mean() < 1.5 * theirs


def test_packing_never_holds_two_weights_of_a_layer():
    import weakref

    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(5)])
    plain = [weakref.ref(layer[0].weight) for layer in model]
    alive = []
    make = packing.PackedLinear.__init__

    def watched(self, linear, *then):
        alive.append(sum(weight() is not None for weight in plain))
        make(self, linear, *then)

    assert packing.can_pack(torch.float32)  # tried now, so that the trial is not seen below
    packing.PackedLinear.__init__ = watched
    try:
        assert packing.pack(model)
    finally:
        packing.PackedLinear.__init__ = make
    assert alive == [5, 4, 3, 2, 1]


def test_every_linear_layer_is_packed_but_one_that_is_tied(few, checkpoint, tmp_path):
    from make_checkpoint import make_tiny

    model = open_asker(few[0], AskSettings()).language.model
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert isinstance(model.lm_head, packing.PackedLinear)
    make_tiny(tmp_path / "tied", tied=True)
    from qvsplit.checkpoint import open_checkpoint

    tied = language_room.load(open_checkpoint(tmp_path / "tied", "language"), device=None, dtype=torch.float32).model
    assert [name for name, module in tied.named_modules() if type(module) is torch.nn.Linear] == ["lm_head"]
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


def test_a_packed_layer_gives_the_plain_ones_product():
    torch.manual_seed(0)
    for bias in (True, False):
        linear = torch.nn.Linear(96, 40, bias=bias)
        packed = packing.PackedLinear(linear)
        for shape in ((1, 1, 96), (3, 17, 96), (500, 96)):
            x = torch.randn(shape)
            with torch.no_grad():
                assert torch.allclose(packed(x), linear(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trouble", ["wrong", "missing"])
def test_a_torch_that_cannot_pack_is_left_alone(few, told, monkeypatch, request, trouble):
    def broken(self, x):
        if trouble == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(packing.PackedLinear, "forward", broken)
    packing.can_pack.cache_clear()  # it is tried once a process
    request.addfinalizer(packing.can_pack.cache_clear)
    asker = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS))
    assert type(asker.language.model.lm_head) is torch.nn.Linear
    row = few[1][1]
    assert [a.tokens for a in asker.answers(row, questions(3))] == [told(q, row.path) for q in questions(3)]


# -- sampling, stop strings, streaming --------------------------------------------------------------------------------


def test_sampling_is_transformers_own(asker, few, whole, photos):
    """The same seed draws the very tokens that the whole model draws from it."""
    row, question = few[1][1], "What is it?"
    inputs = whole.inputs([upright_rgb(photos / row.path)], question)
    ready = asker._prepare(Shown((row,)), Question(question))
    behind = asker.language.prefill(ready.prompt, [language_room.as_tensor(few[0].embeds(row))])
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
        (got,) = asker.language.generate([Asked(behind, ready.tail, seed)], decoding)
        assert got.tokens == expected
        seen.add(tuple(got.tokens))
    assert len(seen) == 3


def test_a_seed_gives_the_same_answers_whatever_is_asked_beside_them(few):
    row, asked = few[1][0], questions(5)
    settings = AskSettings(max_new_tokens=NEW_TOKENS, temperature=2.0, seed=7)
    asker = open_asker(few[0], settings)
    together = [answer.tokens for answer in asker.answers(row, asked)]
    assert together == [asker.answer(row, question).tokens for question in asked]
    assert len({tuple(tokens) for tokens in together}) == 5
    other = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS, temperature=2.0, seed=8))
    assert all(a.tokens != b for a, b in zip(other.answers(row, asked), together, strict=True))
    first = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS, top_k=1))
    greedy = open_asker(few[0], AskSettings(max_new_tokens=NEW_TOKENS))
    assert [a.tokens for a in first.answers(row, asked)] == [a.tokens for a in greedy.answers(row, asked)]


def test_an_answer_ends_before_a_stop_string_and_none_of_it_is_told(few):
    row = few[1][1]
    free = open_asker(few[0], AskSettings(max_new_tokens=40)).answer(row, "What is it?")
    stop = free.text[9:12]
    asker = open_asker(few[0], AskSettings(max_new_tokens=40, stop=("never to be met", stop)))
    grown: list[str] = []
    cut = asker.answer(row, "What is it?", on_text=grown.append)
    assert cut.text == free.text[: free.text.index(stop)]
    assert "".join(grown) == cut.text
    assert cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < len(free.tokens)


def test_text_grows_by_whole_characters():
    told: list[str] = []
    texts = {1: "a", 2: "a\ufffd", 3: "a图", 4: "a图ST", 5: "a图STx"}
    fake = type("Fake", (), {"stops": {99}, "model": None, "prompter": None})()
    fake.prompter = type("P", (), {"decode": staticmethod(lambda tokens: texts[len(tokens)])})()
    behind = prefix.Prefix((1,), (), (), 1)
    original, language_room._processors = language_room._processors, lambda *given: []
    try:
        row = language_room._Growing(fake, Asked(behind, [1]), Decoding(stop=("STOP",)), told.append)
    finally:
        language_room._processors = original
    heard = []
    for token in range(5):
        row.take(token)
        heard.append("".join(told))
    assert heard == ["a", "a", "a图", "a图", "a图STx"]


# -- allowed answers --------------------------------------------------------------------------------------------------


def test_scores_are_the_whole_models_log_probabilities_of_whole_answers(asker, few, whole, photos):
    spelt = {"yes": ("yes", "Yes, of course."), "no": ("no",), "a cat on a chair": ("a cat on a chair",)}
    asked = [Question(text, answers=spelt) for text in questions(3)]
    rows = few[1][:2]
    answers = list(asker.survey([Shown((row,)) for row in rows], asked))
    ends = sorted(asker.language.stops)
    for answer in answers:
        inputs = whole.inputs([upright_rgb(photos / answer.rows[0].path)], answer.question)
        for name, spellings in spelt.items():
            total = 0.0
            for spelling in spellings:
                tokens = whole.processor.tokenizer(spelling, add_special_tokens=False)["input_ids"]
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
                total += float(torch.exp(each))
            assert answer.logprobs[name] == pytest.approx(torch.tensor(total).double().log().item(), abs=2e-3)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.text == max(answer.logprobs, key=answer.logprobs.get)
        assert (answer.tokens, answer.finish_reason) == ([], "scored")
