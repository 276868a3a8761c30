"""Every way of answering gives the full model's own tokens, for every family and every kind of layer."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch

from qvsplit.answering.schema import compiler
from qvsplit.errors import ModelError, OutOfMemory
from qvsplit.kernels import prefix_products
from qvsplit.kernels.packed_linear import can_pack
from qvsplit.kernels.prefix_products import PackedPrefix
from qvsplit.models.copied_prefix import CopiedPrefix
from qvsplit.models.decoding import Decoding
from qvsplit.models.forward import Forward
from qvsplit.models.language import GenerateOptions, LanguageModel
from qvsplit.models.shared_prefix import SharedPrefix
from qvsplit.models.ways import way_of
from qvsplit.models.whole_prompt import WholePrompt
from tests.support.families import FAMILIES
from tests.support.language_models import TinyLanguageModel, noise

NEW = 12
GREEDY = Decoding(max_new_tokens=NEW)
WAYS = {
    "qwen2_vl": SharedPrefix, "qwen2_5_vl": SharedPrefix, "qwen3_vl": SharedPrefix, "qwen3_vl_moe": SharedPrefix,
    "qwen3_5": SharedPrefix, "qwen3_5_moe": SharedPrefix, "qwen4_exp": CopiedPrefix, "qwen2_5_omni": SharedPrefix,
    "qwen3_omni_moe": SharedPrefix, "glm4v": SharedPrefix, "gemma3": SharedPrefix, "paligemma": WholePrompt,
    "paligemma2": WholePrompt, "llava": SharedPrefix, "llava_onevision": SharedPrefix, "internvl": SharedPrefix,
    "idefics3": SharedPrefix, "smolvlm": SharedPrefix, "mistral3": SharedPrefix, "minicpmv4_6": SharedPrefix,
    "lfm2_vl": SharedPrefix,
}  # fmt: skip
ONE_OF_EACH = ["qwen3_vl", "qwen3_5", "qwen4_exp", "lfm2_vl", "gemma3", "paligemma"]
WORDS = "What of the cat, the cup, or of anything else at all is on the left, and who put it there, if anybody did?"


def questions(number: int) -> list[str]:
    """Different ones, of different lengths."""
    words = WORDS.split()
    return [" ".join((words * 3)[n % 5 : n % 5 + 1 + (n * 7) % 23]) + f" {n}" for n in range(number)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A family's tiny models, made once."""

    @functools.cache
    def make(name, **text_settings):
        return TinyLanguageModel(name, tmp_path_factory.mktemp(name) / "checkpoint", **text_settings)

    return make


def answers(model, asked, decoding=GREEDY, **options):
    return [one.tokens for one in model.language.generate(asked, decoding, GenerateOptions(**options))]


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_behind_several_prefixes_get_the_full_models_answers(tiny, name):
    """Two images' questions in one batch, of many lengths, longer than any window; and one by one."""
    model = tiny(name)
    images, texts = [noise(1), noise(2, 56, 84)], questions(3)
    behind = [model.asked([image], texts) for image in images]
    mixed = [*behind[0], *behind[1]]
    expected = [model.full.answer([image], text, new_tokens=NEW) for image in images for text in texts]
    assert answers(model, mixed) == expected
    assert [answers(model, [one])[0] for one in mixed[:2]] == expected[:2]
    assert len(set(map(tuple, expected))) > 1


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("longest", "layouts"), [(1 << 14, 1), (10, 0)])
def test_runs_of_different_lengths_lay_their_prefix_out_once_if_it_is_not_too_long(tiny, monkeypatch, longest, layouts):
    model, made = tiny("qwen3_5"), []
    monkeypatch.setattr(prefix_products, "LEAST_TOKENS", 1)
    monkeypatch.setattr(prefix_products, "MOST_PREFIX_TOKENS", longest)
    init = PackedPrefix.__init__
    monkeypatch.setattr(PackedPrefix, "__init__", lambda self, *args: (made.append(1), init(self, *args))[1])
    asked = model.asked([noise(1)], ["A?", "And a longer one?", "And one that is longer still, by far?"])
    assert len({len(one.suffix) for one in asked}) == 3
    generated = answers(model, asked)
    scored = model.language.score(asked, [[[5, 6], [7]]] * 3)
    layers = sum(kind == "full_attention" for kind in model.language.model.config.get_text_config().layer_types)
    assert len(made) == 2 * layers * layouts
    monkeypatch.setattr(prefix_products, "LEAST_TOKENS", 1 << 20)
    assert answers(model, asked) == generated
    torch.testing.assert_close(torch.tensor(scored), torch.tensor(model.language.score(asked, [[[5, 6], [7]]] * 3)))


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "gemma3"])
def test_twenty_questions_behind_one_prefix(tiny, name):
    model, image, texts = tiny(name), noise(1), questions(20)
    asked = model.asked([image], texts)
    assert answers(model, asked) == [model.full.answer([image], text, new_tokens=NEW) for text in texts]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_a_plain_forward_pass(tiny, name):
    model, image, texts = tiny(name), noise(3), questions(2)
    asked = model.asked([image], texts)
    tokenizer = model.full.processor.tokenizer
    choices = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in mine]
        for mine in (["yes", "no, not at all", "no"], ["red", "green or blue", "none", "green"])  # some begin others
    ]
    scores = model.language.score(asked, choices)
    for text, mine, got in zip(texts, choices, scores, strict=True):
        assert got == pytest.approx([plain_score(model, image, text, tokens) for tokens in mine], abs=1e-4)


