"""Where in its tokens a model thinks, and where it answers.

A model that thinks writes its reasoning between two marks, ahead of the answer. Often the prompt has the first mark
already, and the model writes only the second; some models think although they were asked not to. A mark may be a token
of the tokenizer, which `decode` may leave out, or plain text of several tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Marks:
    """What stands before and behind a thought. `as_text`: also where they are no tokens of the tokenizer."""

    begin: str
    end: str
    as_text: bool = False


MARKS = (
    Marks("<think>", "</think>", as_text=True),  # Qwen, GLM, Kimi K2.5, MiniCPM-V; as text in models tuned to reason
    Marks("◁think▷", "◁/think▷", as_text=True),  # Kimi-VL: several tokens each
    Marks("[THINK]", "[/THINK]"),  # Mistral
    Marks("<|channel>", "<channel|>"),  # Gemma 4
)
# Around the answer itself; left out where they are tokens. GLM-4.1V has the first two, GLM-4.5V the others.
WRAPPERS = ("<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>")


@dataclass(frozen=True)
class Split:
    """Reasoning and answer apart. `is_open`: the reasoning has not ended yet."""

    reasoning: str
    answer: str
    is_open: bool = False
    has_reasoned: bool = False  # also where it came to nothing


@dataclass(frozen=True)
class ReasoningMarks:
    """The marks that one tokenizer's models may write. Can be pickled.

    Attributes:
        marks: Those that are looked for.
        replaced: By token, what stands for it in an answer's text: a mark for itself, a wrapper for nothing.
        control: The tokenizer's own tokens: behind the last of them the answer's turn begins.
        spelled: The tokens of each first mark.
    """

    marks: tuple[Marks, ...]
    replaced: Mapping[int, str]
    control: frozenset[int]
    spelled: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: Any) -> ReasoningMarks:
        """Give the marks that a tokenizer of transformers has."""
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        marks = tuple(one for one in MARKS if one.as_text or one.begin in added)
        texts = {text: text for one in marks for text in (one.begin, one.end)} | dict.fromkeys(WRAPPERS, "")
        return cls(
            marks,
            {added[text]: shown for text, shown in texts.items() if text in added},
            frozenset(number for text, number in added.items() if text.strip()),  # some have tokens of mere blanks
            tuple(tuple(tokenizer(one.begin, add_special_tokens=False)["input_ids"]) for one in marks),
        )

    def text(self, tokens: Sequence[int], decode: Decode) -> str:
        """Give the text of an answer's tokens, with the marks, also those that `decode` leaves out."""
        if self.replaced.keys().isdisjoint(tokens):
            return decode(tokens)
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token in self.replaced:
                parts += [decode(run), self.replaced[token]]
                run = []
            else:
                run.append(token)
        return "".join([*parts, decode(run)])

    def opened(self, prompt: Sequence[int], decode: Decode) -> str | None:
        """Give the mark that will end the thought that `prompt` ends within; None if it ends within none."""
        last = next((at for at in range(len(prompt) - 1, -1, -1) if prompt[at] in self.control), -1)
        begun = self.replaced.get(prompt[last]) if last >= 0 else None
        behind = decode(prompt[last + 1 :]).rstrip()
        tokens = set(self.replaced.values())  # as text they are somebody's words
        return next(
            (
                one.end
                for one in self.marks
                if (begun == one.begin if one.begin in tokens else behind.endswith(one.begin))
            ),
            None,
        )

    def split(self, text: str, opened: str | None = None) -> Split:
        """Part an answer's text. `opened` is the mark that ends a thought which the prompt has begun.

        What stands before a second mark is reasoning even if no first mark came. A thought may stand anywhere.
        """
        ends = {one.begin: one.end for one in self.marks}
        pattern = re.compile("|".join(re.escape(mark) for pair in ends.items() for mark in pair))
        thoughts: list[str] = []
        answer, closing = "", opened
        while True:
            if closing is not None:
                thought, end, text = text.partition(closing)
                thoughts.append(thought)
                if not end:
                    break
                closing = None
                if not answer.strip():
                    answer, text = "", text.lstrip()
            found = pattern.search(text)
            if found is None:
                answer += text
                break
            answer, text = answer + text[: found.start()], text[found.end() :]
            closing = ends.get(found[0])
            if closing is None:
                thoughts.append(answer)
                answer, text = "", text.lstrip()
            elif not answer.strip():
                answer = ""
        said = (_without_begin(thought, ends) for thought in thoughts)
        return Split("\n\n".join(filter(None, said)), answer, closing is not None, bool(thoughts))

    def read(self, prompt: Sequence[int], tokens: Sequence[int], decode: Decode) -> Split:
        """Part the tokens of an answer behind `prompt`."""
        return self.split(self.text(tokens, decode), self.opened(prompt, decode))

    def is_cut_mark(self, text: str) -> bool:
        """Say whether `text` is the beginning of a first mark, cut off before it was one."""
        return len(text) > 1 and any(one.begin != text and one.begin.startswith(text) for one in self.marks)

    def toward_thought(self, tokens: Sequence[int], token: int, decode: Decode) -> int | None:
        """Give the next token of an answer that may begin with a thought: `token`, if it is blank or begins one.

        A mark of several tokens that was begun is gone on with. None where the answer itself begins.
        """

        def is_blank(one: int) -> bool:
            return one not in self.control and not decode([one]).strip()

        said = tuple(dropwhile(is_blank, tokens))
        for mark in self.spelled:
            if said and said == mark[: len(said)] and len(said) < len(mark):
                return mark[len(said)]
            if not said and token == mark[0]:
                return token
        return token if not said and is_blank(token) else None


def _without_begin(thought: str, begins: Mapping[str, str]) -> str:
    """Give a thought without blanks around it, and without a first mark that stands there twice."""
    thought = thought.strip()
    return next((thought.removeprefix(begin).lstrip() for begin in begins if thought.startswith(begin)), thought)
