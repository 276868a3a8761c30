"""Of every family, prompts made from placeholders are its processor's own; what users and stores say is only text."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ModelError, StoreDamaged, UsageError
from qvsplit.models.preparing import load_preparer
from qvsplit.models.processor_proof import template_options
from qvsplit.models.prompt import Placeholder, Prompter, question_messages
from tests.support.families import FAMILIES
from tests.support.families.reference import shown_item
from tests.support.photographs import photographs

TEXTS = [
    "What is in the picture?", "  leading", "trailing \n\n", " \n\n x \n", "a\tb\r\nc", "line\n\n\n\nline", "a  b   c    d",
    "🙂👩‍👩‍👧", "größer als π? 日本語 ▁x", "{{ 1 }} {% if x %}", "",
]  # fmt: skip
THINKING = {"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen3_omni_moe", "glm4v"}
ONE_IMAGE_ONLY = {"llava_onevision"}


class Family:
    """One family's prompts from placeholders, and its processor's own, of two photographs of different shapes."""

    def __init__(self, folder: Path, reference) -> None:
        checkpoint = open_checkpoint(folder, "both")
        self.prompter = Prompter(checkpoint)
        self.reference = reference
        self.tokenizer = reference.processor.tokenizer
        self.images = [
            Image.open(path).convert("RGB").resize(size)
            for path, size in zip(photographs(), ((300, 200), (210, 370)), strict=False)
        ]
        preparer = load_preparer(checkpoint, hf.load_config(checkpoint), min_pixels=None, max_pixels=None)
        prepared = [preparer.prepare(np.array(image)) for image in self.images]
        self.placeholders = [
            Placeholder(one.placeholder, one.n_tokens, one.grid_thw, inputs=one.inputs) for one in prepared
        ]

    def assert_same(
        self, numbers: list[int], text: str, system: str | None = None, *, thinking: bool = False
    ) -> list[int]:
        """Hold our prompt about these of the images against the processor's; give its tokens."""
        shown = [self.images[number] for number in numbers]
        theirs = self.reference.inputs(shown, text, system, enable_thinking=thinking)
        placeholders = [self.placeholders[number] for number in numbers]
        ours = self.prompter.ask(text, placeholders, system=system, thinking=thinking)
        assert ours.input_ids == theirs["input_ids"][0].tolist()
        types = {name: values[0].tolist() for name, values in theirs.items() if name.endswith("token_type_ids")}
        assert ours.token_types == types
        token = self.reference.model.config.image_token_id
        assert ours.item_types == [int(number == token) for number in ours.input_ids]
        return ours.input_ids

    def ask(self, text: str, system: str | None = None) -> list[int]:
        return self.prompter.ask(text, self.placeholders[:1], system=system).input_ids

    def ask_with(self, runs) -> list[int]:
        """Ask about the first image, with another placeholder."""
        return self.prompter.ask("?", [replace(self.placeholders[0], runs=tuple(runs), name="a.jpg")]).input_ids

    @functools.cached_property
    def control(self) -> dict[str, int]:
        """The control tokens: special ones, and those that the template or the placeholders write."""
        written = self.reference.processor.chat_template + "".join(
            text for one in self.placeholders for text, _ in one.runs
        )
        return {
            token.content: number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in written and not token.content.isspace())
        }

    def control_in(self, ids: list[int]) -> list[int]:
        return [number for number in ids if number in set(self.control.values())]


@pytest.fixture(scope="session")
def family(family_checkpoint, family_reference):
    return functools.cache(lambda name: Family(family_checkpoint(name), family_reference(name)))


@pytest.fixture
def own(family_checkpoint, tmp_path):
    """A copy of a family's checkpoint that a test may change."""
    return lambda name: Path(shutil.copytree(family_checkpoint(name), tmp_path / name))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_the_processors_own(name, family):
    one = family(name)
    shown = ([0], [1]) if name in ONE_IMAGE_ONLY else ([0], [1], [0, 1], [1, 0])
    for number, text in enumerate(TEXTS):
        one.assert_same(shown[number % len(shown)], text)
        one.assert_same(shown[(number + 1) % len(shown)], text, system="You are\n terse.")
    plain = one.assert_same([0], TEXTS[0])
    assert plain != one.assert_same([1], TEXTS[0]) or name in {"gemma3", "llava", "paligemma", "paligemma2"}
    # not silently left out
    assert "You are\n terse." in one.tokenizer.decode(one.assert_same([0], TEXTS[0], system="You are\n terse."))
    assert one.assert_same([0], TEXTS[0], system=" \nspaces around\n ")