def plain_score(model, image, question, choice):
    """Log-probability of a choice and the end after it, by one forward pass of the full model on the pixels."""
    given = model.full.inputs([image], question)
    given.pop("labels", None)  # for training; PaliGemma's processor gives them
    more = torch.tensor([choice])
    for name, value in list(given.items()):
        if name == "input_ids":
            given[name] = torch.cat([value, more], 1)
        elif name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            # PaliGemma parts question, 0, and answer, 1
            type_ = int(name == "attention_mask" or (name == "token_type_ids" and not bool(value.any())))
            given[name] = torch.cat([value, torch.full_like(more, type_)], 1)
    with torch.inference_mode():
        logs = torch.log_softmax(model.full.model(**given).logits[0, -len(choice) - 1 :].double(), -1)
    ends = sorted(model.language.stops)
    return float(logs[range(len(choice)), choice].sum() + torch.logsumexp(logs[-1, ends], 0))


@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen4_exp", "qwen2_5_omni", "glm4v", "llava", "internvl", "idefics3",
     "lfm2_vl"],
)  # fmt: skip
def test_further_images_are_computed_behind_a_prefix(tiny, name):
    model, images, texts = tiny(name), [noise(4), noise(5)], questions(3)
    prompts = [model.prompt(images, text) for text in texts]
    features = model.features(images)
    first = model.language.prefill(prompts[0].upto(1), features[:1])
    whole = model.language.prefill(prompts[0], features)
    longer = model.language.prefill(prompts[0], features[1:], after=first)
    assert longer.input_ids == whole.input_ids
    assert longer.next_position == whole.next_position
    expected = [model.full.answer(images, text, new_tokens=NEW) for text in texts]
    for prefix in (whole, longer):
        assert answers(model, [model.question(prefix, prompt) for prompt in prompts]) == expected
    again = [model.question(first, prompts[0].upto(1))]  # what is behind `first` has left it as it was
    assert len(again[0].suffix) == 0
    assert model.language.prefill(prompts[0], features[1:], after=first).next_position == whole.next_position


def test_images_that_see_themselves_both_ways_are_not_computed_behind_a_prefix(tiny):
    model, images, texts = tiny("gemma3"), [noise(4), noise(5)], questions(3)
    assert not model.language.can_extend
    asked = model.asked(images, texts)
    assert answers(model, asked) == [model.full.answer(images, text, new_tokens=NEW) for text in texts]


