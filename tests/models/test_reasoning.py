"""Reasoning and answer apart, in the text and tokens of any family; and an answer that grows behind a thought."""

from __future__ import annotations

import pickle

import pytest
import torch

from qvsplit.models.decoding import AnswerRules, Decoding, GrowingAnswer
from qvsplit.models.reasoning import MARKS, ReasoningMarks

CONTROL = ("<|im_start|>", "<|im_end|>", "\n\n\n")  # some tokenizers have tokens of mere blanks
THINK = ("<think>", "</think>")
STOP = 1  # <|im_end|>
PROMPT = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


class Characters:
    """A tokenizer: a character is a token, but for the tokens of its own, of which decoding leaves out `special`."""

    def __init__(self, *own: str, special: bool = False):
        self.own = (*CONTROL, *own)
        self.special = self.own if special else CONTROL
        self.added_tokens_decoder = dict(enumerate(self.own))

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = []
        while text:
            token = next((one for one in self.own if text.startswith(one)), text[0])
            ids.append(self.own.index(token) if token in self.own else len(self.own) + ord(token))
            text = text[len(token) :]
        return {"input_ids": ids}

    def ids(self, text: str) -> list[int]:
        return self(text)["input_ids"]

    def decode(self, ids) -> str:
        texts = [self.own[one] if one < len(self.own) else chr(one - len(self.own)) for one in ids]
        return "".join(text for text in texts if text not in self.special)


TOKENIZERS = {
    "tokens": Characters(*THINK),
    "special tokens": Characters(*THINK, special=True),
    "text": Characters(),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def grown(tokenizer, answer: str, prompt: str = PROMPT, *, ends: str = "stop", **more):
    """An answer that a model writes, taken token by token, and what was heard of it."""
    heard: list[str] = []
    tokens = tokenizer.ids(answer) + ([STOP] if ends == "stop" else [])
    marks = ReasoningMarks.of(tokenizer)
    decoding = Decoding(max_new_tokens=len(tokens), marks=marks, **more)
    rules = AnswerRules(decoding, frozenset({STOP}), tokenizer.decode, on_text=heard.append)
    growing = GrowingAnswer(rules, tokenizer.ids(prompt))
    for token in tokens:
        growing.take(token)
        if growing.finish_reason:
            break
    quiet = GrowingAnswer(AnswerRules(decoding, rules.stops, rules.decode), tokenizer.ids(prompt))
    for token in growing.tokens:
        quiet.take(token)
    assert (quiet.text, quiet.reasoning) == (growing.text, growing.reasoning)  # whether or not somebody listens
    return growing, heard


@pytest.mark.parametrize(
    ("prompt", "answer", "reasoning", "text"),
    [
        ("", "A cat.", "", "A cat."),
        ("", " A cat.\n", "", " A cat.\n"),
        ("", "2 < 3 <thin", "", "2 < 3 <thin"),
        ("<think>\n\n</think>\n\n", "A cat.", "", "A cat."),  # what a template says with thinking switched off
        ("<think>\n", "Let me see.\n</think>\n\nA cat.", "Let me see.", "A cat."),
        ("<think>", "Let me see.</think>A cat.", "Let me see.", "A cat."),
        ("<think>\n", "<think>\nLet me see.</think>A cat.", "Let me see.", "A cat."),
        ("", "<think>Let me see.</think>\nA cat.", "Let me see.", "A cat."),
        ("", "\n<think>\nLet me see.\n</think>\nA cat.", "Let me see.", "A cat."),
        ("", "<think>\n\n</think>\n\nA cat.", "", "A cat."),
        ("", "A <think>Let me see.</think>cat.", "Let me see.", "A cat."),
        ("", "<think>One.</think>A <think>Two.</think>cat.", "One.\n\nTwo.", "A cat."),
        ("<think>\n", "Let me see.", "Let me see.", ""),
        ("", "<think>Let me see.", "Let me see.", ""),
    ],
)  # fmt: skip
def test_an_answer_has_no_thought_in_it(tokenizer, prompt, answer, reasoning, text):
    for ends in ("stop", "length"):
        growing, heard = grown(tokenizer, answer, PROMPT + prompt, ends=ends)
        assert (growing.text, growing.reasoning, growing.finish_reason) == (text, reasoning, ends)
        assert "".join(heard) == text
        assert growing.tokens == [*tokenizer.ids(answer), STOP][: None if ends == "stop" else -1]


def test_a_thought_that_nothing_announced_is_no_answer_either(tokenizer):
    growing, heard = grown(tokenizer, "A cat? Yes.</think>\n\nA cat.", PROMPT + "<think>\n\n</think>\n\n")
    assert (growing.text, growing.reasoning) == ("A cat.", "A cat? Yes.")
    # what was heard before nobody can take back; the answer is heard whole behind it
    assert "".join(heard) == "A cat? Yes.A cat."


def test_cut_at_any_token_it_shows_neither_thoughts_nor_half_a_mark(tokenizer):
    whole = tokenizer.ids("<think>Let me see.</think>\n\nA cat.")
    answers = []
    for length in range(1, len(whole) + 1):
        marks = ReasoningMarks.of(tokenizer)
        heard: list[str] = []
        decoding = Decoding(max_new_tokens=length, marks=marks)
        rules = AnswerRules(decoding, frozenset({STOP}), tokenizer.decode, on_text=heard.append)
        growing = GrowingAnswer(rules, tokenizer.ids(PROMPT))
        for token in whole[:length]:
            growing.take(token)
        assert growing.finish_reason == "length"
        assert "".join(heard) == growing.text
        answers.append(growing.text)
        cancelled = GrowingAnswer(AnswerRules(Decoding(marks=marks), frozenset({STOP}), tokenizer.decode), whole[:0])
        for token in whole[:length]:
            cancelled.take(token)
        cancelled.end("cancelled")
        assert cancelled.text == growing.text
    shown = [text for text in answers if text not in ("", "<")]  # one character may be an answer's own
    assert shown == ["A cat."[:length] for length in range(1, 7)]


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks.begin)
def test_every_family_has_its_marks(marks):
    known = Characters(marks.begin, marks.end, special=True)
    growing, heard = grown(known, f"{marks.begin}Let me see.{marks.end}A cat.")
    assert (growing.text, growing.reasoning, "".join(heard)) == ("A cat.", "Let me see.", "A cat.")
    growing, heard = grown(Characters(), f"{marks.begin}Let me see.{marks.end}A cat.")
    assert (growing.text == "A cat.") is marks.as_text  # the others are some sign's words
    growing, _ = grown(known, f"Let me see.{marks.end}A cat.", PROMPT + marks.begin)
    assert (growing.text, growing.reasoning) == ("A cat.", "Let me see.")


