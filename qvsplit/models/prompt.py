"""A question about images to `input_ids` and `mm_token_type_ids`, as the processor's chat template would.

Each image's placeholder, as it is stored beside its features, takes the place of the template's own image token; no
pixels and no code per family are needed. User text is only ever text: whatever it contains (`<|image_pad|>`,
`<|im_end|>`), its tokens are ordinary ones; and a stored placeholder may hold no control token but its family's own.
Where the user's text contains no control token the result is the processor's own, token for token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.hf import load_processor
from qvsplit.errors import ModelError, StoreDamaged, UsageError
from qvsplit.store.row import Row, Runs

Grid = tuple[int, int, int]
Message = Mapping[str, Any]  # {"role": …, "content": text, or a list of {"type": "image"} and {"type": "text", …}}

TOKEN_TYPES = {"image": 1, "video": 2}  # in mm_token_type_ids; 0 is text
MAX_PLACEHOLDER_TEXT = 1 << 20  # characters of plain text in one placeholder: timestamps, row marks


@dataclass(frozen=True)
class Placeholder:
    """What stands in a prompt for one image or video: runs of (text, count), and how many feature rows go there."""

    runs: Runs
    n_tokens: int
    grid_thw: Grid | None = None
    kind: str = "image"
    name: str = "an image"  # for messages

    @classmethod
    def from_row(cls, row: Row) -> Placeholder:
        """Give that of a stored row. StoreDamaged if it holds none."""
        try:
            runs = row.placeholder_runs
        except ValueError as error:
            raise StoreDamaged(f"the row of {row.path} {error}; run `qvsplit extract` again") from None
        if not runs or row.n_tokens is None:
            raise StoreDamaged(f"the row of {row.path} lacks placeholder or token count; run `qvsplit extract` again")
        return cls(runs, row.n_tokens, row.grid_thw, row.kind, row.path)


@dataclass(frozen=True)
class Prompt:
    """One conversation, ready for the language model. The lists have one entry a token, `placeholders` one an item."""

    input_ids: list[int]
    mm_token_type_ids: list[int]
    placeholders: list[Placeholder]

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the prompt has up to its last item, that included: what every question shares."""
        return next(end for end in range(len(self.mm_token_type_ids), 0, -1) if self.mm_token_type_ids[end - 1])

    def grids(self, kind: str) -> list[Grid]:
        """Give the grids of the items of this kind, in order."""
        return [one.grid_thw for one in self.placeholders if one.kind == kind and one.grid_thw is not None]

    def upto(self, items: int) -> Prompt:
        """Give the prompt's beginning, up to the end of its item number `items`, counted from one."""
        wanted = sum(one.n_tokens for one in self.placeholders[:items])
        counts = accumulate(map(bool, self.mm_token_type_ids))
        end = next(place for place, count in enumerate(counts, 1) if count == wanted)
        return Prompt(self.input_ids[:end], self.mm_token_type_ids[:end], self.placeholders[:items])