@pytest.mark.parametrize("window", [3, 11, 40])
def test_sliding_windows_are_counted_in_tokens(tiny, window):
    """Also behind a second image, and for choices that stand side by side."""
    model, images, texts = tiny("mistral3", sliding_window=window), [noise(6), noise(7)], questions(5)
    prompts = [model.prompt(images, text) for text in texts]
    features = model.features(images)
    first = model.language.prefill(prompts[0].upto(1), features[:1])
    longer = model.language.prefill(prompts[0], features[1:], after=first)
    asked = [model.question(longer, prompt) for prompt in prompts]
    assert answers(model, asked) == [model.full.answer(images, text, new_tokens=NEW) for text in texts]
    assert all(keys.shape[1] == min(window - 1, len(longer)) for keys in longer.keys)
    alone = model.asked(images[:1], texts)
    choices = [[[20, 21, 22, 23, 24, 25], [30], [40, 41], [40], [20, 21], [40, 41, 42], [40, 43]]] * 5
    for text, got in zip(texts, model.language.score(alone, choices), strict=True):
        expected = [plain_score(model, images[0], text, tokens) for tokens in choices[0]]
        assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_seed_draws_the_same_whatever_is_asked_beside(tiny, name):
    model, texts = tiny(name), questions(4)
    decoding = Decoding(max_new_tokens=NEW, temperature=2.0)
    image = noise(1)
    prompts = [model.prompt([image], text) for text in texts]
    prefix = model.language.prefill(prompts[0], model.features([image]))
    asked = [model.question(prefix, prompt, seed) for seed, prompt in enumerate(prompts)]
    together = answers(model, asked, decoding)
    assert together == [answers(model, [one], decoding)[0] for one in asked]
    torch.manual_seed(2)
    with torch.inference_mode():
        given = model.full.inputs([image], texts[2])
        drawn = model.full.model.generate(**given, max_new_tokens=NEW, do_sample=True, temperature=2.0, top_k=None)
    assert together[2] == drawn[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen4_exp", "paligemma"])
def test_a_checkpoints_own_penalties_hold_once(tiny, name):
    model, image, texts = tiny(name), noise(1), questions(3)
    asked = model.asked([image], texts)
    seen = {str(answers(model, asked))}
    try:
        for penalty in (1.05, 1.15, 1.3, 1.5, 2.0):
            for one in (model.full.model, model.language.model):
                one.generation_config.repetition_penalty = penalty
            expected = [model.full.answer([image], text, new_tokens=NEW) for text in texts]
            assert answers(model, asked) == expected
            seen.add(str(expected))
    finally:
        for one in (model.full.model, model.language.model):
            one.generation_config.repetition_penalty = None
    assert len(seen) > 2


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_stop_strings_schemas_and_text_as_it_grows(tiny, name):
    model, image, texts = tiny(name), noise(1), questions(3)
    asked = model.asked([image], texts)
    free = model.language.generate(asked, GREEDY)
    stop = free[1].text[2:4]
    heard = dict.fromkeys(range(3), "")
    options = GenerateOptions(on_text=lambda number, text: heard.update({number: heard[number] + text}))
    stopped = model.language.generate(asked, Decoding(max_new_tokens=NEW, stop=(stop,)), options)
    assert stopped[1].text == free[1].text[: free[1].text.index(stop)]
    assert stopped[1].finish_reason == "stop"
    assert heard == {number: one.text for number, one in enumerate(stopped)}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = compiler(schema, model.prompter.tokenizer, model.language.stops)
    decoding = Decoding(max_new_tokens=40, json_schema=schema)
    for one in model.language.generate(asked, decoding, GenerateOptions(constraint=constraint)):
        assert one.text.replace(" ", "").replace("\n", "") in ('{"a":true}', '{"a":false}')


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_cancelled_and_without_numbers(tiny, name):
    model, texts = tiny(name), questions(2)
    asked = model.asked([noise(1)], texts)
    steps = iter([False, False, *[True] * 20])
    cancelled = model.language.generate(
        asked, Decoding(max_new_tokens=400), GenerateOptions(is_cancelled=lambda: next(steps))
    )
    assert {one.finish_reason for one in cancelled} <= {"cancelled", "stop"}
    assert all(1 <= len(one.tokens) < 10 and one.text for one in cancelled)
    head = model.language.model.lm_head.register_forward_hook(lambda _, given, out: out.fill_(float("nan")))
    try:
        broken = model.language.generate(asked, GREEDY)
        assert all(isinstance(one.error, ModelError) and one.finish_reason == "error" for one in broken)
        assert all(isinstance(one, ModelError) for one in model.language.score(asked, [[[5], [6]]] * 2))
    finally:
        head.remove()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_memory_that_does_not_suffice_is_said_as_such(tiny, name):
    model = tiny(name)
    asked = model.asked([noise(1)], questions(2))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    head = model.language.model.lm_head.register_forward_hook(full)
    try:
        for failing in (
            lambda: model.language.generate(asked, GREEDY),
            lambda: model.language.score(asked, [[[5]]] * 2),
        ):
            with pytest.raises(OutOfMemory, match="does not fit into memory"):
                failing()
    finally:
        head.remove()
    assert len(answers(model, asked)) == 2


@pytest.mark.parametrize("name", ["qwen3_5", "qwen4_exp", "gemma3", "paligemma"])
def test_a_model_that_accelerate_spreads_answers_the_same(tiny, name):
    from accelerate import dispatch_model

    model, image, texts = tiny(name), noise(1), questions(3)
    spread = copy.deepcopy(model.full.model).requires_grad_(False)
    paths = [name.rpartition(".")[0] for name in spread.state_dict()]
    where = {
        re.sub(r"(layers[.][0-9]+)[.].*", r"\1", path): "cpu" for path in [*paths, "model.language_model.rotary_emb"]
    }
    dispatch_model(spread, where, force_hooks=True)  # as on several GPUs: a hook before every module
    language = LanguageModel(spread, model.prompter, model.prefix)
    prompts = [model.prompt([image], text) for text in texts]
    prefix = language.prefill(prompts[0], model.features([image]))
    got = language.generate([model.question(prefix, prompt) for prompt in prompts], GREEDY)
    assert [one.tokens for one in got] == [model.full.answer([image], text, new_tokens=NEW) for text in texts]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_is_as_near_as_the_full_model_in_it(tiny, name):
    """The same features into both: the first token's log-probabilities, which rounding moves a little."""
    model, image, text = tiny(name), noise(1), questions(3)[2]
    prompt, features = model.prompt([image], text), model.features([image])
    narrow = copy.deepcopy(model.full.model).to(torch.bfloat16)
    whole, shared = (LanguageModel(copy.deepcopy(narrow), model.prompter, prefix) for prefix in ("none", model.prefix))
    choices = [[[token] for token in range(40, 60)]]
    scores = [one.score([model.question(one.prefill(prompt, features), prompt)], choices)[0] for one in (whole, shared)]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)
    assert max(scores[0]) - min(scores[0]) > 3