CONVERSATIONS = [
    [("What is in it?", "A cat <b> & \n\n")],
    [("What is in it?", "A cat.\n\nTwo."), ("  And?  ", " lead"), ("größer als π?", "🙂 {{ 1 }}")],
    [("", "a  b   c")],
]


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_are_the_processors_own(name, family):
    one = family(name)
    for earlier in CONVERSATIONS:
        chat, shown = [], [shown_item(one.images[0])]
        for question, answer in [*earlier, ("Q?", None)]:
            chat.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
            if answer is not None:
                chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            shown = []
        theirs = one.reference.processor.apply_chat_template(
            chat,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **template_options(one.reference.processor, thinking=False),
        )
        ours = one.prompter.chat(question_messages("Q?", ["image"], None, earlier), one.placeholders[:1])
        assert ours.input_ids == theirs["input_ids"][0].tolist()
        told = one.tokenizer.decode(ours.input_ids)
        assert all(text.strip() in told for turn in earlier for text in turn)  # not silently left out


@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_is_switched_on_and_off_where_there_is_a_switch(name, family):
    one = family(name)
    on, off = (one.assert_same([0], TEXTS[0], thinking=thinking) for thinking in (True, False))
    assert (on != off) == (name in THINKING)


def test_a_family_that_prepares_images_otherwise_among_others_takes_one_at_a_time(family):
    (name,) = ONE_IMAGE_ONLY
    one = family(name)
    with pytest.raises(UsageError, match="ask about one image at a time") as caught:
        one.prompter.ask(TEXTS[0], one.placeholders)
    assert "\n" not in str(caught.value)
    one.assert_same([0], TEXTS[0])


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "gemma3"])
def test_transformers_warns_of_nothing(name, family_checkpoint, caplog):
    """What it says of a template without a switch of reasoning is of no use to users."""
    prompter = Prompter(open_checkpoint(family_checkpoint(name), "both"))
    image = Image.new("RGB", (90, 60))
    placeholder = prompter.placeholder_of(hf.process_image(prompter.processor, image)[1])
    for thinking in (True, False):
        prompter.ask("?", [placeholder, placeholder], system="Hello.", thinking=thinking)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_without_a_chat_template_a_prompt_is_images_then_text(name, own):
    folder = own(name)
    (folder / "chat_template.jinja").unlink()
    prompter = Prompter(open_checkpoint(folder, "both"))
    processor = prompter.processor
    assert not processor.chat_template
    images = [Image.open(path).convert("RGB") for path in photographs()[:2]]
    placeholders = [prompter.placeholder_of(hf.process_image(processor, image)[1]) for image in images]
    for text in TEXTS:
        for count in (1, 2):
            theirs = processor(text=["<image>" * count + text], images=images[:count], return_tensors="pt")
            prompt = prompter.ask(text, placeholders[:count])
            assert prompt.input_ids == theirs["input_ids"][0].tolist()
            assert prompt.token_types["token_type_ids"] == theirs["token_type_ids"][0].tolist()
    hostile = prompter.ask("<image><bos>", placeholders[:1])
    assert hostile.input_ids.count(prompter.tokenizer.bos_token_id) == 1
    assert sum(hostile.item_types) == placeholders[0].n_tokens
    with pytest.raises(UsageError, match="has no chat template: it takes no system message"):
        prompter.ask("?", placeholders[:1], system="Obey.")


# ------------------------------------------------------------------------------------------------------ users' texts


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_question_are_text(name, family):
    one = family(name)
    harmless = one.control_in(one.ask("hello")), one.control_in(one.ask("hello", "hello"))
    tokens = sorted(one.control)
    # a family's marks of tiles are many, and alike
    tokens = [token for token in tokens if not re.search(r"[3-9]|\d\d", token)]
    assert len(tokens) >= 5
    halves = [token[: len(token) // 2] + "{}" + token[len(token) // 2 :] for token in tokens]
    texts = [
        *tokens,
        "".join(tokens),
        " ".join(tokens),
        *(half.format(token) for half, token in zip(halves, tokens, strict=True)),
    ]
    for text in texts:
        ids = one.ask(f"a{text}b")
        assert one.control_in(ids) == harmless[0], text
        assert f"a{text}b" in one.tokenizer.decode(ids)
    everything = "".join(tokens)
    both = one.prompter.ask(everything, one.placeholders[:1], system=everything)
    assert one.control_in(both.input_ids) == harmless[1]
    assert one.tokenizer.decode(both.input_ids).count(everything) == 2
    assert sum(map(bool, both.item_types)) == one.placeholders[0].n_tokens


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "gemma3"])
def test_text_that_would_be_taken_for_something_else_is_refused(name, family):
    one = family(name)
    for mark in "\U000f0000", "\U000f0001":
        with pytest.raises(UsageError, match=r"U\+F0000"):
            one.ask(f"a{mark}b")
        with pytest.raises(UsageError, match=r"U\+F0000"):
            one.ask("a", system=mark)
    with pytest.raises(UsageError, match="not UTF-8"):
        one.ask("a\udcffb")


def blanks_and_words(alphabet: str):
    return st.lists(st.sampled_from([*alphabet, "\n", "\n\n", " ", "  ", "\t", "What", "é", "🙂", "日"])).map("".join)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_any_text_gives_the_processors_tokens(name, family):
    """One puts a blank in front of the first piece alone, the other has runs of blanks among its tokens."""
    one = family(name)
    usual = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\U000f0000\U000f0001"), max_size=40)

    @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.one_of(usual, blanks_and_words("▁<>|ab")), st.sampled_from([[0], [0, 1]]))
    def holds(text, numbers):
        if not any(token in text for token in one.control):
            one.assert_same(numbers, text)

    holds()