def test_words_of_a_question_open_no_thought():
    asked = "<|im_start|>user\nWhat is {}?<|im_end|>\n<|im_start|>assistant\n"
    assert grown(TOKENIZERS["text"], "A mark.", asked.format("<think>"))[0].text == "A mark."
    # the text of a question is never made of control tokens, whatever it looks like
    tokenizer = TOKENIZERS["tokens"]
    prompt = tokenizer.ids("<|im_start|>user\nWhat is ") + [len(tokenizer.own) + ord(one) for one in "<think>"]
    assert ReasoningMarks.of(tokenizer).opened(prompt, tokenizer.decode) is None
    assert ReasoningMarks.of(tokenizer).opened(tokenizer.ids("What is <think>"), tokenizer.decode) == "</think>"


def test_tokens_of_blanks_are_no_turn():
    tokenizer = Characters(*THINK)
    growing, heard = grown(tokenizer, "So.", PROMPT + "<think>\n\n\n")
    assert (growing.text, growing.reasoning, heard) == ("", "So.", [])


@pytest.mark.parametrize("wrapper", ["<answer>{}</answer>", "<|begin_of_box|>{}<|end_of_box|>"])
def test_tokens_around_an_answer_are_left_out_and_text_is_not(wrapper):
    begin, end = wrapper.split("{}")
    said = "<think>So.</think>" + wrapper.format("A cat.")
    growing, heard = grown(Characters(*THINK, begin, end), said)
    assert (growing.text, growing.reasoning, "".join(heard)) == ("A cat.", "So.", "A cat.")
    assert grown(Characters(*THINK), said)[0].text == wrapper.format("A cat.")


def test_stop_strings_end_answers_and_not_thoughts(tokenizer):
    growing, heard = grown(tokenizer, "<think>A. B.</think>C. D.", stop=(".", "B"))
    assert (growing.text, growing.reasoning, growing.finish_reason) == ("C", "A. B.", "stop")
    assert "".join(heard) == "C"
    assert len(growing.tokens) < len(tokenizer.ids("<think>A. B.</think>C. D."))


class Only:
    """A constraint: a certain text, then the end."""

    def __init__(self, tokenizer, text: str):
        self.left = [*tokenizer.ids(text), STOP]

    def allow(self, scores):
        wanted = scores[self.left[0]].clone()
        scores.fill_(float("-inf"))
        scores[self.left[0]] = wanted

    def take(self, token):
        assert token == self.left.pop(0)