def test_every_familys_way_is_known(tiny):
    """A family that comes to be tested says here which way is its own."""
    assert WAYS.keys() == FAMILIES.keys()
    for name, way in WAYS.items():
        model = tiny(name).language
        assert type(model._way) is way
        assert (model.note is not None) == (way is WholePrompt)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "unheard_of"}, "'unheard_of' have not been tried"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"frequencies \(dynamic\)"),
        (
            {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 8},
            "chunked_attention have not been tried",
        ),
    ],
)
def test_what_nobody_has_tried_computes_whole_prompts(tiny, change, reason):
    model = copy.deepcopy(tiny("llava").full.model)
    for name, value in change.items():
        object.__setattr__(model.config.get_text_config(), name, value)
    language = LanguageModel(model, tiny("llava").prompter, "causal")
    assert isinstance(language._way, WholePrompt)
    assert not language.can_extend
    assert language.note is not None
    assert re.search(reason, language.note)
    assert "one after the other" in language.note


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_a_family_of_which_nothing_is_known_is_as_exact(tiny, name):
    known = tiny(name)
    way, note = way_of(Forward(known.full.model), "none", lambda: [1])
    assert isinstance(way, WholePrompt)
    assert note
    language = LanguageModel(known.full.model, known.prompter, "none")
    image, texts = noise(1), questions(3)
    prompts = [known.prompt([image], text) for text in texts]
    prefix = language.prefill(prompts[0], known.features([image]))
    got = language.generate([known.question(prefix, prompt) for prompt in prompts], GREEDY)
    assert [one.tokens for one in got] == [known.full.answer([image], text, new_tokens=NEW) for text in texts]