def test_a_tokenizer_that_makes_a_control_token_of_plain_text_is_refused(own):
    """Nothing is asked: the alternative would be a silently different prompt."""
    folder = own("llava")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    *_, last = sorted(model["vocab"], key=model["vocab"].__getitem__)  # the last merge makes it, and no other takes it
    model["vocab"]["<s"] = model["vocab"].pop(last)
    model["merges"][-1:] = [["<", "s"], ["<s", ">"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    prompter = Prompter(open_checkpoint(folder, "both"))
    image = Image.new("RGB", (50, 50))
    placeholder = prompter.placeholder_of(hf.process_image(prompter.processor, image)[1])
    assert prompter.ask("hello", [placeholder])
    with pytest.raises(ModelError, match="its tokenizer made control tokens of plain text"):
        prompter.ask("a <s> b", [placeholder])


# ------------------------------------------------------------------------------------------------------ placeholders


@pytest.mark.parametrize("name", FAMILIES)
def test_a_foreign_stores_placeholder_injects_nothing(name, family):
    one = family(name)
    whole = one.placeholders[0]
    assert one.ask_with(whole.runs) == one.ask("?")
    own = {re.sub(r"\d+", "#", token) for text, _ in whole.runs for token in one.control if token in text}
    image = one.tokenizer.convert_ids_to_tokens(one.reference.model.config.image_token_id)
    foreign = [token for token in one.control if re.sub(r"\d+", "#", token) not in own and token != image]
    assert one.tokenizer.eos_token in foreign
    for token in foreign:
        for runs in (
            [*whole.runs, (token, 1)],
            [(f"x{token}", 2), *whole.runs],
            [*whole.runs, (token[:2], 1), (token[2:], 1)],
            [(token[:-1], 1), (token[-1], 1), *whole.runs],
        ):
            with pytest.raises(StoreDamaged, match=r"a\.jpg holds the control token") as caught:
                one.ask_with(runs)
            assert "\n" not in str(caught.value)
    for runs in (
        [*whole.runs, (image, 1)],
        [(image, 1 << 40), *whole.runs],
        whole.runs[:0],
        [("text", 3)],
        [*whole.runs, ("x", 1 << 40)],
    ):
        with pytest.raises(StoreDamaged, match=r"a\.jpg does not have the"):
            one.ask_with(runs)
    for mark in "\U000f0000", "\U000f0001":
        with pytest.raises(StoreDamaged, match=r"a\.jpg holds"):
            one.ask_with([(mark, 1), *whole.runs])


def test_another_familys_control_tokens_are_text_at_most(family):
    """Where the tokenizer does not know them they are characters like any others."""
    one, other = family("internvl"), family("llava")
    runs = [*one.placeholders[0].runs, ("".join(other.control), 1)]
    assert "<image>" not in one.control and one.control_in(one.ask_with(runs)) == one.control_in(one.ask("?"))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "lfm2_vl"])
def test_a_larger_image_may_have_marks_of_more_rows_than_small_ones_have(name, family):
    """They differ in their numbers alone; no other control token may differ from a mark in numbers alone, and slip in."""
    one = family(name)
    (mark,) = (token for token in one.tokenizer.get_added_vocab() if "row_5_col_5" in token)
    assert all(mark not in text for text, _ in one.placeholders[0].runs)
    number = one.tokenizer.convert_tokens_to_ids(mark)
    assert number in one.ask_with([*one.placeholders[0].runs, (mark, 1)])
    assert number not in one.ask(mark)  # and yet users may not write it


def test_line_breaks_of_a_placeholder_join_with_those_beside_it(family):
    """They are added tokens of this family, and no control tokens."""
    one = family("gemma3")
    runs = one.placeholders[0].runs
    assert runs[0][0].startswith("\n\n")
    assert one.control_in(one.ask_with([("\n", 1), *runs])) == one.control_in(one.ask("?"))
    with pytest.raises(StoreDamaged, match="joins into the control token <start_of_turn>"):
        one.prompter.ask("_of_turn>", [replace(one.placeholders[0], runs=(*runs, ("<start", 1)))])


@pytest.mark.parametrize("name", ["qwen2_vl", "mistral3", "llava_onevision"])
def test_a_foreign_stores_inputs_set_nothing_else_of_the_model(name, family):
    one = family(name)
    whole = one.placeholders[0]
    assert one.prompter.ask("?", [whole])
    for other in ("position_ids", "inputs_embeds", "use_cache", "vision_feature_layer", "video_grid_thw"):
        value = {"dtype": "int64", "shape": [1, 1], "values": [0]}
        hostile = replace(whole, inputs={**whole.inputs, other: value}, name="a.jpg")
        with pytest.raises(StoreDamaged, match=f"a.jpg holds the input {other}, which this model's processor"):
            one.prompter.ask("?", [hostile])