def constrained(tokenizer, wishes: str, prompt: str, *, thinking: bool, processors=()):
    """What a model that would write `wishes`, again and again, writes under a constraint."""
    decoding = Decoding(max_new_tokens=80, marks=ReasoningMarks.of(tokenizer), thinking=thinking)
    rules = AnswerRules(decoding, frozenset({STOP}), tokenizer.decode, processors, constraint=Only(tokenizer, "{7}"))
    growing = GrowingAnswer(rules, tokenizer.ids(prompt))
    script = [*tokenizer.ids(wishes), STOP]
    while growing.finish_reason is None:
        scores = torch.zeros(300)
        scores[script[len(growing.tokens) % len(script)]] = 9
        scores[tokenizer.ids(".")] = 5  # its second choice
        growing.take(growing.choose(scores))
    return growing


@pytest.mark.parametrize(
    ("prompt", "wishes", "thinking", "reasoning"),
    [
        ("", "A cat.", False, ""),
        ("", "<think>So.</think>A cat.", False, ""),  # from the first token on
        ("<think>\n\n</think>\n\n", "A cat.", False, ""),
        ("", "A cat.", True, ""),
        ("<think>\n", "So.</think>A cat.", True, "So."),
        ("<think>\n", "So.</think>A cat.", False, "So."),  # a template without a switch
        ("", "<think>So.</think>A cat.", True, "So."),
        ("", "\n\n<think>So.</think>A cat.", True, "So."),
        ("", "\n\nA cat.", True, ""),
    ],
)  # fmt: skip
def test_a_constraint_holds_behind_the_thought(tokenizer, prompt, wishes, thinking, reasoning):
    growing = constrained(tokenizer, wishes, PROMPT + prompt, thinking=thinking)
    assert (growing.text.strip(), growing.reasoning, growing.finish_reason) == ("{7}", reasoning, "stop")


def test_a_mark_that_is_begun_is_gone_on_with():
    """What would follow its first token could neither be a thought nor an answer that conforms."""
    growing = constrained(TOKENIZERS["tokens"], "<table>", PROMPT, thinking=True)
    assert (growing.text, growing.reasoning) == ("{7}", "")
    tokenizer = TOKENIZERS["text"]
    growing = constrained(tokenizer, "<table>", PROMPT, thinking=True)
    assert (growing.text, growing.finish_reason) == ("", "length")
    assert tokenizer.decode(growing.tokens).startswith("<think>")


def test_a_constrained_answer_does_not_end_within_its_thought(tokenizer):
    growing = constrained(tokenizer, "So", PROMPT + "<think>\n", thinking=True)
    assert (growing.text, growing.finish_reason) == ("", "length")
    assert STOP not in growing.tokens


def test_marks_survive_pickling_and_are_those_of_the_tokenizer():
    marks = ReasoningMarks.of(Characters(*THINK, "[THINK]", "[/THINK]", "<answer>"))
    assert pickle.loads(pickle.dumps(marks)) == marks
    assert [one.begin for one in marks.marks] == ["<think>", "◁think▷", "[THINK]"]
    assert sorted(marks.replaced.values()) == ["", "</think>", "<think>", "[/THINK]", "[THINK]"]


def test_without_marks_an_answer_is_all_its_text():
    tokenizer = TOKENIZERS["tokens"]
    rules = AnswerRules(Decoding(max_new_tokens=3), frozenset({STOP}), tokenizer.decode)
    growing = GrowingAnswer(rules, [])
    for token in [*tokenizer.ids("<think>A"), STOP]:
        growing.take(token)
    assert (growing.text, growing.reasoning) == ("<think>A", "")


def test_the_tokenizers_here_do_as_transformers_do(checkpoint):
    """The marks of a real tokenizer, with tokens of its own that decoding leaves out, and such that it keeps."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.add_tokens(
        [AddedToken("[THINK]", special=True), AddedToken("[/THINK]", special=True)], special_tokens=True
    )

    def decode(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    marks = ReasoningMarks.of(tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for begin, end in (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")):
        for opened in (False, True):
            prompt = tokenizer(PROMPT + (f"{begin}\n" if opened else ""))["input_ids"]
            answer = tokenizer(f"{'' if opened else begin}It is a cät.{end}\n\nA cät 🐈.")["input_ids"]
            heard: list[str] = []
            rules = AnswerRules(Decoding(marks=marks), frozenset({stop}), decode, on_text=heard.append)
            growing = GrowingAnswer(rules, prompt)
            for token in [*answer, stop]:
                growing.take(token)
            assert (growing.text, growing.reasoning) == ("A cät 🐈.", "It is a cät."), (begin, opened)
            assert "".join(heard) == growing.text
            assert marks.read(prompt, growing.tokens, decode).reasoning == growing.reasoning