class Prompter:
    """Tokenizer and chat template of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.processor = load_processor(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.folder = checkpoint.folder
        added = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        self._control: dict[str, int] = added
        self._tokens_of_kinds = {"image": checkpoint.family.image_token}
        if (video_token := getattr(self.processor, "video_token", None)) in added:
            self._tokens_of_kinds["video"] = video_token
        if self._tokens_of_kinds["image"] not in added:
            raise ModelError(
                f"{checkpoint.folder}: its tokenizer has no {self._tokens_of_kinds['image']}; download it again"
            )
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(re.escape(token) for token in longest_first) + ")")

    def ask(self, question: str, placeholders: Sequence[Placeholder], *, system: str | None = None) -> Prompt:
        """Give the prompt of one question about these items, items first."""
        return self.chat(question_messages(question, [one.kind for one in placeholders], system), placeholders)

    def chat(self, messages: Sequence[Message], placeholders: Sequence[Placeholder]) -> Prompt:
        """Give the prompt of any conversation; `placeholders` are its items' in order. UsageError if they differ."""
        kinds = _item_kinds(messages)
        if len(kinds) != len(placeholders):
            raise UsageError(f"the conversation shows {len(kinds)} images, and {len(placeholders)} were given")
        for kind, one in zip(kinds, placeholders, strict=True):
            if kind != one.kind:
                raise UsageError(f"the conversation shows {kind} where {one.name}, which is {one.kind}, was given")
        ids: list[int] = []
        for piece in self._filled(self._pieces(messages), placeholders):
            if isinstance(piece, str):
                ids += self.text_tokens(piece)
            else:
                token, count = piece
                ids += [token] * count
        types = self.processor.create_mm_token_type_ids([ids])[0]
        return Prompt(ids, types, list(placeholders))

    def _filled(self, pieces: Sequence[str | int], placeholders: Sequence[Placeholder]) -> list[str | tuple[int, int]]:
        """Put each item's placeholder in place of the template's token for it.

        Returns:
            Plain text, neighbours joined as the tokenizer would see them, and (control token, count).
        """
        item_tokens = {self._control[token] for token in self._tokens_of_kinds.values()}
        waiting = iter(placeholders)
        filled: list[str | tuple[int, int]] = []
        shown = 0
        for piece in pieces:
            if isinstance(piece, int) and piece in item_tokens:
                shown += 1
                one = next(waiting, None)
                new = [] if one is None else self._placeholder_pieces(one)
            else:
                new = [piece if isinstance(piece, str) else (piece, 1)]
            for part in new:
                if isinstance(part, str) and filled and isinstance(filled[-1], str):
                    filled[-1] += part
                else:
                    filled.append(part)
        if shown != len(placeholders):
            raise ModelError(f"{self.folder}: its chat template shows {shown} of {len(placeholders)} images")
        return filled

    def _placeholder_pieces(self, one: Placeholder) -> list[str | tuple[int, int]]:
        """Take a stored placeholder apart. StoreDamaged for control tokens that are not its family's, or a wrong count.

        A store may come from anywhere: what it says must not end a turn or begin another.
        """
        token = self._tokens_of_kinds.get(one.kind)
        if token is None:
            raise StoreDamaged(f"{one.name} is {one.kind}, and {self.folder} has no token for that")
        pieces: list[str | tuple[int, int]] = []
        rows = characters = 0
        for text, count in one.runs:
            parts = [part for part in self._split.split(text) if part]
            foreign = [part for part in parts if part in self._control and part != token]
            if foreign:
                raise StoreDamaged(
                    f"the placeholder of {one.name} holds the control token {foreign[0]}, which stands for no "
                    f"{one.kind}; the store was not written by qvsplit, or damaged"
                )
            rows += count * parts.count(token)
            characters += count * sum(len(part) for part in parts if part != token)
            if rows > one.n_tokens or characters > MAX_PLACEHOLDER_TEXT:
                break  # before it is laid out: a count may be anything
            whole = [part if part != token else (self._control[part], 1) for part in parts]
            pieces += [(self._control[token], count)] if parts == [token] else whole * count
        if rows != one.n_tokens or characters > MAX_PLACEHOLDER_TEXT:
            raise StoreDamaged(
                f"the placeholder of {one.name} does not have the {one.n_tokens:,} image tokens of its features; the "
                "store was not written by qvsplit, or damaged"
            )
        return pieces

    def decode(self, tokens: Sequence[int]) -> str:
        """Give answer tokens as text, without control tokens."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _pieces(self, messages: Sequence[Message]) -> list[str | int]:
        """Give the rendered conversation as runs of plain text and ids of the template's control tokens.

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
        """Tokenize plain text; what looks like a control token in it is text as well."""
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        slipped = set(ids) & {self._control[token] for token in self._control if token in text}
        if slipped:  # no tokenizer known to us does this; a silently different prompt would be worse than stopping
            raise ModelError(f"{self.folder}: its tokenizer made control tokens of plain text; nothing was asked")
        return ids


def question_messages(question: str, kinds: Sequence[str], system: str | None = None) -> list[Message]:
    """Give the conversation of one question about items of these kinds, items first."""
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    messages: list[Message] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _item_kinds(messages: Sequence[Message]) -> list[str]:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part["type"] for content in contents for part in content if part.get("type") in TOKEN_TYPES]


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
    """Make one string for each text that occurs in none of them, of private-use characters."""
    everything = "".join(texts)
    fence = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in everything)
    return [f"{fence}{number}{fence}" for number in range(len(texts))]
