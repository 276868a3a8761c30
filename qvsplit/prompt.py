"""A question about pictures to `input_ids` and `mm_token_type_ids`, as the processor's chat template would.

User text is only ever text: whatever it contains (`<|image_pad|>`, `<|im_end|>`), its tokens are ordinary ones.
Where it contains no control token the result is the processor's own, token for token. Knows grids, not pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvsplit.checkpoint import Checkpoint
from qvsplit.errors import ModelError, QvsplitError, UsageError
from qvsplit.hf import load_processor

Grid = tuple[int, int, int]
Message = Mapping[str, Any]  # {"role": …, "content": text, or a list of {"type": "image"} and {"type": "text", …}}

IMAGE_TYPE = 1  # in mm_token_type_ids; 0 is text, 2 video


@dataclass(frozen=True)
class Prompt:
    """One conversation, ready for the language half. The lists have one entry a token; `grids` one a picture."""

    input_ids: list[int]
    mm_token_type_ids: list[int]
    grids: list[Grid]

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the prompt has up to its last picture, that included: what every question shares."""
        return len(self.mm_token_type_ids) - self.mm_token_type_ids[::-1].index(IMAGE_TYPE)

    def upto(self, pictures: int) -> Prompt:
        """The prompt's beginning, up to the end of its picture number `pictures`, counted from one."""
        types = self.mm_token_type_ids
        ends = [
            end for end in range(1, len(types) + 1) if types[end - 1] == IMAGE_TYPE and [0, *types, 0][end + 1] == 0
        ]
        end = ends[pictures - 1]
        return Prompt(self.input_ids[:end], types[:end], self.grids[:pictures])


class Prompter:
    """Tokenizer and chat template of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.processor = load_processor(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.folder = checkpoint.folder
        added = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        self._control: dict[str, int] = added
        self._image_token = checkpoint.family.image_token
        if self._image_token not in added:
            raise ModelError(f"{checkpoint.folder}: its tokenizer has no {self._image_token}; download it again")
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(re.escape(token) for token in longest_first) + ")")

    def ask(self, question: str, grids: Sequence[Grid], *, merge_size: int, system: str | None = None) -> Prompt:
        """The prompt of one question about the pictures with these grids, pictures first."""
        content = [*({"type": "image"} for _ in grids), {"type": "text", "text": question}]
        messages: list[Message] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self.chat(messages, grids, merge_size=merge_size)

    def chat(self, messages: Sequence[Message], grids: Sequence[Grid], *, merge_size: int) -> Prompt:
        """The prompt of any conversation; `grids` are its pictures' in order. UsageError if their number differs."""
        from qwen_vl_utils.vision_process import extract_vision_info

        pictures = len(extract_vision_info([dict(message) for message in messages]))
        if pictures != len(grids):
            raise UsageError(f"the conversation shows {pictures} pictures, and {len(grids)} were given")
        tokens = [t * h * w // merge_size**2 for t, h, w in grids]
        ids, types, shown = [], [], 0
        for piece in self._pieces(messages):
            if isinstance(piece, str):
                new = self.text_tokens(piece)
            elif piece == self._control[self._image_token]:
                new = [piece] * tokens[shown]
                shown += 1
            else:
                new = [piece]
            ids += new
            types += [IMAGE_TYPE if piece == self._control[self._image_token] else 0] * len(new)
        if shown != len(grids):
            raise ModelError(f"{self.folder}: its chat template shows {shown} of {len(grids)} pictures")
        return Prompt(ids, types, list(grids))

    def decode(self, tokens: Sequence[int]) -> str:
        """Answer tokens as text, without control tokens."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _pieces(self, messages: Sequence[Message]) -> list[str | int]:
        """The rendered conversation as runs of plain text and ids of the template's control tokens.

        The template is rendered over stand-ins for the users' texts, so that only its own control tokens are seen;
        rendered over the texts themselves it must give the same string, else it rewrites them and is refused.
        """
        texts = _texts(messages)
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise UsageError("a question holds bytes that are not UTF-8; give it as UTF-8 text")
        stand_ins = _stand_ins(texts)
        rendered = self._render(_with_texts(messages, stand_ins))
        put_back = dict(zip(stand_ins, texts, strict=True))
        if self._restore(rendered, put_back) != self._render(messages):
            raise ModelError(f"{self.folder}: its chat template rewrites what users say; qvsplit cannot use it exactly")
        parts = [part for part in self._split.split(rendered) if part]
        return [self._control[part] if part in self._control else self._restore(part, put_back) for part in parts]

    def _restore(self, part: str, put_back: Mapping[str, str]) -> str:
        for stand_in, text in put_back.items():
            part = part.replace(stand_in, text)
        return part

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return str(
                self.processor.apply_chat_template(
                    [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
                )
            )
        except Exception as error:  # a template is a program of the checkpoint's: it may raise anything
            raise ModelError(f"{self.folder} has no usable chat template ({error}); download it again") from None

    def text_tokens(self, text: str) -> list[int]:
        """The tokens of plain text; what looks like a control token in it is text as well."""
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        slipped = set(ids) & {self._control[token] for token in self._control if token in text}
        if slipped:  # no tokenizer known to us does this; a silently different prompt would be worse than stopping
            raise QvsplitError(f"{self.folder}: its tokenizer made control tokens of plain text; nothing was asked")
        return ids


def _texts(messages: Sequence[Message]) -> list[str]:
    texts = []
    for message in messages:
        if isinstance(message["content"], str):
            texts.append(message["content"])
        else:
            texts += [part["text"] for part in message["content"] if "text" in part]
    return texts


def _with_texts(messages: Sequence[Message], texts: list[str]) -> list[Message]:
    remaining = iter(texts)
    replaced: list[Message] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            replaced.append({**message, "content": next(remaining)})
        else:
            parts = [{**part, "text": next(remaining)} if "text" in part else part for part in content]
            replaced.append({**message, "content": parts})
    return replaced


def _stand_ins(texts: Sequence[str]) -> list[str]:
    """One string for each text that occurs in none of them, made of private-use characters."""
    everything = "".join(texts)
    fence = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in everything)
    return [f"{fence}{number}{fence}" for number in range(len(texts))]
